"""Join a Ray cluster, or start one on this machine, without its log noise."""

import importlib
import logging
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftray.config import PYTHON_CALL, Config
from ftray.errors import RunFailed, UserError
from ftray.runtime.threads import wait_briefly
from ftray.storage.location import parse_location, reason

if TYPE_CHECKING:
    import ray

# seconds; KubeRay restarts a head in less than a minute
JOIN_PATIENCE, RAYLET_PATIENCE, HEAD_PATIENCE, ROOM_PATIENCE = 10, 5, 45, 10
# how long Ray waits for its own processes, in seconds: 30 by default, too short for a machine that is busy
START_PATIENCE = {"RAY_gcs_server_port_wait_time_s": "180", "RAY_raylet_start_wait_time_s": "180"}
LONGEST_SOCKET = 107  # bytes of its path, on Linux
RAYLET_NOISE = "|".join(  # what is as it should be
    (
        "PYTHON worker processes have been started",  # a trial has several small ones
        r"Task ServeController\.graceful_shutdown failed",  # it ends itself, which is no answer to who asked it to
    )
)


def quiet() -> None:
    """Silence the logs of other libraries on the terminal; call it before they are imported."""
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Tune's own tables: ftray draws its own
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", RAYLET_NOISE)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)  # in this process only; libraries reset levels, and Tune logs tracebacks


@contextmanager
def quietly(verbose: bool = False) -> Iterator[None]:
    """Inside, as after :func:`quiet`, unless `verbose`; the program around it logs and warns as it did."""
    level = logging.root.manager.disable
    try:
        with warnings.catch_warnings():
            if not verbose:
                quiet()
            yield
    finally:
        logging.disable(level)


def connect(cfg: Config, dashboard: bool = True) -> None:
    """Join the cluster at `scaling.address` or the one that this job runs in, else start one on this machine.

    Args:
        dashboard: whether one that starts here has Ray's dashboard: nine processes, for what runs a few seconds.

    Raises:
        UserError: as :func:`check_address`.
        RunFailed: Ray's own processes did not start, or let this one not in.
    """
    import ray

    from ftray.compat.ray import bootstrap_address

    if ray.is_initialized():
        return
    check_address(cfg)
    joins = bool(bootstrap_address(cfg.scaling.address))
    waiting = wait_briefly()  # nothing that the job itself sets: Ray takes no variable twice
    if not joins:
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nobody drains this machine
        os.environ.setdefault("RAY_worker_niceness", "0")  # 15: beside any other process, next to nothing is left
        for variable, seconds in START_PATIENCE.items():
            os.environ.setdefault(variable, seconds)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "0")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # 2: that long, nobody hears that a run is over
    has_dashboard = None if dashboard or joins else False  # None: Ray's default
    try:
        with nullcontext() if cfg.verbose else _without_stderr():  # Ray's C++ would print each failed attempt
            ray.init(
                address=cfg.scaling.address,
                log_to_driver=cfg.verbose,
                include_dashboard=has_dashboard,
                runtime_env={"env_vars": waiting} if joins and waiting else None,
            )
    except Exception as error:  # Ray has no type for it: RuntimeError, TimeoutError, Exception itself
        if joins:
            raise RunFailed(f"the Ray cluster is there, and this machine can't join it: {reason(error)}") from None
        raise RunFailed(
            f"Ray has not started on this machine: {reason(error)}; if it is busy, set "
            f"{' and '.join(f'{name} ({os.environ[name]})' for name in START_PATIENCE)} to more seconds"
        ) from None
    if not cfg.verbose:
        from ray.data import DataContext

        DataContext.get_current().enable_progress_bars = False


@contextmanager
def importing(*modules: str) -> Iterator[None]:
    """Import modules in a thread beside the block: what goes wrong there will again where they are used."""

    def load() -> None:
        for module in modules:
            with suppress(Exception):
                importlib.import_module(module)

    thread = threading.Thread(target=load)
    thread.start()
    try:
        yield
    finally:
        thread.join()


@contextmanager
def undone_if_refused() -> Iterator[None]:
    """Leave no Ray behind that the block has begun, or joined, if it raises a UserError."""
    joined = "ray" in sys.modules and sys.modules["ray"].is_initialized()
    try:
        yield
    except UserError:
        if "ray" in sys.modules and not joined:  # else the block has not come so far: the import alone takes time
            sys.modules["ray"].shutdown()
        raise


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Leave out what this process writes to standard error, whoever writes it."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)


