"""Finalists: those that train on after the last cut are trained with further seeds too, and the better one wins."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, TypedDict

import optuna
from optuna.trial import FrozenTrial

from ftray.config import AdapterConfig, Config
from ftray.evaluation.intervals import as_told, said
from ftray.search.journal import SEED_OF, STUDY, open_journal, past_trials
from ftray.search.results import TrialRow
from ftray.search.trial_status import TrialStatus
from ftray.search.trial_worker import reported
from ftray.storage.location import Location, parse_location

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from ftray.models.load import LoadedModel
    from ftray.search.trial_worker import SearchContext

FINALISTS = "finalists"  # user attribute of the study: `of` so many trials, the numbers of `trials`


class FinalRuns(TypedDict):
    """A finalist, and where the adapters of its runs are.

    Attributes:
        trial: its number.
        adapter: the section of its configuration.
        runs: the checkpoint of each by its seed, counted from the trial's own, which is 0.
    """

    trial: int
    adapter: dict[str, Any]
    runs: dict[int, str]


def further_runs(
    finalists: Iterable[int], known: Sequence[FrozenTrial], cfg: Config
) -> list[tuple[int, dict[str, Any]]]:
    """The runs of finalists that are not in the journal yet: number of the finalist, and configuration.

    The second run of each comes before the third of any.

    Args:
        known: all trials of the journal, by number.
    """
    begun = {
        (trial.user_attrs[SEED_OF], seed_of(trial.user_attrs["config"], cfg))
        for trial in known
        if SEED_OF in trial.user_attrs
    }
    found = []
    for further in range(1, cfg.search.further_seeds + 1):
        for number in finalists:
            configuration = known[number].user_attrs["config"]
            seed = seed_of(configuration, cfg) + further
            if (number, seed) not in begun:
                training = configuration["training"] | {"seed": seed}
                found.append((number, configuration | {"training": training}))
    return found


def runs_left(journal: Location, cfg: Config) -> bool:
    """Whether further runs of the finalists that a search has decided on have not ended."""
    known = past_trials(journal)
    if any(SEED_OF in trial.user_attrs and not trial.state.is_finished() for trial in known):
        return True
    kept = optuna.load_study(study_name=STUDY, storage=open_journal(journal)).user_attrs.get(FINALISTS)
    return kept is not None and bool(further_runs(kept["trials"], known, cfg))


def seed_of(configuration: dict[str, Any], cfg: Config) -> int:
    """The seed of a configuration's training: of initialisation, data order and dropout."""
    seed: int = configuration["training"].get("seed", cfg.training.seed)
    return seed


def final_runs(rows: list[TrialRow], further: list[TrialRow], cfg: Config) -> list[FinalRuns]:
    """The candidates of the final choice, the best by their own runs first; none if there is no choice to make.

    They are the trials of which further runs were made, and the best of all where that is another one.

    Args:
        rows: the trials, best first.
        further: the further runs.
    """

    def ended(row: TrialRow) -> bool:
        return row["status"] is TrialStatus.FINISHED and row["checkpoint"] is not None

    finals = {run["seed_of"] for run in further if ended(run)}
    candidates = [row for place, row in enumerate(rows) if ended(row) and (row["trial"] in finals or place == 0)]
    found: list[FinalRuns] = []
    for row in candidates:
        own, first = [row, *(run for run in further if run["seed_of"] == row["trial"])], seed_of(row["config"], cfg)
        runs = {seed_of(run["config"], cfg) - first: str(run["checkpoint"]) for run in own if ended(run)}
        found.append({"trial": row["trial"], "adapter": row["config"]["adapter"], "runs": runs})
    return found if finals and len(found) > 1 else []


