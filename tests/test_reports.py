"""`report.html`: what it shows is what the output holds, in a real browser; what an output lacks, it says."""

import base64
import json
import os
import re
import shlex
import shutil
import struct
import sys
import tarfile
from collections import Counter
from itertools import pairwise
from pathlib import Path

import optuna
import pyarrow.parquet as pq
import pytest
import yaml
from helpers.browser import opened
from helpers.results import HOSTILE, METRIC, RUNGS, TOKENS, write_search
from helpers.searches import command, run_here, study
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select

from ftray.cli import main, parse
from ftray.config import config_from
from ftray.reports.headline import headline
from ftray.reports.page import leave_report
from ftray.reports.run_files import read_run, thinned
from ftray.reports.samples import differences, samples
from ftray.reports.svg import Scale, element, short
from ftray.storage.location import parse_location

PRICE = 7.5
FIRST_LAYOUT = Path(__file__).parent / "fixtures" / "run_of_the_first_layout.tar.gz"


@pytest.fixture(scope="module")
def search(tmp_path_factory):
    """A report of 64 trials and one goal; its folder and the summary that it was made of."""
    output = tmp_path_factory.mktemp("reports") / "big & <b>bold</b>"
    summary = write_search(output)
    assert main(["report", "--run", str(output), "--png", "--scaling.price_per_hour", str(PRICE)]) == 0
    return output, summary


@pytest.fixture(scope="module")
def front(tmp_path_factory):
    """The same for two goals."""
    output = tmp_path_factory.mktemp("reports") / "front"
    summary = write_search(output, goals=f"{METRIC},adapter_bytes", seed=1)
    assert main(["report", "--run", str(output)]) == 0
    return output, summary


def marks(browser, figure):
    return browser.find_elements(By.CSS_SELECTOR, f"#fig-{figure} .mark")


def cells(browser, table):
    """The text of a table's rows, also where it is scrolled out of sight."""
    rows = browser.find_elements(By.CSS_SELECTOR, f"#{table} tbody tr")
    return [[td.get_attribute("textContent") for td in row.find_elements(By.TAG_NAME, "td")] for row in rows]


def reported(summary):
    return [row for row in summary["trials"] if row["curve"]]


def bars_of_importances(output):
    """Groups of the figure: settings that all trials have; then those of each method that has eight trials."""
    trials = [t for t in study(output).get_trials() if t.params and t.user_attrs["reports"]]
    by_method = Counter(t.params["method"] for t in trials)
    groups = [{"method", "learning_rate"}]
    for method in (name for name, count in by_method.items() if count >= 8):
        own = {name for t in trials if t.params["method"] == method for name in t.params} - {"method"}
        groups += [own] if len(own) > 1 else []  # of one setting, all that is explained is its own
    return sum(map(len, groups))


def test_every_figure_has_a_mark_for_each_thing_that_it_is_about(search, tmp_path):
    output, summary = search
    trials = summary["trials"]
    curves = pq.read_table(output / "curves.parquet").to_pydict()
    methods = {row["config"]["adapter"]["method"] for row in trials}
    wanted = {
        "proof": len(summary["proof"]["metrics"]) * 4,  # base, default, best and the interval of best - base
        "curves": len(set(curves["trial"])),
        "validation": sum(METRIC in point for row in trials for point in row["curve"]),
        "importances": bars_of_importances(output),
        "rates": len(reported(summary)),
        "parallel": len(reported(summary)),
        "spend": len(RUNGS) + len(methods),
        "lengths": 3,
    }
    assert len(reported(summary)) == 64
    with opened(output / "report.html", tmp_path) as browser:
        found = {
            figure.get_attribute("id").removeprefix("fig-") for figure in browser.find_elements(By.TAG_NAME, "figure")
        }
        assert found == {*wanted}
        assert {name: len(marks(browser, name)) for name in wanted} == wanted
        for name in ("curves", "rates", "parallel"):
            numbers = {mark.get_attribute("data-trial") for mark in marks(browser, name)}
            assert numbers >= {str(row["trial"]) for row in trials}
        sizes = [mark.rect for name in wanted for mark in marks(browser, name) if name != "importances"]
        assert all(size["width"] > 0 or size["height"] > 0 for size in sizes)  # drawn, not only there


