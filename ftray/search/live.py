"""What a running search shows of itself between two reports: small files in its output, for whoever looks on.

A pack writes how far its trials are, and what they answer; the driver, what it is about and how long it will take.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypedDict, cast

import psutil

from ftray.evaluation.answers import UNDESIRABLE
from ftray.search.results import LOSSES_SO_FAR, checkpoints, trial_name
from ftray.storage.location import Location

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from ftray.search.trial_worker import SearchContext
    from ftray.training.pack_trainer import PackedTrial

LIVE = "live"  # directory in the output
DRIVER = "driver.json"  # in it
EVERY, EVERY_STORED = 2.0, 15.0  # seconds between two writes, to a disk and to an object store
FRESH = 20.0  # seconds beyond that, after which a pack that has written nothing is taken not to train
SHARE = 0.3  # of the newest measurement in the speed that is shown
POINTS = 120  # of a curve: means over that many stretches
SEARCHING, CHOOSING, PROVING, MERGING, OVER = "searches", "compares finalists", "proves", "merges", "over"
PAUSED, ENDING = "paused", "ends: each trial reports what it has reached"  # a search, as its users have asked

Curve = list[tuple[float, float]]  # records seen and loss
Answers = Callable[["Mapping[str, PeftModel]", Mapping[str, int]], None]


class TrialBeat(TypedDict):
    """How far a trial is: `records` seen, and its training `curve`."""

    records: int
    curve: Curve


class Beat(TypedDict):
    """How far a pack is.

    Attributes:
        at: seconds since 1970.
        every: seconds until the next one.
        memory: bytes taken by the pack's first worker, by device: `cpu`, `gpu`.
        trials: by number.
    """

    at: float
    every: float
    tokens_per_second: float
    memory: dict[str, int]
    trials: dict[str, TrialBeat]


class DriverNote(TypedDict):
    """What the driver is about.

    Attributes:
        at: seconds since 1970.
        phase: one of those above.
        seen, left: records trained on, and to come.
        seconds_left: of training; None: it can't be told yet.
        states: of the trials that are not over, by number: a :class:`~ftray.search.trial_status.TrialStatus`.
    """

    at: float
    phase: str
    seen: int
    left: float
    seconds_left: float | None
    states: dict[str, str]


class SampledTrial(TypedDict):
    """What a trial answers to a few validation records: at each of its reports, `records` seen and its `texts`."""

    asked: list[dict[str, str]]
    answers: list[dict[str, Any]]


def interval(output: Location) -> float:
    """Seconds between two writes."""
    return EVERY if output.local_path else EVERY_STORED


class Heartbeat:
    """Writes, from the first worker of a pack, how far its trials are."""

    def __init__(self, output: Location, pack: int):
        self._file, self._every = output / LIVE / f"pack-{pack}.json", interval(output)
        self._tokens, self._seconds, self._speed, self._written = 0, 0.0, 0.0, -self._every
        self._process = psutil.Process()

    def step(self, trials: "Mapping[str, PackedTrial]", tokens: int, seconds: float) -> None:
        """Count a step of so many tokens and seconds; write, if it is time to."""
        self._tokens, self._seconds = self._tokens + tokens, self._seconds + seconds
        if time.monotonic() - self._written < self._every:
            return
        speed = self._tokens / max(self._seconds, 1e-9)
        self._speed = speed if not self._speed else self._speed + SHARE * (speed - self._speed)
        self._write(trials)

    def rest(self, trials: "Mapping[str, PackedTrial]") -> None:
        """Write that nothing trains for the time being."""
        self._speed = 0.0
        self._write(trials)

    def _write(self, trials: "Mapping[str, PackedTrial]") -> None:
        self._tokens, self._seconds = 0, 0.0
        beat: Beat = {
            "at": time.time(),
            "every": self._every,
            "tokens_per_second": self._speed,
            "memory": self._memory(),
            "trials": {name: _beat(trial) for name, trial in trials.items()},
        }
        with suppress(OSError):  # the search does without
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.write_text(json.dumps(beat))
        self._written = time.monotonic()

    def _memory(self) -> dict[str, int]:
        import torch

        taken = {"cpu": self._process.memory_info().rss}
        return taken | ({"gpu": torch.cuda.memory_allocated()} if torch.cuda.is_available() else {})


def _beat(trial: "PackedTrial") -> TrialBeat:
    history, batch = trial.history, trial.run.training.batch_size
    return {"records": history.step * batch, "curve": thinned(_curve(history.losses, history.step, batch))}


def _curve(losses: Sequence[float], steps: int, batch: int) -> Curve:
    """Of a trial of an older version, the first steps' losses are missing."""
    return [(step * batch, loss) for step, loss in enumerate(losses, steps - len(losses) + 1)]


