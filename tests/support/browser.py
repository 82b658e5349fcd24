"""Headless Chromium for the tests of HTML pages."""

import base64
import io
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


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
        options, profile = webdriver.ChromeOptions(), tmp_path / f"profile-{len(drivers)}"
        options.binary_location = browser
        for flag in ("headless", "no-sandbox", "disable-gpu", "disable-background-networking", "no-first-run",
                     "disable-component-update", "disable-sync", f"user-data-dir={profile}",
                     "use-fake-device-for-media-stream", "use-fake-ui-for-media-stream"):  # fmt: skip
            options.add_argument(f"--{flag}")
        if not mobile:  # a headless browser has no mouse otherwise
            options.add_argument("--blink-settings=availableHoverTypes=2,primaryHoverType=2")
        options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path)})
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver_program))
        drivers.append(driver)
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": mobile}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": mobile, "maxTouchPoints": 2})
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


@pytest.fixture
def open_page(browse):
    """Return a function that opens the page of a server."""
    return lambda client, width=1280, dark=False: browse(str(client.base_url), width, dark, mobile=width < 500)


def wait(driver, script, seconds=60):
    end = time.monotonic() + seconds
    while not (value := driver.execute_script(f"return {script}")):
        assert time.monotonic() < end, script
        time.sleep(0.05)
    return value


def choose_files(driver, *paths, until="state.image?.result && document.getElementById('busy').hidden"):
    driver.find_element("id", "file").send_keys("\n".join(map(str, paths)))
    wait(driver, until)


def count_elements(driver, selector):
    return driver.execute_script(f"return document.querySelectorAll({json.dumps(selector)}).length")


def text_of(driver, name):
    return driver.find_element("id", name).text


def drop(driver, data, name, kind):
    """Drop a file on the page."""
    script = "document.body.dispatchEvent(new DragEvent('drop', {dataTransfer: t, bubbles: true, cancelable: true}))"
    driver.execute_script(transfer(data, name, kind) + script)


def wait_for_file(path, seconds=20):
    """Wait for a download and return its path."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, path
        time.sleep(0.05)
    return path


def console_errors(driver):
    return [entry["message"] for entry in driver.get_log("browser")]


def transfer(data, name, kind):
    return f"""const t = new DataTransfer();
        t.items.add(new File([Uint8Array.from(atob('{base64.b64encode(data).decode()}'), c => c.charCodeAt(0))],
            '{name}', {{type: '{kind}'}}));"""


def set_score(driver, value):
    driver.execute_script(
        "const s = document.getElementById('score'); s.value = arguments[0]; s.dispatchEvent(new Event('input'))", value
    )


def read_canvas(driver, canvas):
    """Return the RGBA pixels (height, width, 4) of a canvas."""
    data = driver.execute_script(f"return {canvas}.toDataURL().split(',')[1]")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
