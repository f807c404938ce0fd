"""The live page: what it shows is what the output holds, and its buttons do what the commands do."""

import asyncio
import json
import math
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from itertools import pairwise

import httpx
import pytest
from fastapi.testclient import TestClient
from helpers.bodies import NO_OBJECTS
from helpers.browser import FAINT, console, opened
from helpers.ports import free_port
from helpers.results import HOSTILE, METRIC, write_search
from helpers.searches import command, environment, study
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

import ftray
from ftray.cli import main
from ftray.config import config_from
from ftray.reports.live import LiveRun
from ftray.reports.status import read
from ftray.search.live import last_beats
from ftray.search.rungs import Rung, rungs
from ftray.search.time_left import TimeLeft, Workload, expected, said
from ftray.serving.key import digest_of
from ftray.serving.live import Looked, create_app
from ftray.storage.local import LocalLocation
from ftray.storage.location import parse_location

KEY = "correct horse battery"
SHAPE = {"message", "type", "param", "code"}  # of an error
SPACE = "method: lora\nlora:\n  rank: 4\n  learning_rate: {log: [1.0e-4, 1.0e-3]}\n"
STEPS = 10000
# prompt and oldest answer of each record of a trial's samples
SAMPLED = """return [...document.querySelectorAll("#trial-samples .sample")].map((sample) =>
  [sample.querySelector(".text").textContent, [...sample.querySelectorAll(".answers li")].at(-1).textContent])"""


@contextmanager
def page_of(output, *flags, key=KEY):
    """`ftray ui`; yields its URL."""
    arguments = [sys.executable, "-m", "ftray.ui", "--run", str(output), "--port", "0", *flags]
    env = environment() | ({"FTRAY_API_KEY": key} if key else {})
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=env)
    try:
        yield re.fullmatch(r"page     (http://\S+)\n", process.stdout.readline())[1]
    finally:
        process.terminate()
        process.wait(30)


def asked(url, path, key=KEY, **more):
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.request("POST" if more else "GET", url + path, headers=headers, timeout=60, **more)


class Page:
    """What a user does on the page."""

    def __init__(self, browser):
        self.browser = browser

    def at(self, name):
        return self.browser.find_element(By.ID, name)

    def until(self, condition, seconds=90):
        return WebDriverWait(self.browser, seconds, ignored_exceptions=()).until(lambda _: condition())

    def button(self, does, trial=None):
        inside = "#steer" if trial is None else f"#trials-table tr[data-trial='{trial}']"
        return self.browser.find_element(By.CSS_SELECTOR, f"{inside} [data-do='{does}']")

    def press(self, does, trial=None):
        """By the keyboard, as with the mouse; a row that is just being drawn anew is tried again."""
        self.until(lambda: self.button(does, trial).is_displayed() and self.button(does, trial).is_enabled())
        self.button(does, trial).send_keys(Keys.ENTER)

    def answer(self, text=None):
        """Fill the open dialog, and do it."""
        self.until(lambda: self.at("dialog").is_displayed())
        if text is not None:
            self.at("dialog-text").clear()
            self.at("dialog-text").send_keys(text)
        self.until(lambda: self.at("dialog-do").is_enabled())
        self.at("dialog-do").click()

    def state(self):
        return self.at("phase").text


