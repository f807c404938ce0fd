"""The server of `ftray ui`: the live page of a run, requests to a search that runs, and the way to an endpoint."""

import asyncio
import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Annotated, Any, Literal

import httpx
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, Field

from ftray.config import Config
from ftray.errors import UserError
from ftray.reports.live import LiveRun
from ftray.serving.error_responses import HANDLERS, response
from ftray.serving.errors import APIError
from ftray.serving.key import RequireKey
from ftray.serving.live_routes import PAGE_ROUTES, live_routes, pages
from ftray.serving.request_body import body_of, json_body
from ftray.storage.location import Location

COMMAND_SECONDS = 180.0  # for a command of a button, which may load a model's structure
ASKED = ("completions", "chat/completions", "classify", "embeddings")  # routes of an endpoint that the page asks
LINGERS = 60.0  # seconds without a request, after which a page whose search was killed is not looked at any more
LAST_LOOK = 6.0  # seconds without a request, after which nobody has the page open
MOST_LOOKS = 30.0  # seconds for a page that is open to see how the search ended
NO_NUL = r"^[^\x00]*$"  # no argument of a process holds it
Setting = Annotated[str, Field(max_length=2_000, pattern=NO_NUL)]


class SteerRequest(BaseModel, extra="forbid"):
    """What a button asks for; `changes` are fields of a clone by their dotted names."""

    command: Literal["stop", "add", "clone", "pause", "train-on", "prove"]
    trial: Annotated[int, Field(ge=0)] | None = None
    configuration: Annotated[str, Field(max_length=20_000, pattern=NO_NUL)] = ""
    changes: Annotated[dict[Setting, Setting], Field(max_length=100)] = {}

    def arguments(self, run: str) -> list[str]:
        """The command that does it.

        Raises:
            APIError: 400: it changes something that is no setting of a trial.
        """
        on = ["--run", run]
        if self.command in ("pause", "train-on"):
            return ["pause", *on, *(["--off"] if self.command == "train-on" else [])]
        if self.command == "prove":
            return ["stop", "--prove", *on]
        if self.command == "add":
            return ["add", self.configuration or "{}", *on]
        if self.trial is None:
            raise APIError(400, f"{self.command}: which trial?", "trial", "invalid_value")
        given = [f"--{name}={value}" for name, value in self.changes.items()] if self.command == "clone" else []
        if wrong := [name for name in self.changes if name.partition(".")[0] not in ("adapter", "training")]:
            raise APIError(400, f"{wrong[0]}: only adapter.* and training.* can be changed", "changes", "invalid_value")
        return [self.command, str(self.trial), *on, *given]


class Looked:
    """Whether somebody looks at the page.

    Attributes:
        at: when it was asked for something last.
        reported: when it was last given the report.
        busy: requests under way.
    """

    def __init__(self) -> None:
        self.at, self.reported, self.busy = time.monotonic(), 0.0, 0

    @contextmanager
    def request(self, path: str) -> Iterator[None]:
        """A request to the page."""
        self.busy += 1
        try:
            yield
        finally:
            self.at, self.busy = time.monotonic(), self.busy - 1
            if path.endswith("/report"):
                self.reported = self.at

    def is_open(self, seconds: float) -> bool:
        """Whether it was asked for something in so many seconds."""
        return self.busy > 0 or time.monotonic() - self.at < seconds


def create_app(output: Location, key: str, endpoint: str, endpoint_key: str, looked: Looked) -> FastAPI:
    """The application.

    Args:
        key: SHA-256 of the token that the page needs, hexadecimal.
        endpoint: URL of `ftray serve`; whether it answers is looked up when the page asks.
        endpoint_key: its token; empty: it needs none.
    """
    run = LiveRun(output)
    headers = {"Authorization": f"Bearer {endpoint_key}"} if endpoint_key else {}
    client = httpx.AsyncClient(base_url=endpoint, headers=headers, timeout=httpx.Timeout(600, connect=2))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await client.aclose()

    app = FastAPI(
        title="ftray",
        openapi_url=None,
        lifespan=lifespan,
        dependencies=[Depends(RequireKey(key, PAGE_ROUTES))],
        exception_handlers={**HANDLERS, httpx.TransportError: _no_endpoint},
    )

    async def shown_run(http: Request) -> AsyncIterator[LiveRun]:
        with looked.request(http.url.path):
            yield run

    app.include_router(pages)
    app.include_router(live_routes(shown_run, steers=True))

    @app.post("/v1/live/requests")
    async def steer(http: Request) -> dict[str, Any]:
        asked = await body_of(SteerRequest, http)
        return await carried_out(asked.arguments(str(output)))

    @app.get("/v1/live/endpoint")
    async def endpoint_there() -> dict[str, Any]:
        with suppress(httpx.TransportError):
            return {"url": endpoint, "there": (await client.get("/health")).is_success}
        return {"url": endpoint, "there": False, "start": shlex.join(["ftray", "serve", "--run", str(output)])}

    @app.get("/v1/{route}")
    async def looked_up(route: Literal["models", "run"]) -> JSONResponse:
        got = await client.get(f"/v1/{route}")
        return JSONResponse(got.json(), _own(got.status_code))

    @app.post("/v1/{route:path}")
    async def asked(route: str, http: Request) -> StreamingResponse:
        if route not in ASKED:
            raise APIError(404, f"there is no route /v1/{route[:80]}", code="not_found")
        kind = {"Content-Type": "application/json"}
        sent = client.build_request("POST", f"/v1/{route}", content=await json_body(http), headers=kind)
        got = await client.send(sent, stream=True)
        return StreamingResponse(_passed_on(got), _own(got.status_code), {"Content-Type": got.headers["content-type"]})

    return app


