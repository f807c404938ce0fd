"""Whether records that an adapter is to be judged by are among those that its run trained on, or chose it by."""

from collections.abc import Iterable
from pathlib import Path

import yaml

from ftray.config import DataConfig
from ftray.errors import UserError
from ftray.search.run_manifest import CONFIG
from ftray.storage.location import Location, parse_location
from ftray.storage.manifest import refuse_damaged

CONTENT = ("seed", "group", "fields", "delimiter", "encoding")  # what a record's place in the split is a hash of
SHARES = ("test_fraction", "validation_fraction", "test", "validation")  # which places are in which split
TIE = 1e-12  # that sums of shares are off by


def run_of(adapter: Path) -> Location | None:
    """The output that an adapter lies in: OUT/adapter, OUT/best/adapter, OUT/tune/trial-0/checkpoint_0/adapter."""
    for parent in list(adapter.resolve().parents)[:4]:
        if (parent / CONFIG).is_file():
            with refuse_damaged(parse_location(parent / CONFIG)):
                written = yaml.safe_load((parent / CONFIG).read_text(encoding="utf-8"))
            if isinstance(written, dict) and {"model", "data", "training"} <= written.keys():  # not of another program
                return parse_location(parent)
    return None


def trained_by(adapter: Path) -> DataConfig | None:
    """The data section of the run that made an adapter, or a merged model; None: it lies in no output.

    Raises:
        UserError: what the output says of it is damaged.
    """
    if (run := run_of(adapter)) is None:
        return None
    with refuse_damaged(run / CONFIG):
        known = yaml.safe_load((run / CONFIG).read_text())["data"]
        return DataConfig.model_validate({name: known[name] for name in DataConfig.model_fields if name in known})


def split_as_trained(data: DataConfig, trained: DataConfig | None) -> DataConfig:
    """`data` split as for training in what it doesn't say itself, where it names a source of the run's."""
    if trained is None or not (common := _common(_by_name(data), trained)):
        return data
    kept = _by_name(trained)[common[0]] if len(_by_name(data)) == 1 else trained
    unsaid = [name for name in (*CONTENT, *SHARES) if name not in data.model_fields_set]
    return data.model_copy(update={name: getattr(kept, name) for name in unsaid})


def said_of_split(given: DataConfig, taken: DataConfig) -> str:
    """The settings that :func:`split_as_trained` has changed, with their values; empty: none."""
    changed = [name for name in (*CONTENT, *SHARES) if getattr(given, name) != getattr(taken, name)]
    return ", ".join(f"data.{name} {getattr(taken, name)}" for name in changed)


def refuse_seen(data: DataConfig, split: str, trained: DataConfig | None, what: str) -> None:
    """Refuse a validation or test split that holds records of the run's training, by the hash of their content.

    Args:
        split: any other is what its name says.
        trained: the data section of the run; None: nothing is known of it.
        what: was trained, for the message.

    Raises:
        UserError: it holds some, or, of the test split, some by which the adapter was chosen.
    """
    if trained is None or split not in ("validation", "test"):
        return
    if given := getattr(data, split):
        if same := _common([given] if isinstance(given, str) else given, trained):
            raise UserError(f"data.{split} {same[0]}: {what} was trained on it: give other records")
        return
    for name, own in _by_name(data).items():
        for common in _common([name], trained):
            _refuse_part(own, split, common, _by_name(trained)[common], what)


def _refuse_part(own: DataConfig, split: str, name: str, run: DataConfig, what: str) -> None:
    """As :func:`refuse_seen`, of one source."""
    (first, second), (tested, validated) = _shares(own), _shares(run)
    end, held_out = (first, tested) if split == "test" else (first + second, tested + validated)
    moved = [field for field in CONTENT if getattr(own, field) != getattr(run, field)]
    if not end or (not moved and end <= held_out + TIE):
        return
    field = [*moved, *(field for field in SHARES if getattr(own, field) != getattr(run, field))][0]
    seen = "trained on" if moved or end > tested + validated + TIE else "chosen by"
    raise UserError(
        f"data.{field} {getattr(own, field)}: {what} was trained with {getattr(run, field)}, so that the {split} split "
        f"of {name} would hold records that it was {seen}: take that, or other records"
    )


def _shares(data: DataConfig) -> tuple[float, float]:
    """Of a source's records, those that are cut off for test and for validation."""
    return 0.0 if data.test else data.test_fraction, 0.0 if data.validation else data.validation_fraction


def _by_name(data: DataConfig) -> dict[str, DataConfig]:
    """How each source is read."""
    return (
        data.parts
        if data.sources
        else dict.fromkeys([data.source] if isinstance(data.source, str) else data.source, data)
    )


def _common(sources: Iterable[str], trained: DataConfig) -> list[str]:
    """Sources of the run that are among these, as the run calls them."""
    places = {*map(_place, sources)}
    return [name for name in _by_name(trained) if _place(name) in places]


def _place(source: str) -> str:
    return str(Path(source).resolve()) if "://" not in source and Path(source).exists() else source