def test_a_search_is_looked_at_and_led_from_its_page(cluster, tmp_path, words, tiny_llama, capsys):
    """One search: all buttons, each seen in the files of the run."""
    output, port = tmp_path / "out", free_port()
    flags = ["--trials", "5", "--concurrency", "2", "--search.scheduler", "none", "--training.evaluations", "100"]
    flags += ["--ui", "--port", str(port), "--ui.samples", "2"]
    arguments = command(output, words, tiny_llama, *flags, space=SPACE, steps=STEPS)
    pipe, env = subprocess.PIPE, environment(joined=True)
    process = subprocess.Popen(arguments, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=env)
    here = LocalLocation(output)

    def trial(number):
        return next((t for t in read(here).trials if t["trial"] == number), None)

    def resting():
        return not any(beat["tokens_per_second"] for beat in last_beats(here))

    try:
        url = next(found[1] for line in process.stdout if (found := re.fullmatch(r"page     (http://\S+)\n", line)))
        address, _, key = url.partition("#key=")
        assert address == f"http://127.0.0.1:{port}/"
        for wrong in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {key}"}):
            for path in ("v1/live", "v1/live/report", "v1/live/trials/0", "v1/run"):
                assert httpx.get(address + path, headers=wrong).status_code == 401
            body = {"command": "prove"}
            assert httpx.post(address + "v1/live/requests", headers=wrong, json=body).status_code == 401
        assert str(tmp_path) not in httpx.get(address).text  # what all may see tells nothing
        with opened(url, tmp_path / "profile") as browser:
            page = Page(browser)
            page.until(lambda: page.state() == "searches" and all((trial(n) or {}).get("rung") for n in (0, 1)))
            assert "#" not in browser.current_url  # where others could read the key
            cards = page.at("cards")
            page.until(lambda: all(re.search(said, cards.text) for said in ("tokens/s", "about", "[MG]B")))
            assert "0 of 5" in cards.text
            page.until(lambda: len(browser.find_elements(By.CSS_SELECTOR, "#fig-curves .mark")) == 2)  # as they learn

            page.press("samples", 0)
            page.until(lambda: len(browser.find_elements(By.CSS_SELECTOR, ".answers li")) >= 4)
            kept = json.loads((output / "live" / "trial-0.json").read_text())
            assert len(kept["asked"]) == 2
            for record, (prompt, oldest) in zip(kept["asked"], browser.execute_script(SAMPLED), strict=True):
                assert prompt == record["prompt"]
                first = kept["answers"][0]
                assert oldest == f"after {first['records']:,} records{first['texts'][kept['asked'].index(record)]}"
            browser.find_element(By.CSS_SELECTOR, "[data-room=search]").click()

            page.press("pause")
            page.until(lambda: page.state() == "paused" and resting())
            before = [t["records"] for t in read(here).trials]
            states = (
                "return [...document.querySelectorAll('#trials-table td[data-name=state]')].map(c => c.textContent)"
            )
            page.until(lambda: browser.execute_script(states) == ["paused", "paused"])
            assert "ftray pause" in page.at("toast").text
            time.sleep(3)
            assert [t["records"] for t in read(here).trials] == before
            page.press("train-on")
            page.until(lambda: page.state() == "searches" and trial(0)["records"] > before[0])

            page.press("add")
            page.answer("rank: 3")
            page.until(lambda: "not a configuration: 'rank: 3'" in page.at("dialog-problem").text)
            added = '{"adapter": {"method": "ia3"}, "training": {"learning_rate": 0.05}}'
            page.answer(added)
            page.until(lambda: not page.at("dialog").is_displayed())
            assert study(output).get_trials()[2].user_attrs["added"] == json.loads(added)
            page.press("clone", 0)
            page.until(lambda: page.at("dialog").is_displayed())
            lines = page.at("dialog-text").get_attribute("value").splitlines()
            assert "adapter.method: lora" in lines
            page.answer("training.learning_rate: 0.002\nadapter.rank: 64")
            page.until(lambda: "the weights of trial 0 are of" in page.at("dialog-problem").text)
            page.answer("training.learning_rate: 0.002")
            page.until(lambda: not page.at("dialog").is_displayed())
            clone = study(output).get_trials()[3].user_attrs["added"]
            assert (clone["clone"]["trial"], clone["training"]["learning_rate"]) == (0, 0.002)

            page.press("stop", 1)
            page.answer()
            page.until(lambda: trial(1)["state"] == "stopped early")
            page.until(lambda: trial(2)["state"] == "runs" and trial(2)["rung"])  # the one that was added
            watched = subprocess.Popen(
                [sys.executable, "-m", "ftray.status", "--watch", "--run", str(output)], stdout=pipe, text=True, env=env
            )
            assert re.match(
                rf"1/5 trials over, best {METRIC} [\d.]+ \(trial \d\), \d+ tokens/s", watched.stdout.readline()
            )
            page.press("prove")
            page.answer()
            page.until(lambda: page.at("headline").text.startswith("The winner of") and page.state() == "over")
            page.until(lambda: browser.find_elements(By.CSS_SELECTOR, "#report #proof-table"))
            assert [one for one in console(browser) if "status of 400" not in one] == []  # the two that were refused
            told, _ = process.communicate(timeout=120)
            assert process.returncode == 0, told
            page.until(lambda: "The server of this page is gone" in page.at("gone").text)
            browser.get("about:blank")
            assert all("ERR_CONNECTION_REFUSED" in one for one in console(browser))
        assert watched.wait(60) == 0
        assert "trials over" in watched.stdout.read().splitlines()[-1]
    finally:
        process.kill()
    summary = json.loads((output / "summary.json").read_text())
    assert summary["proof"]["metrics"]["loss"]["best"]
    assert {t["trial"]: t["status"] for t in summary["trials"]}[1] == "stopped early"
    with pytest.raises(httpx.ConnectError):
        httpx.get(address)


