"""An S3 server in a process of its own."""

import os
import socket
import subprocess
import sys
import time

from helpers.ports import free_port


class Store:
    """moto's S3 server, as a process that can be stopped and continued."""

    def __init__(self, port: int | None = None, **settings: str) -> None:
        self.port = port or free_port()
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
