"""Let a search try a configuration of the user's next."""

import sys
from typing import TYPE_CHECKING, Any

from ftray.arguments import Settings, StrPath, command, config_of
from ftray.cli import run_command
from ftray.config import AdapterConfig, Config, config_from, parse_yaml
from ftray.errors import UserError

if TYPE_CHECKING:
    from ftray.search.control import NewTrial


@command
def add(
    configuration: str | Settings | None = None,
    run: StrPath | None = None,
    *,
    scaling: Settings | None = None,
    config: Config | StrPath | Settings | None = None,
    verbose: bool | None = None,
) -> "NewTrial":
    """Let a search try a configuration of yours next.

    Args:
        configuration: `adapter` and `training`, as `summary.json` has them: a mapping, or YAML.
        run: output directory or URI, or the id of the Ray job that drives the search.

    Raises:
        UserError: the configuration can't be read, or could not be trained; the search has not begun.
    """
    return _add(config_of("add", locals()))


def _add(cfg: Config) -> "NewTrial":
    from ftray.adapters.compatibility import dry_run
    from ftray.models.find import find
    from ftray.models.load import load_skeleton
    from ftray.reports.status import searched
    from ftray.search.control import NewTrial, ask_to_add, when_it_begins
    from ftray.search.jobs import output_of
    from ftray.search.results import JOURNAL
    from ftray.search.run_manifest import SPACE
    from ftray.search.space import load_space
    from ftray.search.starting_point import refuse_added
    from ftray.task_spec import TaskSpec

    configuration, output = parsed(cfg.request.configuration), output_of(cfg)
    of = searched(output)
    if not (output / JOURNAL).exists():
        raise UserError(f"output {output}: the search has not come to its first trial yet")
    settings = config_from({"training": of.training.model_dump() | configuration["training"]}).training
    TaskSpec.named(of.task).load().objective(settings)  # it refuses the settings of others
    skeleton = load_skeleton(of.model, find(of.model.name), TaskSpec.named(of.task))
    dry_run(AdapterConfig(**configuration["adapter"]), skeleton, of.model, settings)
    space = load_space(str(output / SPACE))
    refuse_added(of, space, configuration["adapter"])
    number = ask_to_add(output / JOURNAL, of, space, configuration)
    return NewTrial(number, when_it_begins(number, of, output))


def run(cfg: Config) -> int:
    """The command.

    Raises:
        UserError: the configuration can't be read, or could not be trained; the search has not begun.
    """
    print(add(config=cfg).begins)
    return 0


def parsed(text: str | None) -> dict[str, Any]:
    """`adapter` and `training`, as far as they are given.

    Raises:
        UserError: it is something else.
    """
    from ftray.adapters.methods import parameters

    example = "{adapter: {method: lora, rank: 64}, training: {learning_rate: 0.001}}"
    if not text:
        raise UserError(f"which configuration? For example '{example}'")
    try:
        given = parse_yaml(text, "configuration")
    except UserError:
        given = None
    if not isinstance(given, dict) or not given.get("adapter") or given.keys() - {"adapter", "training"}:
        raise UserError(f"not a configuration: {text[:80]!r}; it looks like {example}")
    parameters(config_from(given).adapter)
    return {"adapter": given["adapter"], "training": given.get("training") or {}}


if __name__ == "__main__":
    sys.exit(run_command("add"))