def _check_own_token(joins: bool) -> None:
    """Find a missing token: Ray would end this process with C++ stack traces.

    Args:
        joins: whether the cluster is there already; one that begins here makes itself a token.
    """
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token" or os.environ.get("RAY_AUTH_TOKEN"):
        return
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    try:
        token = Path(named or Path.home() / ".ray" / "auth_token").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        token = ""
    if not token and named:
        raise UserError(f"RAY_AUTH_TOKEN_PATH {named}: can't be read, or is empty")
    if not token and joins:
        raise UserError("RAY_AUTH_MODE is token, and there is none: set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH")


def _check_sockets() -> None:
    """Check that a cluster can begin here: the system allows a socket a short path only."""
    from ftray.compat.ray import socket_path

    path = socket_path()
    by = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    root = os.environ.get(by, "/tmp")
    if len(path.encode()) > LONGEST_SOCKET:
        raise UserError(
            f"{by} {root}: too long for Ray's sockets, by {len(path.encode()) - LONGEST_SOCKET} bytes: "
            "set RAY_TMPDIR to a shorter directory, as /tmp"
        )
    parse_location(root).check_writable(by)


def check_address(cfg: Config) -> None:
    """Check that the cluster to join answers: Ray's own attempt takes minutes and ends in a traceback.

    Raises:
        UserError: no cluster answers at the address, it refuses the token, or none can begin here.
    """
    from ray.exceptions import RpcError

    from ftray.compat.ray import bootstrap_address, takes_our_token

    given = cfg.scaling.address if cfg.scaling.address != "auto" else None
    if given:
        origin = "scaling.address"
    elif given := os.environ.get("RAY_ADDRESS"):
        origin = "RAY_ADDRESS"
    else:
        origin = "the last `ray start` here (`ray stop` forgets it)"
    if "://" in (given or ""):
        raise UserError(f"{origin}: host:port of a head is wanted; from outside its cluster: ray job submit")
    try:
        address = bootstrap_address(given or cfg.scaling.address)
    except (ConnectionError, ValueError) as error:
        raise UserError(f"{origin}: {error}") from None
    _check_own_token(joins=bool(address))
    if not address:
        _check_sockets()
        return
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + JOIN_PATIENCE
    while not _listens(socket.AF_INET6 if ":" in host else socket.AF_INET, (host.strip("[]"), int(port))):
        if time.monotonic() > deadline:
            raise UserError(f"no Ray cluster answers at {address}, the address of {origin}: is it up?")
        time.sleep(1)
    try:
        with nullcontext() if cfg.verbose else _without_stderr():
            allowed = takes_our_token(address, found_here=given is None)
    except RpcError:
        raise UserError(f"what answers at {address}, the address of {origin}, is no Ray head") from None
    if not allowed:
        if os.environ.get("RAY_AUTH_MODE", "").lower() == "token":
            raise UserError(f"the Ray cluster at {address} refuses the token of {_token_source()}: ask who runs it")
        raise UserError(f"the Ray cluster at {address} needs a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN")


