"""Take docs/page.png: the page of an endpoint that serves a run, after it has answered.

    python docs/page.py URL PROMPT

Needs Debian's chromium and chromium-driver, selenium, and FTRAY_API_KEY where the endpoint has a key.
"""

import os
import shutil
import sys
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait


def main(url: str, prompt: str) -> None:
    options = webdriver.ChromeOptions()
    for flag in ("headless", "no-sandbox", "disable-gpu", "hide-scrollbars", "window-size=880,1000"):
        options.add_argument(f"--{flag}")
    options.binary_location = shutil.which("chromium")
    with webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver"))) as browser:
        browser.get(url)

        def shown(name: str) -> str:
            return browser.find_element("id", name).text

        wait = WebDriverWait(browser, 120)
        wait.until(lambda _: shown("leaderboard") or browser.find_element("id", "key").is_displayed())
        if not shown("leaderboard"):
            browser.find_element("id", "key").send_keys(os.environ["FTRAY_API_KEY"] + Keys.TAB)
            wait.until(lambda _: shown("leaderboard"))
        browser.find_element("id", "tokens").clear()
        browser.find_element("id", "tokens").send_keys("24")
        browser.find_element("id", "prompt").send_keys(prompt, Keys.CONTROL + Keys.ENTER)
        wait.until(lambda _: shown("speed-0") and shown("speed-1"))
        browser.save_screenshot(str(Path(__file__).with_name("page.png")))


if __name__ == "__main__":
    main(*sys.argv[1:])