@pytest.fixture(scope="module")
def over(tmp_path_factory):
    """A search that is over, and the URL of its page."""
    output = tmp_path_factory.mktemp("ui") / "big & <b>bold</b>"
    write_search(output, trials=12, answers=30)
    answers = {48: "a b c", 96: f"a {HOSTILE} c", 384: "b"}
    live = {
        "asked": [{"prompt": f"say {HOSTILE}", "target": "b"}],
        "answers": [{"records": records, "texts": [text]} for records, text in answers.items()],
    }
    (output / "live").mkdir()
    (output / "live" / "trial-3.json").write_text(json.dumps(live))
    with page_of(output, "--ui.endpoint", f"http://127.0.0.1:{free_port()}") as url:
        yield output, url


def test_the_page_asks_for_its_key_and_shows_the_report(over, tmp_path):
    output, url = over
    summary = json.loads((output / "summary.json").read_text())
    with opened(url, tmp_path) as browser:
        page = Page(browser)
        page.until(lambda: page.at("key").is_displayed())
        assert not page.at("room-search").is_displayed()
        assert all("status of 401" in one for one in console(browser))
        page.at("key").send_keys(KEY + Keys.TAB)
        page.until(lambda: page.at("headline").text.startswith("The winner of 12 trials"))
        assert page.state() == "over"
        assert not page.at("steer").is_displayed()
        first = browser.find_element(By.CSS_SELECTOR, "#trials-table tbody tr")
        assert first.get_attribute("data-trial") == str(summary["best"]["trial"])
        marks = browser.find_elements(By.CSS_SELECTOR, "#fig-rates .mark")
        assert len(marks) == sum(bool(row["curve"]) for row in summary["trials"])
        assert browser.execute_script("return window.pwned") is None
        assert browser.find_elements(By.CSS_SELECTOR, "main img, main script, main b") == []
        browser.find_element(By.CSS_SELECTOR, "[data-room=samples]").send_keys(Keys.ENTER)
        page.until(lambda: len(browser.find_elements(By.CSS_SELECTOR, ".answers li")) == 3)
        assert Select(page.at("sample-trial")).first_selected_option.text == "trial 3"
        newest, middle, _ = browser.find_elements(By.CSS_SELECTOR, ".answers li")
        assert "right" in newest.text
        marked = "".join(part.text for part in middle.find_elements(By.TAG_NAME, "ins"))
        assert "window.pwned" in marked
        page.at("sample-search").send_keys("needle")
        page.until(lambda: re.fullmatch(r"[1-9]\d? of 30", page.at("sample-count").text))
        assert page.at("sample-count").text != "30 of 30"
        sample = next(s for s in browser.find_elements(By.CSS_SELECTOR, "#sample-list .sample") if s.is_displayed())
        prompt = sample.find_element(By.CLASS_NAME, "text").get_attribute("textContent")
        sample.find_element(By.XPATH, "button").click()
        page.until(lambda: page.at("no-endpoint").is_displayed())
        assert "ftray serve --run" in page.at("no-endpoint").text
        assert page.at("prompt").get_attribute("value") == prompt


