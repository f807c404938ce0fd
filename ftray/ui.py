"""Serve a live page of a run: its report as it grows, and buttons to lead a search."""

import secrets
import socket
import sys

from ftray.cli import run_command
from ftray.config import Config
from ftray.errors import UserError


def run(cfg: Config) -> int:
    """The command: prints the page's URL and serves it until it is interrupted or terminated.

    Raises:
        UserError: there is no run, no token where one is needed, or no such address to listen on.
    """
    try:
        import uvicorn

        from ftray.serving.key import LOOPBACK, digest_of, find_key
        from ftray.serving.live import Looked, create_app, end_with_parent
    except ModuleNotFoundError as error:
        raise UserError(f'the page needs {error.name}: pip install "ftray[serve]"') from None
    from ftray.reports.live import LiveRun
    from ftray.search.jobs import output_of

    output, given = output_of(cfg), find_key(cfg.ui.api_key_file, "ui.api_key_file")
    if not given and cfg.ui.host not in LOOPBACK:
        raise UserError(
            f"ui.host {cfg.ui.host}: others could come without a key: set FTRAY_API_KEY or --ui.api_key_file"
        )
    state = LiveRun(output).state()
    if state["kind"] is None and not cfg.ui.beside:  # beside a search, its output fills in a moment
        raise UserError(state["problem"])
    key, looked = given or secrets.token_urlsafe(24), Looked()
    app = create_app(output, digest_of(key), cfg.ui.endpoint, given, looked)
    listening = _listening(cfg.ui.host, cfg.ui.port)
    host = f"[{cfg.ui.host}]" if ":" in cfg.ui.host else cfg.ui.host
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=3))
    print(f"page     http://{host}:{listening.getsockname()[1]}/{'' if given else f'#key={key}'}", flush=True)
    if cfg.ui.beside:
        end_with_parent(looked, lambda: setattr(server, "should_exit", True))
    server.run([listening])
    return 0


def _listening(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        found = socket.socket(family)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
        found.listen()
        return found
    except OSError as error:
        where = f"can't listen on {host}:{port}: {error.strerror}"
        raise UserError(f"{where}: choose another --ui.host or --ui.port (0: any that is free)") from None


if __name__ == "__main__":
    sys.exit(run_command("ui"))
