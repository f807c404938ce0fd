"""Take the pictures of the live page, once its figures stand still.

    python docs/ui.py search URL            # a search that runs, at the URL that it has printed: live.png, beside this
    python docs/ui.py compare URL PROMPT    # docs/page.png: an endpoint, which answers once before, to be warm

Needs Debian's chromium and chromium-driver, selenium, and FTRAY_API_KEY where the page has a key of its user's.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.ui import WebDriverWait


@contextmanager
def opened(url: str, size: str) -> Iterator[WebDriver]:
    options = webdriver.ChromeOptions()
    for flag in ("headless", "no-sandbox", "disable-gpu", "hide-scrollbars", f"window-size={size}"):
        options.add_argument(f"--{flag}")
    options.binary_location = shutil.which("chromium")
    with webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver"))) as browser:
        browser.get(url)
        wait = WebDriverWait(browser, 30)
        wait.until(lambda _: browser.find_elements("css selector", "main > :not([hidden])"))
        if browser.find_element("id", "key").is_displayed():
            browser.find_element("id", "key").send_keys(os.environ["FTRAY_API_KEY"] + Keys.TAB)
        yield browser


def search(url: str) -> None:
    """Wait until the time left can be told and curves have been drawn."""
    with opened(url, "1200,1500") as browser:
        wait = WebDriverWait(browser, 900)
        wait.until(lambda _: "about" in browser.find_element("id", "cards").text)
        wait.until(lambda _: len(browser.find_elements("css selector", "#fig-curves .mark")) > 1)
        wait.until(lambda _: browser.find_elements("css selector", "tr.best"))
        browser.save_screenshot(str(Path(__file__).with_name("live.png")))


def compare(url: str, prompt: str) -> None:
    """Ask twice: the first answers are those of an endpoint that has yet to load what they need."""
    with opened(url, "880,1000") as browser:
        wait = WebDriverWait(browser, 120)
        browser.execute_script("location.hash = 'compare'")
        wait.until(lambda _: browser.find_element("id", "leaderboard").text)
        browser.find_element("id", "tokens").clear()
        browser.find_element("id", "tokens").send_keys("24")
        browser.find_element("id", "prompt").send_keys(prompt)
        for _ in range(2):
            browser.find_element("id", "prompt").send_keys(Keys.CONTROL + Keys.ENTER)
            wait.until(lambda _: browser.find_element("id", "stop").get_property("disabled"))
            wait.until(lambda _: all(browser.find_element("id", f"speed-{side}").text for side in (0, 1)))
        browser.save_screenshot(str(Path(__file__).with_name("page.png")))


if __name__ == "__main__":
    {"search": search, "compare": compare}[sys.argv[1]](*sys.argv[2:])