@pytest.mark.parametrize(("width", "dark"), [(375, True), (375, False), (1200, True), (1200, False)])
def test_everybody_can_read_it(over, tmp_path, width, dark):
    """On a phone, in the dark, and whoever sees little."""
    with opened(f"{over[1]}#key={KEY}", tmp_path, width=width, dark=dark) as browser:
        page = Page(browser)
        page.until(lambda: page.at("report").find_elements(By.CSS_SELECTOR, "#again"))
        for room in ("search", "samples", "compare"):
            browser.execute_script(f"location.hash = '{room}'")
            page.until(lambda room=room: page.at(f"room-{room}").is_displayed())
            page.until(lambda room=room: room != "samples" or browser.find_elements(By.CSS_SELECTOR, ".answers li"))
            assert browser.execute_script("return document.documentElement.scrollWidth") <= width
            assert browser.execute_script(FAINT) == []
            fields = browser.find_elements(By.CSS_SELECTOR, "button, select, textarea, input")
            assert all(field.accessible_name for field in fields if field.is_displayed())
        browser.execute_script("arguments[0].showModal()", page.at("dialog"))
        assert browser.execute_script(FAINT) == []
        paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", paper))) < 150) is dark


def test_what_can_be_asked_and_what_not(over):
    _, url = over
    for body, status, reason in (
        ({"command": "stop"}, 400, "which trial?"),
        ({"command": "stop", "trial": 0}, 400, "no search is running there"),
        ({"command": "clone", "trial": 0, "changes": {"output": "x"}}, 400, "only adapter.* and training.*"),
        ({"command": "serve"}, 400, "command: must be"),
        ({"command": "stop", "trial": 0, "more": 1}, 400, "unsupported field 'more'"),
        ({"command": "add", "configuration": "{a: \0}"}, 400, "configuration: must match"),
        ({"command": "clone", "trial": 0, "changes": {"training.seed": "\0"}}, 400, "training.seed: must match"),
    ):
        got = asked(url, "v1/live/requests", json=body)
        assert (got.status_code, reason in got.text) == (status, True), got.text
    assert asked(url, "v1/adapters", json={}).status_code == 404
    assert asked(url, "v1/models").json()["error"]["code"] == "no_endpoint"
    policy = httpx.get(url).headers["Content-Security-Policy"]
    assert "script-src 'self'" in policy
    assert "default-src 'none'" in policy


@pytest.mark.parametrize("path", ["v1/live/requests", "v1/completions"])
@pytest.mark.parametrize(("kind", "content", "refused", "reason"), NO_OBJECTS)
def test_a_body_that_is_no_json_object_is_refused_in_one_line(tmp_path, path, kind, content, refused, reason):
    """By the page for its buttons; what it passes on to an endpoint, that reads, if it may be JSON at all."""
    app = create_app(parse_location(str(tmp_path)), digest_of(KEY), f"http://127.0.0.1:{free_port()}", "", Looked())
    headers = {"Authorization": f"Bearer {KEY}"} | ({"Content-Type": kind} if kind else {})
    got = TestClient(app, raise_server_exceptions=False).post(path, headers=headers, content=content)
    if path == "v1/completions" and refused[0] == 400:
        assert (got.status_code, got.json()["error"]["code"]) == (503, "no_endpoint")
        return
    error = got.json()["error"]
    assert (got.status_code, error["code"]) == refused
    assert (error["type"], set(error)) == ("invalid_request_error", SHAPE)
    assert error["message"].startswith(reason)
    assert "\n" not in error["message"]


