"""A real headless Chromium. Without it these tests fail: a page that no browser has drawn is no evidence."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
    "--window-size=1400,1000",
)


class Browser:
    """One window; `shot` saves a picture of it."""

    def __init__(self, driver, output):
        self.driver = driver
        self._output = output

    def open(self, url):
        self.driver.get(url)

    def until(self, script, seconds=60.0):
        """Waits until a JavaScript expression is true and returns its value."""
        end = time.monotonic() + seconds
        while not (value := self.driver.execute_script(f"return {script}")):
            assert time.monotonic() < end, f"never true in the page: {script}"
            time.sleep(0.2)
        return value

    def type_into(self, selector, text):
        self.until(f"document.querySelector({json.dumps(selector)})")
        self.driver.find_element("css selector", selector).send_keys(text)

    def text(self):
        return self.driver.execute_script("return document.body.innerText")

    def errors(self):
        return [e for e in self.driver.get_log("browser") if e["level"] == "SEVERE"]

    def requests(self):
        """Returns the addresses that the page has requested, from Chromium's own log."""
        asked = []
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                asked.append(message["params"]["request"]["url"])
        return asked

    def shot(self, name, *, whole=False):
        if whole:
            height = self.driver.execute_script("return document.documentElement.scrollHeight")
            self.driver.set_window_size(1400, min(int(height) + 20, 6000))
            time.sleep(1.0)
        file = self._output / f"{name}.png"
        assert self.driver.save_screenshot(str(file))
        assert file.stat().st_size > 10_000, "an empty picture"


@pytest.fixture
def browser(tmp_path):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    assert chromium and chromedriver, "apt-get install -y --no-install-recommends chromium chromium-driver"
    output = Path(os.environ.get("PIPELINE_CI_OUTPUT") or "build/ci-output") / "screenshots"
    output.mkdir(parents=True, exist_ok=True)
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path}/profile"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(chromedriver))
    window = Browser(driver, output)
    try:
        window.open("about:blank")
        window.requests()  # drops what Chromium's own first page has requested
        yield window
    finally:
        driver.quit()