def test_marks_lie_where_the_values_say(search, tmp_path):
    """Along each axis, the order of the marks is that of the numbers."""
    output, summary = search
    with opened(output / "report.html", tmp_path) as browser:
        places = {m.get_attribute("data-trial"): m.rect for m in marks(browser, "rates")}
    rows = {str(row["trial"]): row for row in reported(summary)}
    by_rate = sorted(rows, key=lambda number: rows[number]["config"]["training"]["learning_rate"])
    by_loss = sorted(rows, key=lambda number: rows[number]["curve"][0]["paired_loss"])
    across = [places[number]["x"] + places[number]["width"] / 2 for number in by_rate]
    down = [places[number]["y"] + places[number]["height"] / 2 for number in by_loss]
    assert all(a <= b + 1.5 for a, b in pairwise(across))
    assert all(a >= b - 1.5 for a, b in pairwise(down))  # a small loss lies low
    assert across[-1] - across[0] > 250
    assert down[0] - down[-1] > 150


def test_the_front_has_its_trials_ringed(front, tmp_path):
    output, summary = front
    rows = [row for row in summary["trials"] if {METRIC, "adapter_bytes"} <= {*row["metrics"]}]
    with opened(output / "report.html", tmp_path) as browser:
        drawn = marks(browser, "front-adapter_bytes")
        ringed = [m.get_attribute("data-trial") for m in drawn if "front" in m.get_attribute("class").split()]
    assert len(drawn) == len(rows)
    assert sorted(map(int, ringed)) == sorted(summary["front"])
    assert len(ringed) > 1


def test_numbers_are_those_of_the_summary(search, tmp_path):
    output, summary = search
    proof, trials = summary["proof"], summary["trials"]
    with opened(output / "report.html", tmp_path) as browser:
        said = browser.find_element(By.ID, "headline").text
        shown = browser.find_elements(By.CSS_SELECTOR, "#proof-table td[data-value]")
        values = [float(cell.get_attribute("data-value")) for cell in shown]
        compared = cells(browser, "proof-table")
        board, rungs, methods = (cells(browser, name) for name in ("leaderboard", "spend-rung", "spend-method"))
        data = cells(browser, "data-table")
    metrics = proof["metrics"]
    both = [[metrics[name]["base"], proof["over_default"][name]["base"], metrics[name]["best"]] for name in metrics]
    assert values == [value for row in both for value in row]
    for row, (name, metric) in zip(compared, metrics.items(), strict=True):
        ends = re.findall(r"-?[\d.]+", row[4].replace(",", ""))
        assert [float(end) for end in ends] == pytest.approx([metric["difference"], *metric["interval"]], rel=1e-3), (
            name
        )
    assert compared[0][4].endswith("better")
    assert compared[2][4].endswith("no difference shown")
    assert compared[1][5].endswith("no difference shown")  # exact match over the default configuration
    assert "trial " + str(summary["best"]["trial"]) in said
    assert "62.5 % right instead of the base model's 5 %" in said
    assert "from 4.25 to 1.062" in said
    assert "75 %" in said
    assert "by 3 to 3.5" in said
    assert [int(row[1]) for row in board] == [row["trial"] for row in trials]
    for line, row in zip(board, trials, strict=True):
        assert line[2] == "-" if row["value"] is None else float(line[2]) == pytest.approx(row["value"], rel=1e-3)
        assert int(line[4].replace(",", "")) == row["records"]
    own = [*trials, *summary["further_runs"]]
    for table in (rungs, methods):
        numbers = [[float(text.replace(",", "")) for text in (row[2], row[3], row[5])] for row in table]
        assert [sum(column) for column in zip(*numbers[:-1], strict=True)] == pytest.approx(numbers[-1], abs=0.03)
        money = summary["seconds"] / 3600 * PRICE
        assert numbers[-1] == pytest.approx([sum(r["records"] for r in own), summary["tokens"], money], abs=0.006)
    reached = [sum(len(row["curve"]) > place for row in own) for place in range(len(RUNGS))]
    assert [int(row[1]) for row in rungs[:-1]] == reached
    steps = [RUNGS[0], RUNGS[1] - RUNGS[0], RUNGS[2] - RUNGS[1]]
    assert [int(row[3].replace(",", "")) for row in rungs[:-1]] == [
        count * records * TOKENS for count, records in zip(reached, steps, strict=True)
    ]
    assert data[0][:4] == ["train", "1,000", "17,000", "6,000"]


