"""From what `--run` names to the output of a search: a directory, a URI, or the id of the Ray job that drives it."""

import os
import re
from pathlib import Path

from ftray.config import Config
from ftray.errors import UserError
from ftray.storage.location import Location, parse_location, reason

SAYS = "output   "  # how the driver's log names its output


def announce(output: Location) -> None:
    """Print the output of the search in the job's log, where :func:`output_of` finds it."""
    print(f"{SAYS}{output.absolute()}", flush=True)


def output_of(cfg: Config) -> Location:
    """The output that `--run` names.

    A job is looked up at `scaling.address`, else where Ray's own commands do (`RAY_API_SERVER_ADDRESS`, `RAY_ADDRESS`).

    Raises:
        UserError: there is no such job, its search has not begun, or this machine does not see its output.
    """
    name = cfg.output
    known = cfg.scaling.address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    is_job = re.fullmatch(r"raysubmit_\w+", name) or (known and re.fullmatch(r"[\w-]+", name))
    if not is_job or Path(name).exists():
        return parse_location(name)
    log = _log(name, cfg.scaling.address)
    found = re.search(rf"^{SAYS}(.+)$", log, re.MULTILINE)
    if not found:
        raise UserError(f"job {name}: its search has not begun yet, or it is another program's")
    output = parse_location(found[1])
    try:
        seen = output.exists()
    except OSError as error:  # of an object store
        raise UserError(f"job {name}: its output {output} can't be read ({reason(error)})") from None
    if not seen:
        raise UserError(f"job {name}: its output {output} is not on this machine: ask on one that sees it")
    return output


def _log(job: str, address: str | None) -> str:
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        client = JobSubmissionClient(address)
        if not any(job in (known.submission_id, known.job_id) for known in client.list_jobs()):
            raise UserError(f"job {job}: no job of that id (ray job list)")
        log: str = client.get_job_logs(job)
    except AuthenticationError:
        raise UserError(
            f"job {job}: the cluster refuses the token, or there is none: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
        ) from None
    except (RuntimeError, ConnectionError, ValueError) as error:
        why = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"job {job}: {why}") from None
    return log
