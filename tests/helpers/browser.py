"""A page in a real browser, without a network, and what a person would find wrong with it."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.remote.webdriver import WebDriver

FAINT = (Path(__file__).parent / "contrast.js").read_text()  # returns text of a page that is hard to read


@contextmanager
def opened(
    page: Path | str, profile: Path, width: int = 1200, dark: bool = False, scripts: bool = True
) -> Iterator[WebDriver]:
    """`page` in headless Chromium, in a window of that width; at the end its console must be empty.

    A file is opened without a network.
    """
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs Debian's chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    flags = "headless no-sandbox disable-gpu no-first-run disable-background-networking disable-component-update"
    for flag in [*flags.split(), "disable-sync", "disable-dev-shm-usage", f"user-data-dir={profile}"]:
        options.add_argument(f"--{flag}")
    options.binary_location = shutil.which("chromium")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver"))) as browser:
        file = isinstance(page, Path)
        offline = {"offline": file, "latency": 0, "downloadThroughput": 0 if file else -1, "uploadThroughput": -1}
        browser.execute_cdp_cmd("Network.enable", {})
        browser.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not scripts})
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        browser.get(page.as_uri() if isinstance(page, Path) else page)
        yield browser
        said = console(browser)
        assert said == [], said


def console(browser: WebDriver, levels: tuple[str, ...] = ("SEVERE", "WARNING", "INFO")) -> list[str]:
    """What pages have written to the console since the last call; Chromium's own, which it begins with, are none."""
    said = [entry for entry in browser.get_log("browser") if not entry["message"].startswith("chrome://")]
    return [entry["message"] for entry in said if entry["level"] in levels]