def test_importances_are_optunas_and_find_what_was_planted(search, tmp_path):
    """The losses were drawn so that the learning rate decides."""
    output, summary = search
    known = optuna.create_study()
    values = {row["trial"]: row["curve"][0]["paired_loss"] for row in reported(summary)}
    for trial in study(output).get_trials():
        if trial.params:
            own = {"params": trial.params, "distributions": trial.distributions}
            known.add_trial(optuna.trial.create_trial(value=values[trial.number], **own))
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    wanted = optuna.importance.get_param_importances(known, evaluator=evaluator)
    assert next(iter(wanted)) == "learning_rate"
    with opened(output / "report.html", tmp_path) as browser:
        first, second = (bar.get_attribute("data-tip") for bar in marks(browser, "importances")[:2])
    assert first == f"learning rate: {wanted['learning_rate']:.0%} of what these explain"
    assert second == f"method: {wanted['method']:.0%} of what these explain"


def test_samples_are_ordered_by_change_marked_and_searched(search, tmp_path):
    output, _ = search
    lines = [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]
    with opened(output / "report.html", tmp_path) as browser:

        def listed():
            articles = browser.find_elements(By.CSS_SELECTOR, "#sample-list .sample")
            return [article for article in articles if article.is_displayed()]

        assert len(listed()) == len(lines)
        first = listed()[0]
        assert "needle" in first.text
        assert first.get_attribute("data-verdict") == "better"
        gone, added = (first.find_elements(By.TAG_NAME, tag) for tag in ("del", "ins"))
        assert "".join(part.text for part in gone) == "zzz"
        assert "".join(part.get_attribute("textContent") for part in added) == lines[0]["answers"]["best"]["text"]
        Select(browser.find_element(By.ID, "sample-order")).select_by_value("worst")
        assert listed()[0].get_attribute("data-verdict") == "worse"
        browser.find_element(By.ID, "sample-search").send_keys("NEEDLE zzz")
        assert [article.text for article in listed()] == [listed()[0].text]
        assert browser.find_element(By.ID, "sample-count").text == f"1 of {len(lines)}"


def test_text_of_records_stays_text(search, tmp_path):
    output, summary = search
    failed = next(row for row in summary["trials"] if row["status"] == "failed")
    with opened(output / "report.html", tmp_path) as browser:
        assert browser.execute_script("return window.pwned") is None
        assert browser.find_elements(By.CSS_SELECTOR, "main img, main script, main b") == []
        sample = browser.find_element(By.CSS_SELECTOR, ".sample")
        assert f"say needle {HOSTILE}" in sample.get_attribute("textContent")
        state = next(row[-1] for row in cells(browser, "leaderboard") if int(row[1]) == failed["trial"])
        assert state == f"failed: {failed['reason']}"
        assert output.name in browser.title


def test_without_scripts_text_tables_and_figures_are_there(search, tmp_path):
    output, summary = search
    with opened(output / "report.html", tmp_path, scripts=False) as browser:
        assert not browser.find_element(By.ID, "sample-tools").is_displayed()
        assert len(browser.find_elements(By.CSS_SELECTOR, ".sample")) == 200
        assert len(cells(browser, "leaderboard")) == len(summary["trials"])
        assert len(marks(browser, "rates")) == 64
        tips = browser.find_elements(By.CSS_SELECTOR, "#fig-rates .mark title")
        assert len(tips) == 64  # the browser itself shows them
        assert browser.find_element(By.ID, "headline").is_displayed()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_narrow_screen_scrolls_in_one_direction(search, tmp_path, dark):
    output, _ = search
    with opened(output / "report.html", tmp_path, width=375, dark=dark) as browser:
        assert browser.execute_script("return [innerWidth, document.documentElement.scrollWidth]") == [375, 375]
        heights = "[...document.querySelectorAll('.plot text')].map(text => text.getBoundingClientRect().height)"
        smallest = browser.execute_script(f"return Math.min(...{heights})")
        assert smallest >= 9  # one can read it
        paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", paper))) < 150) is dark