async def _passed_on(got: httpx.Response) -> AsyncIterator[bytes]:
    """The body of a response; when nobody reads it any more, the endpoint is told so."""
    try:
        async for part in got.aiter_raw():
            yield part
    finally:
        await got.aclose()


def _own(status: int) -> int:
    """The status of an endpoint's answer; that it wants another key is no matter of this page's key."""
    return 502 if status == 401 else status


async def carried_out(arguments: list[str]) -> dict[str, Any]:
    """Run a command as its user would; returns the `command` and what it `said`.

    Raises:
        APIError: 400: it refused; 504: it took too long.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", f"ftray.{arguments[0]}", *arguments[1:]),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        said, refused = await asyncio.wait_for(process.communicate(), COMMAND_SECONDS)
    except TimeoutError:
        process.kill()
        raise APIError(504, f"ftray {arguments[0]} took more than {COMMAND_SECONDS:.0f} s", code="too_slow") from None
    if process.returncode:
        line = (refused.decode(errors="replace").strip().splitlines() or ["it failed"])[-1]
        raise APIError(400, line.removeprefix(f"ftray {arguments[0]}: error: "), code="refused")
    return {"command": shlex.join(["ftray", *arguments]), "said": said.decode(errors="replace").strip()}


def end_with_parent(looked: Looked, end: Callable[[], None]) -> None:
    """Of a page beside a search, which has its standard input: end soon after the search.

    Where one is open, it first sees how a search that is over ended; of one that was killed, it tells for longer.
    """

    def wait() -> None:
        over = bool(sys.stdin.buffer.readline())
        ended = time.monotonic()
        while looked.is_open(LAST_LOOK if over else LINGERS):
            if over and (looked.reported > ended or time.monotonic() - ended > MOST_LOOKS):
                break
            time.sleep(0.2)
        end()

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def page_beside(cfg: Config, output: Location) -> Iterator[None]:
    """Serve the live page, in a process of its own, as long as the block runs; it prints where.

    Raises:
        UserError: it can't be served.
    """
    flags = ["--run", str(output.absolute()), "--host", cfg.ui.host, "--port", str(cfg.ui.port)]
    flags += ["--ui.endpoint", cfg.ui.endpoint, "--ui.beside", "true"]
    flags += ["--ui.api_key_file", cfg.ui.api_key_file] if cfg.ui.api_key_file else []
    with tempfile.TemporaryFile() as said:  # a pipe could fill
        page = subprocess.Popen(
            [sys.executable, "-m", "ftray.ui", *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            start_new_session=True,  # Ctrl-C is for the search, whose page shows how it ends
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert page.stdin is not None and page.stdout is not None  # noqa: PT018
        if not (line := page.stdout.readline()):
            said.seek(0)
            why = said.read().decode(errors="replace").strip().removeprefix("ftray ui: error: ")
            raise UserError(why or "the page could not be served")
    print(line, end="", flush=True)
    try:
        yield
    finally:
        with suppress(OSError):  # it was ended
            page.stdin.write("over\n")
            page.stdin.close()
        try:
            page.wait(2 * MOST_LOOKS)
        except subprocess.TimeoutExpired:
            page.kill()
            page.wait()


async def _no_endpoint(request: Request, error: httpx.TransportError) -> JSONResponse:
    return response(APIError(503, f"no endpoint answers: {type(error).__name__}", code="no_endpoint"))