def choose_finalist(
    context: "SearchContext", candidates: list[FinalRuns], base: "LoadedModel | None" = None
) -> dict[str, Any]:
    """Score all runs of the candidates on the validation records, and choose; runs where the hardware is.

    Args:
        base: the model, where it is in memory; it stays as it is.

    Returns:
        `winner` and `best` by number, see :class:`ftray.evaluation.finalists.Choice`; `differences`; and of the
        `candidates` their `trial`, `parameters` and `values` by seed.
    """
    from ftray.evaluation.finalists import Candidate, choose
    from ftray.models.load import load_on_device, load_tokenizer

    if context.config.search.goal.metric in reported(context.tokenized.task):
        context = without_answers(context)
    cfg = context.config
    metric = cfg.search.goal.metric.removeprefix("validation_")
    data = context.tokenized
    base = base or load_on_device(cfg.model, context.model_path, data.task)
    tokenizer = load_tokenizer(context.model_path, cfg.model.trust_remote_code, cfg.data.chat_template)
    rows = data.rows("validation", cfg.training.validation_records)
    rows = data.task.load().compared_with(untrained(context, base.model), rows, cfg.evaluation)
    scored = []
    for candidate in candidates:
        scores = {
            seed: context.score(adapted(base.model, parse_location(checkpoint) / "adapter"), tokenizer, rows)
            for seed, checkpoint in candidate["runs"].items()
        }
        parameters = trained_parameters(base, AdapterConfig(**candidate["adapter"]))
        scored.append(Candidate(candidate["trial"], parameters, scores))
    choice = choose(scored, metric, cfg.search.goal.direction, cfg.evaluation.bootstrap)
    values = {c.trial: {seed: own.values()[metric] for seed, own in c.scores.items()} for c in scored}
    return {
        "records": len(rows),
        "winner": choice.winner,
        "best": choice.best,
        "differences": [asdict(difference) for difference in choice.differences],
        "candidates": [{"trial": c.trial, "parameters": c.parameters, "values": values[c.trial]} for c in scored],
    }


def without_answers(context: "SearchContext") -> "SearchContext":
    """The same search, which generates nothing to be scored."""
    evaluation = context.config.evaluation.model_copy(update={"generate": False})
    return replace(context, config=context.config.model_copy(update={"evaluation": evaluation}))


def adapted(base: "PreTrainedModel", adapter: Location) -> "PeftModel":
    """A model with an adapter, which shares the weights of `base`."""
    from peft import PeftModel

    from ftray.multi_adapter.shared_model import share

    with adapter.as_local_dir() as directory:
        return PeftModel.from_pretrained(share(base), str(directory)).eval()


def untrained(context: "SearchContext", base: "PreTrainedModel") -> "PreTrainedModel | PeftModel":
    """What trials begin with: the base, or the base with the adapter that is kept."""
    return adapted(base, parse_location(context.start)) if context.start else base


def trained_parameters(base: "LoadedModel", adapter: AdapterConfig) -> int:
    """How many parameters a configuration trains.

    Not how many are stored: some initialisations change the base, and are stored with the change.
    """
    from ftray.adapters.compatibility import without_weights
    from ftray.adapters.methods import attach
    from ftray.multi_adapter.shared_model import share, trainable

    model = attach(replace(base, model=share(base.model)), without_weights(adapter), 100, 0)
    return sum(parameter.numel() for parameter in trainable(model))


def verdict(choice: dict[str, Any], metric: str) -> list[str]:
    """What the log says of a choice: a line for each comparison, and who won."""
    parameters = {c["trial"]: c["parameters"] for c in choice["candidates"]}
    lines, count = [], choice["records"]
    differences = [as_told(d, count, len(choice["differences"])) for d in choice["differences"]]
    for d in differences:
        interval = f"95 % interval of trial {d['other']} - trial {d['best']} " if d["interval"] else ""
        lines.append(
            f"finalists {d['best']} and {d['other']}: {metric} differs by {abs(d['difference']):.4g} over "
            f"{count} validation record(s) and {len(d['seeds'])} seed(s), {interval}{said(d)}"
            + ("" if d["shown"] else ": no difference shown")
        )
    winner = choice["winner"]
    why = "the smaller one of those that show no difference"
    if all(d["shown"] for d in differences):
        why = "the better one"
    elif winner == choice["best"] and not any(d["interval"] or d["difference"] == 0 for d in differences):
        why = "the better one on these records, which are too few to show it"
    return [*lines, f"trial {winner} wins: {why}, {parameters[winner]:,} trained parameters"]