def test_a_pointer_on_a_trial_shows_it_in_every_figure(search, tmp_path):
    output, summary = search
    best = str(summary["best"]["trial"])
    with opened(output / "report.html", tmp_path) as browser:
        row = browser.find_element(By.CSS_SELECTOR, f"#leaderboard tr[data-trial='{best}']")
        browser.execute_script("arguments[0].dispatchEvent(new PointerEvent('pointerover', {bubbles: true}))", row)
        lit = browser.find_elements(By.CSS_SELECTOR, ".mark.lit")
        assert {mark.get_attribute("data-trial") for mark in lit} == {best}
        figures = [mark.find_element(By.XPATH, "ancestor::figure").get_attribute("id") for mark in lit]
        assert {*figures} >= {"fig-curves", "fig-rates", "fig-parallel"}
        mark = next(
            mark for mark in lit if mark.find_element(By.XPATH, "ancestor::figure").get_attribute("id") == "fig-rates"
        )
        browser.execute_script("arguments[0].dispatchEvent(new PointerEvent('pointerover', {bubbles: true}))", mark)
        assert browser.find_element(By.ID, "tip").text.startswith(f"trial {best}: ")


def test_it_prints_with_its_figures_and_without_what_only_a_screen_needs(search, tmp_path):
    output, _ = search
    with opened(output / "report.html", tmp_path, dark=True) as browser:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
        assert not browser.find_element(By.TAG_NAME, "nav").is_displayed()
        assert not browser.find_element(By.ID, "sample-tools").is_displayed()
        assert all(figure.is_displayed() for figure in browser.find_elements(By.TAG_NAME, "figure"))
        ink = browser.execute_script("return getComputedStyle(document.body).color")
        assert sum(map(int, re.findall(r"\d+", ink))) < 150  # dark on white, whatever the screen
        printed = base64.b64decode(browser.print_page())
    assert printed.startswith(b"%PDF")
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", printed)) < 40


