"""What came out, in one sentence that needs no knowledge of the field."""

import math
from collections.abc import Sequence

from ftray.reports.comparison import Compared, evaluation_rows, proof_rows
from ftray.reports.run_files import RunFiles, SearchFiles
from ftray.reports.svg import short
from ftray.reports.words import SAME, SHARES, counted, metric_name, percent
from ftray.search.goals import is_tie


def headline(run: RunFiles) -> str:
    """Of a search what won and by how much; of a training run or an evaluation, what it gave."""
    if run.search:
        return _of_search(run, run.search)
    if run.training:
        return _of_training(run)
    return _of_evaluation(run)


def _of_search(run: RunFiles, search: SearchFiles) -> str:
    if search.seconds is None:
        return f"The search is not over: {len(search.rows)} trials have begun."
    best = next((row for row in search.rows if row["trial"] == search.best), None)
    if best is None:
        return f"None of {len(search.rows)} trials gave a result that may be the best."
    method = best["config"]["adapter"]["method"]
    won = f"The winner of {len(search.rows)} trials is trial {best['trial']}, method {method}"
    alike = [row for row in search.rows if row["status"] != "failed" and is_tie(row, best)]
    if len(alike) > 1 and (search.finalists or {}).get("winner") != best["trial"]:
        won = (
            f"{len(alike)} of {len(search.rows)} trials are equally good, none of which is the winner; trial "
            f"{best['trial']}, method {method}, is the first of them"
        )
    if not (rows := proof_rows(run)):
        value, name = short(best["value"] or math.nan), metric_name(search.goals[0].metric)
        return f"{won}: its {name} is {value}; there was no proof on test records."
    first = counted_row(rows, search.goals[0].metric)
    records = search.proof["records"] if search.proof else 0
    return f"{won}: on {counted(records, 'record')} that no trial had seen, {_gain(first, rows)}{_over_default(first)}."


def counted_row(rows: Sequence[Compared], metric: str) -> Compared:
    """The row of the search's goal; of a goal that the proof has not, that of the loss."""
    plain = metric.removeprefix("validation_")
    return next((row for row in rows if row.metric == plain), rows[0])


def _gain(row: Compared, rows: Sequence[Compared]) -> str:
    """What the best does that the base doesn't: the share of right answers first, where that has changed."""
    over_base = row.differences["best"][0]
    if not over_base.shown:
        before, after = (short(row.values[name]) for name in ("base", "best"))
        why = "" if over_base.interval else f"; {over_base.said}"
        return f"no difference to the base model is shown ({row.name} {after} against {before}{why})"
    right = next((other for other in rows if other.metric in SHARES and not other.of), None)
    said = [_change(right)] if right and right is not row and right.differences["best"][0].shown else []
    sure = over_base.said
    if over_base.interval:
        low, high = sorted(map(abs, over_base.interval))
        sure = f"95\u00a0% certain: by {_points(row, low)} to {_points(row, high)}"
    return f"it {' and '.join([*said, _change(row)])} ({sure})"


def _change(row: Compared) -> str:
    before, after = row.values["base"], row.values["best"]
    if row.metric in SHARES:
        return f"answers {_points(row, after)} right instead of the base model's {_points(row, before)}"
    share = f" by {percent(abs(after - before) / abs(before))}" if before else ""
    good = "" if (after < before) is row.less else ", which is worse,"
    return (
        f"{'cuts' if after < before else 'raises'} the {row.name}{share}{good} from {short(before)} to {short(after)}"
    )


def _points(row: Compared, value: float) -> str:
    return percent(value) if row.metric in SHARES else short(value)


def _over_default(row: Compared) -> str:
    known = [difference for difference in row.differences["best"] if difference.over == "default"]
    if not known:
        return ""
    if known[0].said == SAME:
        return ". It is the default configuration: no other was better"
    said = {"better": "It also beats", "worse": "It is worse than", "no difference shown": "No difference is shown to"}
    return f". {said[row.verdict(known[0])]} the default configuration, which has {short(row.values['default'])}"


def _of_training(run: RunFiles) -> str:
    trained = run.training or {}
    metric, reports = trained["metric"], [report for report in trained["reports"] if trained["metric"] in report]
    method = run.cfg.adapter.method if run.cfg else ""
    if not reports:
        return f"An adapter of method {method} was trained; no validation of it is left."
    values = [report[metric] for report in reports]
    best = min(values) if trained["direction"] == "min" else max(values)
    records = reports[values.index(best)]["records"]
    since = f", after {short(values[0])} at its first validation" if values[0] != best else ""
    return (
        f"An adapter of method {method} was trained: its best {metric_name(metric)} is {short(best)}, "
        f"at {records:,} records{since}."
    )


def _of_evaluation(run: RunFiles) -> str:
    known = run.evaluation or {}
    rows = evaluation_rows(run)
    where = f"On {counted(known['records'], 'record')} of the {known['split']} split"
    if not known["adapters"]:
        said = ", ".join(f"{row.name} {short(row.values['base'])}" for row in rows[:3])
        return f"{where}, the base model has {said}."
    row = rows[0]
    sign = 1 if row.less else -1
    name = min(row.differences, key=lambda adapter: sign * row.values[adapter])
    verdict = row.verdict(row.differences[name][0])
    shown = {"better": "better than the base model", "worse": "worse than the base model"}.get(verdict, verdict)
    why = "" if row.differences[name][0].interval else f" ({row.differences[name][0].said})"
    return (
        f"{where}, {name} has the best {metric_name(row.metric)} of {len(known['adapters'])} adapter(s), "
        f"{short(row.values[name])} against {short(row.values['base'])} of the base model: {shown}{why}."
    )
