"""A real browser for the tests of pages: Chromium without a window."""

import shutil

import pytest


@pytest.fixture
def browse(tmp_path):
    """Opens a file at a width; gives selenium's driver."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    driver_program = shutil.which("chromedriver")
    if not program or not driver_program:
        pytest.skip("needs Chromium and its driver")
    opened = []

    def open_page(path, width=1280, dark=False):
        options = webdriver.ChromeOptions()
        options.binary_location = program
        for flag in ("headless", "no-sandbox", "disable-gpu", "disable-background-networking", "no-first-run",
                     "disable-component-update", "disable-sync", f"user-data-dir={tmp_path / 'profile'}"):  # fmt: skip
            options.add_argument(f"--{flag}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver_program))
        opened.append(driver)
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        driver.get(path.as_uri())
        return driver

    yield open_page
    for driver in opened:
        driver.quit()


def clipped(driver):
    """The texts that stick out of their element or of the window; what scrolls on purpose is left out."""
    script = """return [...document.querySelectorAll(
        'button, h1, h2, h3, p, label, select, .legend span, .tile, .bars > *, figcaption, .readout')].filter(
        e => e.offsetParent && !e.closest('.table') && (e.scrollWidth > e.clientWidth + 1 && e.clientWidth
            || e.getBoundingClientRect().right > innerWidth + 0.5)).map(e => e.textContent)"""
    return driver.execute_script(script)
