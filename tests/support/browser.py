"""Headless Chromium for the tests of HTML pages."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def browse(tmp_path):
    """Return a function that opens a file or URL at a window width and returns the Selenium driver."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    driver_program = shutil.which("chromedriver")
    if not browser or not driver_program:
        pytest.skip("needs Chromium and its driver")
    drivers = []

    def open_page(page, width=1280, dark=False, mobile=False):
        options = webdriver.ChromeOptions()
        options.binary_location = browser
        for flag in ("headless", "no-sandbox", "disable-gpu", "disable-background-networking", "no-first-run",
                     "disable-component-update", "disable-sync", f"user-data-dir={tmp_path / 'profile'}",
                     "use-fake-device-for-media-stream", "use-fake-ui-for-media-stream"):  # fmt: skip
            options.add_argument(f"--{flag}")
        options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path)})
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver_program))
        drivers.append(driver)
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": mobile}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        driver.get(page.as_uri() if isinstance(page, Path) else page)
        return driver

    yield open_page
    for driver in drivers:
        driver.quit()


def overflowing_texts(driver):
    """Return the texts that overflow their element or the window, scrollable tables excluded."""
    script = """return [...document.querySelectorAll(
        'button, h1, h2, h3, p, label, select, .legend span, .tile, .bars > *, figcaption, .readout')].filter(
        e => e.offsetParent && !e.closest('.table') && (e.scrollWidth > e.clientWidth + 1 && e.clientWidth
            || e.getBoundingClientRect().right > innerWidth + 0.5)).map(e => e.textContent)"""
    return driver.execute_script(script)
