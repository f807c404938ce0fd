"""Private names of Ray's core; seen in Ray 2.60.0."""

import os
from datetime import datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData


def bootstrap_address(address: str | None) -> str | None:
    """Where `ray.init(address)` would look for a head, host:port; None: it would start a cluster of its own.

    Without asking: `ray.init` itself tries for minutes, and ends in a traceback.

    Raises:
        ConnectionError, ValueError: it is no address, or "auto" finds none.
    """
    from ray._private.services import canonicalize_bootstrap_address

    found: str | None = canonicalize_bootstrap_address(address)
    return found


def takes_our_token(address: str, found_here: bool) -> bool:
    """Whether the head at `address` lets this process in, with the token that it would show or without any.

    `ray.init` would try for half a minute, and end in a traceback that has the reason in its text alone.

    Args:
        address: host:port of a head that listens.
        found_here: Ray found it on this machine; then it shows the token in `~/.ray/auth_token` unasked.

    Raises:
        RpcError: what listens there is no head; it takes 40 seconds to say so.
    """
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # of a C extension
    from ray.exceptions import AuthenticationError

    if found_here:
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    try:
        GcsClient(address=address)
    except AuthenticationError:
        return False
    return True


def socket_path() -> str:
    """The longest path that a cluster begun by this process would give a socket."""
    from ray._common.utils import get_default_ray_temp_dir

    session = f"session_{datetime.now():%Y-%m-%d_%H-%M-%S_%f}_{os.getpid()}"
    return f"{get_default_ray_temp_dir()}/{session}/sockets/plasma_store"


def raylet_socket() -> str:
    """The path of the socket at which this node's raylet answers: the runtime context doesn't say."""
    from ray._private import worker

    name: str = worker._global_node.raylet_socket_name
    return name.removeprefix("unix:")


def placement_groups() -> "list[PlacementGroupTableData]":
    """Ray's record of each placement group of the cluster.

    `ray.util.placement_group_table` leaves out who made a group, and whether that actor is dead.
    """
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData

    table = state._connect_and_get_accessor().get_placement_group_table()
    return [PlacementGroupTableData.FromString(entry) for entry in table]


def is_removed(group: "PlacementGroupTableData") -> bool:
    """Whether a record of :func:`placement_groups` is of one that is given back already."""
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData

    return bool(group.state == PlacementGroupTableData.REMOVED)


def serve_runs() -> bool:
    """Whether Ray Serve is up on this cluster, with or without an application: `serve.status` would start it."""
    from ray.serve.context import _get_global_client

    return _get_global_client(raise_if_no_controller_running=False) is not None