def _token_source() -> str:
    """Where Ray takes the token from that it shows to a cluster."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN"
    return os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token"


@contextmanager
def ends_with_ray(command: str) -> Iterator[None]:
    """Watch the Ray processes that this one talks to; when one has died, end this process with one line.

    Ray's own calls would wait for the raylet forever (https://github.com/ray-project/ray/issues/20239), and without the
    head they end the process after a minute, with C++ stack traces. A process that ftray was called in from Python is
    not ended: the block is, and only the block is watched.

    Args:
        command: of ftray, for the message.

    Raises:
        RunFailed: of a call from Python, one has died.
    """
    import ray

    from ftray.compat.ray import raylet_socket

    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    watched: list[tuple[str, float, int, str | tuple[str, int]]] = [
        ("node", RAYLET_PATIENCE, socket.AF_UNIX, raylet_socket()),
        ("head", HEAD_PATIENCE, socket.AF_INET6 if ":" in host else socket.AF_INET, (host.strip("[]"), int(port))),
    ]
    called, over, gone = bool(PYTHON_CALL.get()), threading.Event(), list[str]()
    # SIGINT may be ignored, as by what a shell script has begun with `&`; only a main thread can have another one heard
    own = called and threading.current_thread() is threading.main_thread()
    number = signal.SIGUSR1 if own else signal.SIGINT
    before = signal.signal(number, signal.default_int_handler) if own else None

    def watch() -> None:
        seen = dict.fromkeys((name for name, *_ in watched), time.monotonic())
        while not over.wait(1) and ray.is_initialized():
            for name, patience, family, address in watched:
                if _listens(family, address):
                    seen[name] = time.monotonic()
                elif time.monotonic() - seen[name] > patience and ray.is_initialized():
                    line = f"Ray's {name} process is gone; the same command with --resume continues"
                    if called:
                        gone.append(line)
                        signal.pthread_kill(threading.main_thread().ident or 0, number)
                        return
                    sys.stdout.flush()
                    if (
                        threading.main_thread().is_alive()
                    ):  # else it has already said why it ends, and only waits for Ray
                        print(f"ftray {command}: {line}", file=sys.stderr, flush=True)
                    os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    except KeyboardInterrupt:
        if gone:
            raise RunFailed(gone[0]) from None
        raise
    finally:
        if called:
            over.set()
        if own:
            signal.signal(number, before)


def _listens(family: int, address: str | tuple[str, int]) -> bool:
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.settimeout(5)
        try:
            probe.connect(address)
        except OSError:
            return False
        return True


def gpus_per_worker(cfg: Config) -> float:
    """GPUs of each worker: as configured, else 1 if the cluster has any GPU."""
    import ray

    if cfg.scaling.gpus_per_worker is not None:
        return cfg.scaling.gpus_per_worker
    return 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0


def node_resources() -> list[dict[str, float]]:
    """The resources of each running node, by kind; kinds that it lacks are left out."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def workers_that_fit(cpus: float, gpus: float, nodes: list[dict[str, float]]) -> int:
    """Number of workers with `cpus` and `gpus` each that `nodes` can run at once; a worker lies on one node."""
    needed = {kind: amount for kind, amount in (("CPU", cpus), ("GPU", gpus)) if amount}
    return sum(int(min(node.get(kind, 0) // amount for kind, amount in needed.items())) for node in nodes)


def cpus_each(workers: int, gpus: float) -> int:
    """The most CPUs that each of `workers` can have, along with `gpus`, on the nodes that are running now."""
    nodes = node_resources()
    largest = int(max(node.get("CPU", 0) for node in nodes))
    return max((cpus for cpus in range(1, largest + 1) if workers_that_fit(cpus, gpus, nodes) >= workers), default=1)


def say_if_waiting(groups: int, each: dict[str, float]) -> None:
    """Say in one line what is waited for, if the cluster has no room for it within some seconds; Ray says nothing.

    Args:
        groups: how many workers, replicas or tasks begin together.
        each: the resources of each, by kind.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    needed = {kind: amount for kind, amount in each.items() if amount}
    if not needed:
        return
    room = placement_group([needed] * groups)
    found = room.wait(ROOM_PATIENCE)
    remove_placement_group(room)
    if not found:
        there, free = ray.cluster_resources(), ray.available_resources()
        wanted = " and ".join(f"{amount:g} {kind}" for kind, amount in needed.items())
        taken = " and ".join(f"{free.get(kind, 0):g} of {there.get(kind, 0):g} {kind}" for kind in needed)
        times = f"{groups} times " if groups > 1 else ""
        print(f"ftray waits for {times}{wanted}; free: {taken}", file=sys.stderr, flush=True)


def on_hardware(cfg: Config, function: Callable[..., Any], *args: object, max_retries: int = 3) -> "ray.ObjectRef":
    """Run `function` as a Ray task with all CPUs of a node, and a GPU if there is one.

    Args:
        max_retries: how often it is restarted if its process dies; 0: never, not even after running out of memory.
    """
    import ray

    needed = hardware(cfg)
    options = {"num_cpus": needed["CPU"], "num_gpus": needed["GPU"], "max_retries": max_retries}
    return ray.remote(function).options(**options).remote(*args)


def hardware(cfg: Config) -> dict[str, float]:
    """All CPUs of a node, and a GPU if there is one: what :func:`on_hardware` asks for."""
    gpus = min(1, gpus_per_worker(cfg))
    return {"CPU": cpus_each(1, gpus), "GPU": gpus}
