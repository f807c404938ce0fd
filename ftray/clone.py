"""Let a search train a new trial from the weights that one of its trials has reached, with other settings."""

import sys
from typing import TYPE_CHECKING, Any

from ftray.arguments import Settings, StrPath, command, config_of
from ftray.cli import run_command
from ftray.config import AdapterConfig, Config, config_from
from ftray.errors import UserError
from ftray.storage.location import Location

if TYPE_CHECKING:
    from ftray.models.load import LoadedModel
    from ftray.search.control import NewTrial


@command
def clone(
    trial: int | None = None,
    run: StrPath | None = None,
    *,
    training: Settings | None = None,
    adapter: Settings | None = None,
    scaling: Settings | None = None,
    config: Config | StrPath | Settings | None = None,
    verbose: bool | None = None,
) -> "NewTrial":
    """Let a search train a new trial from the weights that one of its trials has reached, with other settings.

    Args:
        trial: number of the one whose weights it gets.
        run: output directory or URI, or the id of the Ray job that drives the search.
        training, adapter: what is other than in that trial.

    Raises:
        UserError: no trial is named, it has no checkpoint yet, or its weights don't fit the settings.
    """
    return _clone(config_of("clone", locals()))


def _clone(cfg: Config) -> "NewTrial":
    from ftray.adapters.compatibility import dry_run
    from ftray.models.find import find
    from ftray.models.load import load_skeleton
    from ftray.reports.status import searched
    from ftray.search.clones import CLONE, keep_weights
    from ftray.search.control import NewTrial, ask_to_add, when_it_begins
    from ftray.search.jobs import output_of
    from ftray.search.results import JOURNAL
    from ftray.search.run_manifest import SPACE
    from ftray.search.space import load_space
    from ftray.task_spec import TaskSpec

    number = cfg.request.trial
    if number is None:
        raise UserError("which trial? ftray status shows their numbers")
    output = output_of(cfg)
    of = searched(output)
    own = configuration_of(output, number)
    changed = {
        "adapter": own["adapter"] | cfg.adapter.model_dump(exclude_unset=True),
        "training": own["training"] | cfg.training.model_dump(exclude_unset=True),
    }
    if changed["adapter"]["method"] != own["adapter"]["method"]:  # whose parameters the others are not
        raise _no_fit(number, "method", own["adapter"], changed["adapter"])
    settings = config_from({"training": of.training.model_dump() | changed["training"]}).training
    if settings.zero_stage == 3:
        raise UserError("training.zero_stage 3: a trial can't begin with the weights of another: take 0, 1 or 2")
    TaskSpec.named(of.task).load().objective(settings)  # it refuses the settings of others
    skeleton = load_skeleton(of.model, find(of.model.name), TaskSpec.named(of.task))
    dry_run(AdapterConfig(**changed["adapter"]), skeleton, of.model, settings)
    refuse_other_weights(number, own["adapter"], changed["adapter"], skeleton)
    kept = keep_weights(output, number)
    added = ask_to_add(output / JOURNAL, of, load_space(str(output / SPACE)), {**changed, CLONE: kept})
    return NewTrial(added, when_it_begins(added, of, output), kept["checkpoint"])


def run(cfg: Config) -> int:
    """The command.

    Raises:
        UserError: no trial is named, it has no checkpoint yet, or its weights don't fit the settings.
    """
    new = clone(config=cfg)
    print(f"trial {new.number} has the weights of trial {cfg.request.trial}, {new.checkpoint}")
    print(new.begins)
    return 0


def configuration_of(output: Location, number: int) -> dict[str, Any]:
    """The configuration of a trial of the search in `output`.

    Raises:
        UserError: there is no such trial, or it has not begun.
    """
    from ftray.search.journal import past_trials
    from ftray.search.results import JOURNAL

    if not (output / JOURNAL).exists():
        raise UserError(f"output {output}: the search has not come to its first trial yet")
    found = [trial for trial in past_trials(output / JOURNAL) if trial.number == number]
    if not found:
        raise UserError(f"trial {number}: the search has none of that number")
    configuration: dict[str, Any] | None = found[0].user_attrs.get("config")
    if configuration is None:
        raise UserError(f"trial {number}: it has not begun")
    return configuration


def refuse_other_weights(number: int, own: dict[str, Any], changed: dict[str, Any], skeleton: "LoadedModel") -> None:
    """Refuse settings with which an adapter has other weights than the trial's, or makes something else of them.

    Raises:
        UserError: names the first of them.
    """
    from ftray.adapters.compatibility import trained_shapes

    before = trained_shapes(AdapterConfig(**own), skeleton)
    for name in (name for name in changed if changed[name] != own.get(name)):
        if name == "init" or trained_shapes(AdapterConfig(**own | {name: changed[name]}), skeleton) != before:
            raise _no_fit(number, name, own, changed)


def _no_fit(number: int, name: str, own: dict[str, Any], changed: dict[str, Any]) -> UserError:
    return UserError(
        f"adapter.{name} {changed[name]}: the weights of trial {number} are of {own.get(name, 'its default')}, "
        "and fit no other; ftray add begins a trial anew"
    )


if __name__ == "__main__":
    sys.exit(run_command("clone"))