def thinned(curve: Curve, points: int = POINTS) -> Curve:
    """At most so many points, each the mean loss of a stretch of steps, at its last step."""
    if len(curve) <= points:
        return curve
    ends = [round(len(curve) * (i + 1) / points) for i in range(points)]
    stretches = [curve[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    return [(own[-1][0], sum(loss for _, loss in own) / len(own)) for own in stretches]


def note(
    output: Location,
    phase: str,
    seen: int | None = None,
    left: float = 0.0,
    seconds_left: float | None = None,
    states: Mapping[int, str] | None = None,
) -> None:
    """Note what the driver is about; `seen` None: nothing is trained any more."""
    with suppress(OSError):  # the search does without
        if seen is None:
            seen = (read_json(output / LIVE / DRIVER) or {"seen": 0})["seen"]
        noted: DriverNote = {
            "at": time.time(),
            "phase": phase,
            "seen": cast("int", seen),
            "left": left,
            "seconds_left": seconds_left,
            "states": {str(number): state for number, state in (states or {}).items()},
        }
        (output / LIVE).mkdir(parents=True, exist_ok=True)
        (output / LIVE / DRIVER).write_text(json.dumps(noted))


def last_beats(output: Location) -> list[Beat]:
    """What each pack has written last."""
    known = [read_json(file) for file in sorted((output / LIVE).glob("pack-*.json"), key=str)]
    return [cast("Beat", beat) for beat in known if beat]


def fresh_beats(output: Location) -> list[Beat]:
    """Of the packs that are there now."""
    return [beat for beat in last_beats(output) if time.time() - beat["at"] < beat["every"] + FRESH]


def curves_so_far(output: Location, numbers: Sequence[int], experiment: Location) -> dict[int, Curve]:
    """The training loss of trials while a search runs: of their newest checkpoints, or newer still."""
    found: dict[int, Curve] = {}
    for number in numbers:
        if kept := checkpoints(experiment / trial_name(number)):
            report = kept[-1][0]
            losses = report.get(LOSSES_SO_FAR, [])
            found[number] = thinned(_curve(losses, report["step"], report["records"] // report["step"]))
    for beat in fresh_beats(output):
        newer = {int(name): [(x, y) for x, y in trial["curve"]] for name, trial in beat["trials"].items()}
        found |= {number: curve for number, curve in newer.items() if curve}
    return {number: curve for number, curve in found.items() if curve}


def sampling(context: "SearchContext", base: "PreTrainedModel", output: Location) -> Answers | None:
    """A function that keeps what trials answer to `ui.samples` validation records at their reports.

    It takes their models, and the records that they have seen. None: nobody looks on, or nothing is answered in words.
    """
    from ftray.models.load import load_tokenizer
    from ftray.models.sharding import is_sharded
    from ftray.multi_adapter.decoding import PackDecoder

    cfg, data = context.config, context.tokenized
    words = data.task.kind[0] == "CAUSAL_LM" and data.task.load().packed
    if not (cfg.ui.serve and cfg.ui.samples and words) or is_sharded(base):
        return None
    rows = [*map(data.task.load().as_shown, data.rows("validation", cfg.ui.samples))]
    tokenizer = load_tokenizer(context.model_path, cfg.model.trust_remote_code, cfg.data.chat_template)
    decoder = PackDecoder(base, tokenizer, cfg.evaluation)

    def answer(models: "Mapping[str, PeftModel]", records: Mapping[str, int]) -> None:
        for name, texts in decoder.answers(models, rows).items():
            file = output / LIVE / f"trial-{name}.json"
            known = read_json(file) or {
                "asked": [{k: row[k] for k in ("prompt", "target", UNDESIRABLE) if k in row} for row in rows],
                "answers": [],
            }
            before = [own for own in known["answers"] if own["records"] < records[name]]
            known["answers"] = [*before, {"records": records[name], "texts": texts}]
            file.write_text(json.dumps(known))

    return answer


def sampled(output: Location, number: int) -> SampledTrial | None:
    """What a trial has answered so far; None: nothing was kept of it."""
    return cast("SampledTrial | None", read_json(output / LIVE / f"trial-{number}.json"))


def read_json(file: Location) -> dict[str, Any] | None:
    """What a file of a running search holds; None: there is none."""
    if not file.exists():
        return None
    found: dict[str, Any] = json.loads(file.read_text())
    return found
