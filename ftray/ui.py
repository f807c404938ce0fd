"""Serve a live page of a run: its report as it grows, and buttons to lead a search."""

import secrets
import signal
import socket
import sys
import threading
from html import escape
from typing import TYPE_CHECKING

from ftray.arguments import Settings, StrPath, command, config_of
from ftray.cli import run_command
from ftray.config import Config
from ftray.errors import TERMINATED, UserError

if TYPE_CHECKING:
    import uvicorn

    from ftray.serving.live import Looked


class LivePage:
    """A page that is served, until :meth:`close` or the end of a `with` block; at the latest, the process ends it.

    Attributes:
        url: its address; behind the `#` its token, unless that is one of the user's own.
        looked: whether somebody looks at it.
    """

    def __init__(self, url: str, server: "uvicorn.Server", listening: socket.socket, looked: "Looked"):
        self.url, self.looked = url, looked
        self._server = server
        self._thread = threading.Thread(target=server.run, args=([listening],), name="ftray ui", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Let requests under way be answered, for at most some seconds, then end; the run goes on without it."""
        self._server.should_exit = True
        self.wait()

    def wait(self) -> None:
        """Return once it is closed."""
        self._thread.join()

    def __enter__(self) -> "LivePage":
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<LivePage {self.url}>"

    def _repr_html_(self) -> str:
        return f'<a href="{escape(self.url)}" target="_blank">{escape(self.url.partition("#")[0])}</a>'


@command
def ui(
    run: StrPath | None = None,
    *,
    host: str | None = None,
    port: int | None = None,
    ui: Settings | None = None,
    scaling: Settings | None = None,
    config: Config | StrPath | Settings | None = None,
    verbose: bool | None = None,
) -> LivePage:
    """Serve a live page of a run in the background: its report as it grows, and buttons to lead a search.

    Args:
        run: output directory or URI, or the id of the Ray job that drives the search.
        port: 0: any that is free.

    Others are the fields and sections of docs/configuration.md.

    Raises:
        UserError: there is no run, no token where one is needed, or no such address to listen on.
    """
    return _ui(config_of("ui", locals()))


def _ui(cfg: Config) -> LivePage:
    try:
        import uvicorn

        from ftray.serving.key import LOOPBACK, digest_of, find_key
        from ftray.serving.live import Looked, create_app
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
    url = f"http://{host}:{listening.getsockname()[1]}/{'' if given else f'#key={key}'}"
    # uvloop would take the place of the program's own handler of ended processes
    settings = uvicorn.Config(app, loop="asyncio", log_config=None, log_level="error", timeout_graceful_shutdown=3)
    return LivePage(url, uvicorn.Server(settings), listening, looked)


def run(cfg: Config) -> int:
    """The command: prints the page's URL and serves it until it is interrupted or terminated.

    Raises:
        UserError: there is no run, no token where one is needed, or no such address to listen on.
    """
    with ui(config=cfg) as page:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
        print(f"page     {page.url}", flush=True)
        if cfg.ui.beside:
            from ftray.serving.live import end_with_parent

            end_with_parent(page.looked, page.close)
        page.wait()
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