@pytest.mark.parametrize("path", ["v1/live/trials/x", "v1/other", "v1/live/trials/" + "9" * 5000])
def test_a_path_that_no_route_takes_has_the_shape_of_all_errors(tmp_path, path):
    app = create_app(parse_location(str(tmp_path)), digest_of(KEY), "http://127.0.0.1:9", "", Looked())
    got = TestClient(app, raise_server_exceptions=False).get(path, headers={"Authorization": f"Bearer {KEY}"})
    assert (got.status_code, set(got.json()["error"])) == (404, SHAPE)


def test_from_python_the_page_is_served_beside_what_the_program_does(tmp_path, monkeypatch):
    """As in a notebook: within a loop that runs, and after it; the handle ends the page and nothing else."""
    monkeypatch.delenv("FTRAY_API_KEY", raising=False)
    write_search(tmp_path / "out", trials=6, answers=3)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)}

    async def cell():
        return ftray.ui(run=tmp_path / "out", port=0)

    page = asyncio.run(cell())
    address, _, key = page.url.partition("#key=")
    assert asked(address, "v1/live", key).json()["phase"] == "over"
    assert "The winner of 6 trials" in asked(address, "v1/live/report", key).json()["headline"]
    refused = asked(address, "v1/live/requests", key, json={"command": "stop", "trial": 0})  # a command of its own
    assert "no search is running there" in refused.json()["error"]["message"]
    assert key not in re.sub(r"<a.*?>", "", page._repr_html_())
    assert page.url in page._repr_html_()
    page.close()
    page.close()  # it is over already
    with pytest.raises(httpx.ConnectError):
        httpx.get(address)
    with ftray.ui(run=ftray.SearchResult(tmp_path / "out"), ui={"port": 0}) as again:
        assert httpx.get(again.url).is_success
    with pytest.raises(httpx.ConnectError):
        httpx.get(again.url)
    assert handlers == {number: signal.getsignal(number) for number in handlers}


def test_a_program_may_end_without_closing_the_page(tmp_path):
    write_search(tmp_path / "out", trials=6, answers=3)
    code = "import ftray, httpx; page = ftray.ui(run='out', port=0); print(httpx.get(page.url).status_code)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "200\n", "")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_ends_when_it_is_told_to(tmp_path, number, code):
    write_search(tmp_path / "out", trials=6, answers=3)
    arguments = [sys.executable, "-m", "ftray.ui", "--run", str(tmp_path / "out"), "--port", "0"]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    assert process.stdout.readline().startswith("page     http://")
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in said


def test_after_its_driver_died_the_page_says_so(tmp_path):
    output = tmp_path / "out"
    write_search(output, trials=6, answers=3)
    for name in ("summary.json", "curves.parquet", "answers.jsonl"):
        (output / name).unlink()
    (output / "live").mkdir()
    beat = {"at": time.time(), "every": 2.0, "tokens_per_second": 9.0, "memory": {"cpu": 1}, "trials": {}}
    (output / "live" / "pack-0.json").write_text(json.dumps(beat))  # a moment ago
    shown = LiveRun(LocalLocation(output)).state()
    assert (shown["phase"], shown["runs"], shown["tokens_per_second"], shown["left_said"]) == (
        "has no driver",
        False,
        None,
        None,
    )
    with page_of(output, key=None) as url, opened(url, tmp_path / "profile") as browser:
        assert "#key=" in url
        page = Page(browser)
        page.until(lambda: "No driver runs this search any more" in page.at("gone").text)
        page.until(lambda: "The search is not over: 6 trials have begun." in page.at("headline").text)