def test_the_file_is_small_and_needs_no_other(search, front):
    for output, _ in (search, front):
        text = (output / "report.html").read_text()
        assert len(text.encode()) < 3e6
        asked = re.findall(
            r"""(?:src|href)=["']?([^"'\s>]+)|url\(([^)]+)\)|@import""",
            re.sub(r"<article.*?</article>", "", text, flags=re.S),
        )
        assert {a or b for a, b in asked if not (a or b).startswith("#")} <= {"data:,", "x"}


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_colours_have_the_contrast_of_wcag_aa(search, mode):
    """4.5 for text, 3 for marks (https://www.w3.org/TR/WCAG22/, 1.4.3 and 1.4.11)."""
    style = (search[0] / "report.html").read_text().partition("</style>")[0]
    light, dark = (dict(re.findall(r"--([\w-]+): (#\w{6});", part)) for part in style.partition("@media screen")[::2])
    colours = light if mode == "light" else light | dark
    assert len(light) >= 20
    assert light.keys() == dark.keys()
    for text in ("ink", "soft", "base", "default", "best", "good", "bad"):
        for ground in ("paper", "card"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    assert contrast(colours["soft"], colours["wash"]) >= 4.5
    for ground in ("added", "gone"):
        assert contrast(colours["ink"], colours[ground]) >= 4.5
    for mark in [name for name in colours if re.fullmatch(r"[mq]\d", name)]:
        assert contrast(colours[mark], colours["card"]) >= 3, mark


def test_png_files_are_the_same_figures(search, tmp_path):
    output, _ = search
    page = (output / "report.html").read_text()
    drawn = dict(re.findall(r'<figure id="fig-([\w-]+)".*?viewBox="0 0 ([\d. ]+)"', page, re.S))
    files = {path.stem: path.read_bytes() for path in (output / "figures").iterdir()}
    assert files.keys() == drawn.keys()
    for name, image in files.items():
        assert image.startswith(b"\x89PNG")
        width, height = struct.unpack(">II", image[16:24])
        assert [width, height] == pytest.approx([2 * float(side) for side in drawn[name].split()], abs=2)
    coded = base64.b64encode(files["rates"]).decode()
    with opened(output / "report.html", tmp_path) as browser:
        browser.execute_cdp_cmd("Page.setBypassCSP", {"enabled": True})
        counted = browser.execute_async_script(
            """const [coded, colours, done] = arguments, image = new Image();
            image.onload = () => {
              const {width, height} = image, canvas = Object.assign(document.createElement("canvas"), {width, height});
              const context = canvas.getContext("2d");
              context.drawImage(image, 0, 0);
              const pixels = context.getImageData(0, 0, image.width, image.height).data, seen = {};
              for (let i = 0; i < pixels.length; i += 4) {
                const colour = "#" + [0, 1, 2].map(k => pixels[i + k].toString(16).padStart(2, "0")).join("");
                seen[colour] = (seen[colour] || 0) + 1;
              }
              done(colours.map(colour => seen[colour] || 0));
            };
            image.src = "data:image/png;base64," + coded;""",
            coded,
            ["#ffffff", "#b3400a", "#0b6e69", "#8a5a00"],  # the card, the best trial, two methods
        )
    assert counted[0] > 100_000
    assert min(counted[1:]) > 50


def test_png_without_its_package_is_one_line(search, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    assert main(["report", "--run", str(search[0]), "--png"]) == 2
    assert capsys.readouterr().err == 'ftray report: error: --png: needs resvg: pip install "ftray[report]"\n'


def test_the_command_to_make_it_again_is_the_same_search(search, tmp_path):
    output, _ = search
    text = (output / "report.html").read_text()
    said = re.search(r'<pre id="again-command">(.*?)</pre>', text, re.S)[1]
    for code, character in (("&lt;", "<"), ("&gt;", ">"), ("&#39;", "'"), ("&amp;", "&")):
        said = said.replace(code, character)
    program, name, *flags = shlex.split(said)
    assert (program, name) == ("ftray", "tune")
    again, before = parse(name, flags), config_from(yaml.safe_load((output / "config.yaml").read_text()))
    assert again.output == f"{output}-again"
    assert again.search.space == str(output / "space.yaml")
    same = {"output": before.output, "search": again.search.model_copy(update={"space": before.search.space})}
    assert again.model_copy(update=same) == before


def test_what_an_output_lacks_is_left_out_and_said(tmp_path):
    """Each file by itself, and all that a search can do without."""
    whole = tmp_path / "whole"
    write_search(whole, trials=12, answers=6)
    for lost, figure, said in (
        ("curves.parquet", "curves", "no curves.parquet"),
        ("data.json", "lengths", "what was trained on"),
        ("answers.jsonl", None, "no answers were kept"),
        ("commands.json", None, "of an older version"),
    ):
        output = tmp_path / lost
        shutil.copytree(whole, output)
        (output / lost).unlink(missing_ok=True)
        assert main(["report", "--run", str(output)]) == 0
        text = (output / "report.html").read_text()
        assert said in text.partition('id="left-out"')[2]
        assert figure is None or f'id="fig-{figure}"' not in text
    summary = tmp_path / "running"
    shutil.copytree(whole, summary)
    (summary / "summary.json").unlink()
    assert main(["report", "--run", str(summary)]) == 0
    text = (summary / "report.html").read_text()
    assert "The search is not over: 12 trials have begun." in text
    assert "no proof yet" in text


def test_a_search_without_a_best_trial_says_so(tmp_path):
    output = tmp_path / "none"
    summary = write_search(output, trials=4, answers=3)
    for row in summary["trials"]:
        row |= {"status": "failed", "reason": "diverged", "value": None, "curve": [], "metrics": {}}
    changed = {"best": None, "proof": None, "base": None, "further_runs": [], "front": []}
    (output / "summary.json").write_text(json.dumps(summary | changed))
    (output / "curves.parquet").unlink()
    (output / "answers.jsonl").unlink()
    assert main(["report", "--run", str(output)]) == 0
    assert "None of 4 trials gave a result that may be the best." in (output / "report.html").read_text()


def test_of_a_metric_of_ones_own_the_search_says_which_way_is_better(tmp_path):
    output = tmp_path / "out"
    summary = write_search(output, trials=4, answers=20)
    stored = yaml.safe_load((output / "config.yaml").read_text())
    stored["search"]["metric"] = "score.py:rudeness"
    (output / "config.yaml").write_text(yaml.safe_dump(stored))
    rude = {"base": 0.5, "best": 0.25, "difference": -0.25, "interval": [-0.3, -0.2]}
    for trial in summary["trials"]:
        trial["metrics"] = {"validation_rudeness": 0.25}
    summary["proof"] |= {
        "metrics": {"loss": summary["proof"]["metrics"]["loss"], "rudeness": rude},
        "over_default": None,
    }
    (output / "summary.json").write_text(json.dumps(summary))
    said = headline(read_run(parse_location(str(output))))
    assert "it cuts the rudeness by 50\u00a0% from 0.5 to 0.25 (95\u00a0% certain: by 0.2 to 0.3)" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"best": 4.24, "difference": -0.01, "interval": [-0.2, 0.1]}, "no difference to the base model is shown"),
        ({"best": 8.5, "difference": 4.25, "interval": [4.0, 4.5]}, "raises the loss by 100\u00a0%, which is worse,"),
    ],
)
def test_no_gain_is_not_called_one(tmp_path, change, said):
    output = tmp_path / "out"
    summary = write_search(output, trials=4, answers=20)
    summary["proof"]["metrics"] = {"loss": summary["proof"]["metrics"]["loss"] | change}
    summary["proof"]["over_default"] = None
    (output / "summary.json").write_text(json.dumps(summary))
    assert said in headline(read_run(parse_location(str(output))))


