"""The page in a browser at two widths, light and dark: nothing overlaps, is cut off or leaves the screen.

Set SCREENSHOTS to a folder to save what was seen, and MODEL and PHOTOS to choose its content.
"""

import base64
import glob
import os
from pathlib import Path

import pytest

from deformable_detr.detector import load_detector
from tests.support.browser import choose_files, drop, set_score, wait
from tests.support.server import encode_image, running_server, small_model, write_photo

pytestmark = pytest.mark.slow

SIZES = pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, False), (390, True)])
TOKEN = "a-token-of-enough-letters"
NAMES = tuple(f"{kind} {place}" for kind in ("bird", "traffic light", "potted plant", "car") for place in range(1, 21))


@pytest.fixture(scope="module")
def client():
    model_folder = os.environ.get("MODEL")
    with running_server(load_detector(model_folder) if model_folder else small_model(decoder_layers=3)) as client:
        yield client


@SIZES
def test_images(open_page, client, tmp_path, width, dark):
    driver, name = open_page(client, width, dark), f"{width}{'-dark' * dark}.png"
    wait(driver, "state.model")
    background = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (not dark)
    check(driver, f"first-{name}")
    photos = glob.glob(os.environ["PHOTOS"]) if "PHOTOS" in os.environ else [write_photo(tmp_path)]
    choose_files(driver, photos[0])
    set_score(driver, 0.3)
    check(driver, f"result-{name}")
    driver.execute_script("select(visible()[0][0], true)")
    wait(driver, "document.querySelector('#points .point')")
    check(driver, f"explained-{name}")
    choose_files(driver, *photos[:3], write_photo(tmp_path, "a long name " * 8 + ".png"))
    driver.execute_script("step(1)")
    wait(driver, "state.image?.result")
    check(driver, f"several-{name}")
    driver.execute_script("zoom.set(3)")
    check(driver, f"zoomed-{name}")
    drop(driver, encode_image("JPEG")[:20], "damaged.jpg", "image/jpeg")
    wait(driver, "state.image.error")
    check(driver, f"bad-{name}")
    driver.find_element("id", "camera").click()
    wait(driver, "document.getElementById('video').videoWidth")
    check(driver, f"camera-{name}")
    driver.find_element("id", "cancel").click()
    driver.find_element("id", "example").click()
    wait(driver, "state.image?.result && state.image.name === 'example.jpg'")
    check(driver, f"example-{name}")


@SIZES
def test_many_classes(open_page, tmp_path, width, dark):
    model = small_model(num_classes=80, class_names=NAMES, category_ids=tuple(range(1, 81)), num_queries=60)
    with running_server(model) as client:
        driver = open_page(client, width, dark)
        wait(driver, "state.model")
        driver.find_element("id", "example").click()
        wait(driver, "state.image?.result")
        set_score(driver, 0.05)
        check(driver, f"classes-{width}{'-dark' * dark}.png")


@SIZES
def test_wrong_token(open_page, width, dark):
    with running_server(token=TOKEN) as client:
        driver = open_page(client, width, dark)
        wait(driver, "!document.getElementById('access').hidden")
        driver.find_element("id", "token").send_keys("wrong\n")
        wait(driver, "document.getElementById('error').textContent.includes('wrong')")
        check(driver, f"token-{width}{'-dark' * dark}.png")


def check(driver, name):
    """Assert that the page has no clipped or overlapping elements and fits the screen; save a screenshot."""
    if "SCREENSHOTS" in os.environ:
        full = driver.execute_script("return !document.querySelector('.zoomed')")  # which a full one would scroll
        image = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": full})["data"]
        (Path(os.environ["SCREENSHOTS"]) / name).write_bytes(base64.b64decode(image))
    script = """const parts = 'button, h1, p, label, .control > span, input[type=range], .legend, output';
        const shown = [...document.querySelectorAll(parts)]
        .filter(e => e.offsetParent && (e.textContent.trim() || e.tagName !== 'P') && !e.closest('#found, #classes'));
        const clipped = shown.filter(e => (e.scrollWidth > e.clientWidth + 1 && e.clientWidth && e.id !== 'step-now')
            || e.getBoundingClientRect().right > innerWidth + 0.5);
        const rects = shown.map(e => [e, e.getBoundingClientRect()]);
        const lying = rects.filter(([e, a], i) => rects.some(([f, b], j) => i < j && !e.contains(f) && !f.contains(e)
            && a.x < b.right - 1 && b.x < a.right - 1 && a.y < b.bottom - 1 && b.y < a.bottom - 1));
        return [...clipped, ...lying.map(([e]) => e)].map(e => e.outerHTML.slice(0, 80))"""
    assert driver.execute_script(script) == [], name
    assert driver.execute_script("return document.documentElement.scrollWidth <= innerWidth"), name