def test_a_run_in_an_object_store_is_looked_at_from_another_machine(store, tmp_path):
    import boto3

    write_search(tmp_path / "out", trials=6, answers=5)
    client = boto3.client("s3")
    for path in (tmp_path / "out").iterdir():
        client.upload_file(str(path), "runs", f"looked/{path.name}")
    shutil.rmtree(tmp_path / "out")
    run = LiveRun(parse_location("s3://runs/looked"))
    assert (run.state()["phase"], len(run.state()["trials"])) == ("over", 10)
    assert run.report()["sections"].keys() >= {"proof", "trials", "learning", "samples"}


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--host", "0.0.0.0"], "others could come without a key"),
        (["--ui.api_key_file", "/nowhere"], "ui.api_key_file /nowhere: No such file"),
        (["--run", "/nowhere"], "holds no search"),
    ],
)
def test_what_can_not_be_served(over, flags, reason, capsys, monkeypatch):
    monkeypatch.delenv("FTRAY_API_KEY", raising=False)
    assert main(["ui", "--run", str(over[0]), *flags]) == 2
    told = capsys.readouterr().err
    assert reason in told
    assert told.count("\n") == 1


def test_without_its_packages_it_says_what_to_install(over, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["ui", "--run", str(over[0])]) == 2
    assert capsys.readouterr().err == 'ftray ui: error: the page needs uvicorn: pip install "ftray[serve]"\n'


def test_a_port_that_is_taken_is_one_line(over, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["ui", "--run", str(over[0]), "--port", port]) == 2
    assert f"can't listen on 127.0.0.1:{port}: Address already in use: choose another" in capsys.readouterr().err


def test_the_time_left_does_not_jump():
    """A search that validates now and then, whose speed changes: what is told falls with the clock, or bends."""
    draw, left, now, seen, told = random.Random(0), TimeLeft(), 0.0, 0.0, []
    while seen < 60_000:
        validates = draw.random() < 0.1
        now += 2
        seen += 0 if validates else draw.uniform(80, 120) * (0.5 if seen > 30_000 else 1)
        told.append((now, left.look(now, seen, 60_000 - seen)))
    known = [(at, seconds) for at, seconds in told if seconds is not None]
    assert known[0][0] <= 8
    early = [(at, seconds) for at, seconds in known if at > 60]
    assert all(abs(b - (a - 2)) <= 0.02 * a + 2 for (_, a), (_, b) in pairwise(early))
    end = known[-1][0]
    assert known[-10][1] == pytest.approx(end - known[-10][0], abs=30)
    middle = next(seconds for at, seconds in known if at > 100)
    assert left.look(now + 600, seen, 100, trains=False) == left.look(now + 900, seen, 100, trains=False)
    assert middle > 600


def test_records_to_come_are_what_a_search_trains_on_average():
    """Against many searches in which chance decides at each cut."""
    known = [Rung(100, 1 / 4), Rung(200, 1 / 8), Rung(800, 0.0)]
    draw = random.Random(0)

    def trial(seen):
        for rung, share in zip(known, (1 / 4, 1 / 2, 0), strict=True):
            if rung.records >= seen and (rung.records == 800 or draw.random() >= share):
                return rung.records
        return 800

    for seen in (0, 60, 100, 150, 200, 500):
        mean = sum(trial(seen) - seen for _ in range(40_000)) / 40_000
        assert expected(known, seen) == pytest.approx(mean, rel=0.04)
    cfg = config_from({"search": {"trials": 8, "finalist_seeds": 3}, "data": {"source": "x"}, "task": "CAUSAL_LM",
                       "training": {"batch_size": 1}})  # fmt: skip
    work, own = Workload(cfg, 800), rungs(800, cfg)
    assert work.left(0, {}, 0, []) == pytest.approx(8 * expected(own, 0) + 4 * 800)
    assert work.left(8, {0: 300}, 4, [700]) == 500 + 100
    assert [said(s) for s in (3, 44, 100, 7200)] == [
        "about 10 s left",
        "about 40 s left",
        "about 2 min left",
        "about 2.0 h left",
    ]
    assert math.isclose(expected(known, 800), 0)