def test_outputs_of_the_first_layout_are_reported(tmp_path, capsys):
    with tarfile.open(FIRST_LAYOUT) as archive:
        archive.extractall(tmp_path, filter="data")
    for name in ("run", "trained"):
        assert main(["report", "--run", str(tmp_path / name)]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    with opened(tmp_path / "run" / "report.html", tmp_path / "profile") as browser:
        shown = browser.find_elements(By.CSS_SELECTOR, "#proof-table td[data-value]")
        values = [float(cell.get_attribute("data-value")) for cell in shown]
        assert values == [m[model] for m in summary["proof"]["metrics"].values() for model in ("base", "best")]
        assert len(browser.find_elements(By.CSS_SELECTOR, ".sample")) == len(summary["proof"]["samples"])
        assert len(marks(browser, "validation")) == 4
        left_out = browser.find_element(By.ID, "left-out").text
    assert "no curves.parquet" in left_out
    assert "older version" in left_out
    with opened(tmp_path / "trained" / "report.html", tmp_path / "profile") as browser:
        assert "5.968" in browser.find_element(By.ID, "headline").text
        assert len(marks(browser, "training")) == 2
        assert "not a search" in browser.find_element(By.ID, "left-out").text


def test_an_evaluation_in_the_folder_of_a_search_is_part_of_its_report(tmp_path):
    """Adapters are named by what tells their paths apart; of a mixture, each source has a line."""
    output = tmp_path / "out"
    write_search(output, trials=6, answers=5)

    def metric(best, low, high):
        return {"base": 3.0, "best": best, "difference": best - 3.0, "interval": [low, high]}

    adapters = {"/runs/a/adapter": metric(2.0, -1.2, -0.8), "/runs/b/adapter": metric(1.5, -1.75, -1.25)}
    result = {"records": 40, "split": "test", "base": {"loss": 3.0}, "samples": [], "data": "x", "model": "m"}
    result["adapters"] = {name: {"loss": own} for name, own in adapters.items()}
    result["sources"] = {"news & <i>more</i>": {"records": 9, "base": 3.0, "adapters": adapters}}
    (output / "evaluation.json").write_text(json.dumps(result))
    assert main(["report", "--run", str(output / "evaluation.json")]) == 0
    with opened(output / "report.html", tmp_path / "profile") as browser:
        assert len(marks(browser, "evaluation")) == 2 * (3 + 2)
        rows = cells(browser, "evaluation-table")
        assert [row[:4] for row in rows] == [
            ["loss", "3", "2", "1.5"],
            ["loss, 9 of news & <i>more</i>", "3", "2", "1.5"],
        ]
        assert browser.find_elements(By.ID, "proof-table")
        heads = [head.text for head in browser.find_elements(By.CSS_SELECTOR, "#evaluation-table th")]
    assert heads == ["metric", "base", "a/adapter", "b/adapter", "a/adapter - base", "b/adapter - base"]
    alone = tmp_path / "scores.json"
    alone.write_text(json.dumps(result))
    assert main(["report", "--run", str(alone)]) == 0
    said = "On 40 records of the test split, b/adapter has the best loss of 2 adapter(s), 1.5 against 3"
    assert said in (tmp_path / "scores.html").read_text()


def test_an_output_in_an_object_store_is_reported_there(store, tmp_path):
    import boto3

    write_search(tmp_path / "out", trials=6, answers=5)
    client = boto3.client("s3")
    for path in (tmp_path / "out").iterdir():
        client.upload_file(str(path), "runs", f"reported/{path.name}")
    assert main(["report", "--run", "s3://runs/reported", "--png"]) == 0
    made = client.get_object(Bucket="runs", Key="reported/report.html")["Body"].read().decode()
    assert "The winner of 6 trials" in made
    assert "--config s3://runs/reported/config.yaml" in made
    image = client.get_object(Bucket="runs", Key="reported/figures/curves.png")["Body"].read()
    assert image.startswith(b"\x89PNG")


def test_nothing_to_report_is_one_line(tmp_path, capsys):
    assert main(["report", "--run", str(tmp_path)]) == 2
    assert "holds no search, training run or evaluation" in capsys.readouterr().err
    (tmp_path / "scores.json").write_text('{"records": 3}')
    assert main(["report", "--run", str(tmp_path / "scores.json")]) == 2
    assert "is not as ftray wrote it" in capsys.readouterr().err
    leave_report(parse_location(str(tmp_path)))  # after a command whose work stands
    assert "report   none: UserError" in capsys.readouterr().err


def test_a_page_has_room_for_the_samples_that_changed_most(tmp_path):
    """Of long answers, those at both ends stay; each is cut to what one reads."""
    output = tmp_path / "out"
    write_search(output, trials=4, answers=2000)
    lines = [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]
    for i, line in enumerate(lines):
        line["prompt"] = "<\u4e2d>" * 600  # 6 kB of markup, of 1.8 thousand characters
        line["target"] = "x" * 4000
        line["answers"]["base"]["text"] = "y" * (i * 2) + "x" * (4000 - i * 2)
        line["answers"]["best"]["text"] = "x" * 4000 if i % 2 else "y" * 4000
    (output / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    kept = samples(read_run(parse_location(str(output))))
    assert 100 < len(kept) < 400
    assert kept[0].change == pytest.approx(1999 * 2 / 4000)
    assert kept[-1].change == pytest.approx(-1.0)
    assert all(a.change >= b.change for a, b in pairwise(kept))
    assert main(["report", "--run", str(output)]) == 0
    assert (output / "report.html").stat().st_size < 3e6


def test_differences_give_both_texts_back():
    before, after = differences("the cat sat, on a mat", "the dog sat on the mat!")
    assert ["".join(part for part, _ in own) for own in (before, after)] == [
        "the cat sat, on a mat",
        "the dog sat on the mat!",
    ]
    assert [part for part, own in before if own] == ["cat", ",", "a"]
    assert [part for part, own in after if own] == ["dog", "the", "!"]


def test_words_that_differ_in_a_row_are_one_stretch():
    before, after = differences("a b c", "A B c")
    assert (before, after) == ([("a b", True), (" c", False)], [("A B", True), (" c", False)])


def test_a_curve_that_is_thinned_keeps_its_mean_and_its_ends():
    curve = [(8.0 * step, float(step % 7)) for step in range(1, 1201)]
    thin = thinned(curve)
    assert len(thin) == 120
    assert thin[-1][0] == curve[-1][0]
    assert sum(loss for _, loss in thin) / 120 == pytest.approx(sum(loss for _, loss in curve) / 1200)
    assert thinned(curve[:50]) == curve[:50]


def test_scales_and_numbers():
    log = Scale(1e-4, 1e-1, 0, 300, log=True)
    assert [log(1e-4), log(1e-3), log(1e-1), log(10), log(0)] == pytest.approx([0, 100, 300, 300, 0])
    assert log.ticks() == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1])
    assert Scale(0.0, 384.0, 0, 1).ticks() == [0, 100, 200, 300]
    assert Scale.over([float("nan"), 2.0, 2.0], 0, 1)(float("inf")) == 1
    assert [short(v) for v in (0.0, 1.0625, 1234567.0, 48000.0, 0.00042, 4.2e-7, -3.1875)] == [
        "0", "1.062", "1,234,567", "48,000", "0.00042", "4.2e-7", "-3.188"
    ]  # fmt: skip
    assert (
        element("text", "a", class_="t", data_trial=3, title='"<')
        == '<text class="t" data-trial="3" title="&quot;&lt;">a</text>'
    )


