"""An S3 server in a process of its own."""

import os
import socket
import subprocess
import sys
import time


class Store:
    """moto's S3 server, as a process that can be stopped and continued."""

    def __init__(self, **settings: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        start = [sys.executable, "-m", "moto.server", "--port", str(self.port)]
        self.process = subprocess.Popen(
            start, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | settings
        )
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
