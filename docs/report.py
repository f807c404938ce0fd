"""Take docs/report.png: the report of a run, as one sees it first.

    python docs/report.py runs/demo

Needs Debian's chromium and chromium-driver, and selenium.
"""

import shutil
import sys
from pathlib import Path

from selenium import webdriver

from ftray.reports.page import write_report
from ftray.storage.location import parse_location


def main(run: str) -> None:
    page = Path(write_report(parse_location(run)).path)
    options = webdriver.ChromeOptions()
    for flag in ("headless", "no-sandbox", "disable-gpu", "hide-scrollbars", "window-size=1200,1500"):
        options.add_argument(f"--{flag}")
    options.binary_location = shutil.which("chromium")
    with webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver"))) as browser:
        browser.get(page.absolute().as_uri())
        browser.save_screenshot(str(Path(__file__).with_name("report.png")))


if __name__ == "__main__":
    main(*sys.argv[1:])