def test_commands_leave_the_report_of_what_they_have_done(cluster, words, tiny_llama, tmp_path):
    """A search with two goals, a training run and an evaluation, as users run them."""
    output = tmp_path / "search"
    searched = run_here(command(output, words, tiny_llama, "--trials", "3", "--scaling.price_per_hour", "3600",
                                "--search.metric", f"{METRIC},adapter_bytes"))  # fmt: skip
    assert searched.returncode == 0, searched.stdout + searched.stderr
    assert f"report   {os.path.relpath(output)}/report.html" in searched.stdout
    summary = json.loads((output / "summary.json").read_text())
    assert "answers" not in summary["proof"]
    lines = [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]
    assert len(lines) == summary["proof"]["records"]
    texts = [{name: answer["text"] for name, answer in line["answers"].items() if name != "default"} for line in lines]
    few = [{"prompt": line["prompt"], "target": line["target"]} | own for line, own in zip(lines, texts, strict=True)][
        :5
    ]
    assert few == summary["proof"]["samples"]
    losses = [line["answers"]["best"]["loss"] for line in lines]
    assert min(losses) <= summary["proof"]["metrics"]["loss"]["best"] <= max(losses)
    (ran,) = json.loads((output / "commands.json").read_text())
    assert ran["versions"].keys() >= {"python", "ftray", "torch", "ray", "peft", "optuna"}
    with opened(output / "report.html", tmp_path / "profile") as browser:
        board = cells(browser, "leaderboard")
        assert [int(row[1]) for row in board] == [row["trial"] for row in summary["trials"]]
        assert len(marks(browser, "front-adapter_bytes")) == sum(len(row["metrics"]) == 2 for row in summary["trials"])
        assert len(marks(browser, "curves")) == len(summary["trials"])
        money = float(cells(browser, "spend-method")[-1][-1].replace(",", ""))
        assert money == pytest.approx(summary["seconds"], rel=0.05)  # a unit of money a second; the report came after
        values = [
            float(c.get_attribute("data-value"))
            for c in browser.find_elements(By.CSS_SELECTOR, "#proof-table td[data-value]")
        ]
        assert summary["proof"]["metrics"]["loss"]["best"] in values
        assert browser.find_element(By.CSS_SELECTOR, "pre.typed").text.endswith(ran["command"])

    shared = ["--data", words, "--data.max_length", "64", "--data.cache", str(tmp_path / "shards")]
    settings = [
        "--model",
        tiny_llama,
        "--model.dtype",
        "fp32",
        "--training.steps",
        "4",
        "--evaluation.max_new_tokens",
        "4",
    ]
    trained = run_here([sys.executable, "-m", "ftray.train", *shared, *settings, "--output", str(tmp_path / "trained")])
    assert trained.returncode == 0, trained.stdout + trained.stderr
    kept = json.loads((tmp_path / "trained" / "training.json").read_text())
    printed = re.findall(rf"^step (\d+): .*{METRIC} ([\d.]+)", trained.stdout, re.MULTILINE)
    assert [(str(r["step"]), f"{r[METRIC]:.4f}") for r in kept["reports"]] == printed
    with opened(tmp_path / "trained" / "report.html", tmp_path / "profile") as browser:
        assert len(marks(browser, "training")) == 2 * len(kept["reports"])
        assert short(min(r[METRIC] for r in kept["reports"])) in browser.find_element(By.ID, "headline").text

    scores = tmp_path / "scores.json"
    adapters = ["--adapter", str(output), "--adapter", str(tmp_path / "trained")]
    flags = [
        "--model",
        tiny_llama,
        "--model.dtype",
        "fp32",
        "--evaluation.max_new_tokens",
        "4",
        "--output",
        str(scores),
    ]
    evaluated = run_here([sys.executable, "-m", "ftray.evaluate", *shared, *adapters, *flags])
    assert evaluated.returncode == 0, evaluated.stdout + evaluated.stderr
    result = json.loads(scores.read_text())
    assert "answers" not in result
    assert len((tmp_path / "scores.answers.jsonl").read_text().splitlines()) == result["records"]
    with opened(tmp_path / "scores.html", tmp_path / "profile") as browser:
        shown = browser.find_elements(By.CSS_SELECTOR, "#evaluation-table td[data-value]")
        wanted = [
            [base, *(own[name]["best"] for own in result["adapters"].values())] for name, base in result["base"].items()
        ]
        assert [float(cell.get_attribute("data-value")) for cell in shown] == [value for row in wanted for value in row]
        intervals = [one["interval"] for own in result["adapters"].values() for one in own.values()]
        drawn = sum(interval is not None for interval in intervals)  # there is none of what is the same for all records
        assert len(marks(browser, "evaluation")) == 3 * len(wanted) + drawn
        assert len(wanted) <= drawn < len(intervals) == 2 * len(wanted)
        assert len(browser.find_elements(By.CSS_SELECTOR, ".sample")) == result["records"]
