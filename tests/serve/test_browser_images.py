"""The page in a browser: several images, bad ones, zoom, camera, token, and the picture that it saves."""

import json
import re
import time

import numpy as np
import pytest
from PIL import Image

from deformable_detr.visualize.draw import PALETTE
from tests.support.browser import (
    choose_files,
    console_errors,
    count_elements,
    drop,
    set_score,
    text_of,
    wait,
    wait_for_file,
)
from tests.support.server import encode_image, running_server, small_model, write_photo

pytestmark = pytest.mark.slow

TOKEN = "a-token-of-enough-letters"
SVG = b"<svg xmlns='http://www.w3.org/2000/svg' width='80' height='60'><rect width='40' height='30'/></svg>"
NAMES = tuple(f"class number {k}" for k in range(80))
DONE = "state.image && !state.image.request && (state.image.result || state.image.error)"


@pytest.fixture(scope="module")
def client():
    with running_server(small_model()) as client:
        yield client


@pytest.fixture
def page(open_page, client):
    driver = open_page(client)
    wait(driver, "state.model")
    return driver


def shown(driver):
    """Return what the page shows of an image: the picture, its description, boxes and the list beside it."""
    picture = driver.find_element("id", "picture")
    return [
        picture.is_displayed() and "stale" not in picture.get_attribute("class"),
        driver.find_element("id", "image").get_attribute("alt") or "",
        count_elements(driver, "#boxes .hit") > 0,
        driver.find_element("id", "side").is_displayed(),
    ]


@pytest.mark.parametrize(
    ("data", "name", "kind", "reason"),
    [
        (SVG, "x.svg", "image/svg+xml", "the browser cannot read this file as an image"),
        (b"text", "notes.txt", "text/plain", "the browser cannot read this file as an image"),
        (b"no image", "x.jpg", "image/jpeg", "unsupported format"),
        (encode_image("JPEG", 200, 200)[:3000], "x.jpg", "image/jpeg", "truncated"),
    ],
)
def test_bad_image_replaces_the_previous_one(page, data, name, kind, reason):
    drop(page, encode_image(), "good.png", "image/png")
    wait(page, DONE)
    set_score(page, 0.05)
    assert shown(page) == [True, "good.png", True, True]
    assert text_of(page, "error") == ""
    drop(page, data, name, kind)
    wait(page, f"{DONE} && state.image.name === {json.dumps(name)}")
    time.sleep(0.3)
    assert reason in text_of(page, "error").lower()
    assert text_of(page, "error").startswith(f"{name}: ")
    assert text_of(page, "status") == ""
    is_shown, alt, *results = shown(page)
    assert results == [False, False]
    assert is_shown == (reason == "truncated")  # browsers show the first rows of a truncated JPEG
    assert alt == (name if is_shown else "")
    assert page.find_element("id", "empty").is_displayed() == (not is_shown)
    drop(page, encode_image(), "good.png", "image/png")
    wait(page, f"{DONE} && state.image.name === 'good.png'")
    assert shown(page) == [True, "good.png", True, True]
    assert text_of(page, "error") == ""


def test_several_images(page, client, tmp_path):
    """Each is detected once, when it is first shown."""
    (tmp_path / "b.png").write_bytes(b"not an image")
    paths = write_photo(tmp_path, "a.png"), tmp_path / "b.png", write_photo(tmp_path, "c.png", seed=1)
    count = client.engine.metrics.images._value.get
    before = count()
    choose_files(page, *paths)
    assert text_of(page, "step-now") == "1 of 3: a.png"
    assert not page.find_element("id", "previous").is_enabled()
    first = page.execute_script("return results()")
    following = page.find_element("id", "next")
    following.click()
    wait(page, f"{DONE} && state.image.name === 'b.png'")
    assert text_of(page, "error").startswith("b.png: ")
    following.click()
    wait(page, f"{DONE} && state.image.name === 'c.png'")
    assert text_of(page, "step-now") == "3 of 3: c.png"
    assert not following.is_enabled()
    assert page.execute_script("return results()")["detections"] != first["detections"]
    assert count() - before == 2
    page.execute_script("step(-2)")
    wait(page, "state.image.name === 'a.png' && document.getElementById('image').alt === 'a.png'")
    assert page.execute_script("return results()") == first
    assert shown(page)[0]
    assert count() - before == 2
    choose_files(page, paths[2])
    assert not page.find_element("id", "steps").is_displayed()


def test_image_that_was_left_early_is_detected_later(page, tmp_path):
    page.execute_script(
        """const original = prepare;
        prepare = async (file) => { await new Promise((go) => setTimeout(go, 800)); return original(file); };"""
    )
    choose_files(
        page, *(write_photo(tmp_path, f"{name}.png", seed=seed) for seed, name in enumerate("ab")), until="true"
    )
    for change in (1, -1):
        page.execute_script("step(arguments[0])", change)
    wait(page, "state.image.result")
    assert text_of(page, "step-now") == "1 of 2: a.png"
    assert page.execute_script("return state.images.map((image) => Boolean(image.result))") == [True, False]
    assert console_errors(page) == []


def test_zoom(page, tmp_path):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.actions.wheel_input import ScrollOrigin

    choose_files(page, write_photo(tmp_path))
    set_score(page, 0.05)
    image = page.find_element("id", "image")

    def at(x, y):
        """The point of the image, as shares of its sides, at a point of the screen."""
        rect = page.execute_script(
            "const r = arguments[0].getBoundingClientRect(); return [r.x, r.y, r.width, r.height]", image
        )
        return (x - rect[0]) / rect[2], (y - rect[1]) / rect[3]

    def label_height():
        return page.execute_script("return document.querySelector('.label rect').getBoundingClientRect().height")

    def unlabeled():
        return count_elements(page, "#boxes .hit") - count_elements(page, "#labels .label")

    width, crowded = image.size["width"], unlabeled()
    assert label_height() == pytest.approx(16, abs=0.1)
    origin = ScrollOrigin.from_viewport(300, 250)
    point = at(300, 250)
    ActionChains(page).scroll_from_origin(origin, 0, -300).perform()
    wait(page, "zoom.factor > 1.9")
    assert image.size["width"] == pytest.approx(2 * width, rel=0.02)
    assert at(300, 250) == pytest.approx(point, abs=0.01)
    assert label_height() == pytest.approx(16, abs=0.1)
    visible = page.execute_script(
        """const rect = (element) => element.getBoundingClientRect(), f = rect(byId('frame'));
        return [...document.querySelectorAll('.label rect')].map(rect).every((r) => r.left >= f.left - 1
            && r.right <= f.right + 1 && r.top >= f.top - 1 && r.bottom <= f.bottom + 1)"""
    )
    assert visible
    # The mouse moves the picture, without selecting what it is released on.
    ActionChains(page).move_by_offset(300, 250).click_and_hold().move_by_offset(60, 40).release().perform()
    assert at(360, 290) == pytest.approx(point, abs=0.01)
    assert page.execute_script("return state.pinned") == -1
    for _ in range(3):
        page.find_element("id", "zoom-out").click()
    assert image.size["width"] == pytest.approx(width, abs=1)
    assert not page.find_element("id", "zoom-out").is_enabled()
    for _ in range(5):
        page.find_element("id", "zoom-in").click()
    assert page.execute_script("return zoom.factor") == pytest.approx(1.5**5)
    assert unlabeled() < crowded or crowded == 0
    choose_files(page, write_photo(tmp_path, "b.png"))
    assert page.execute_script("return zoom.factor") == 1


def test_pinch(open_page, client, tmp_path):
    page = open_page(client, width=390)
    wait(page, "state.model")
    choose_files(page, write_photo(tmp_path))

    def touch(kind, *xs):
        points = [{"x": x, "y": 200, "id": number} for number, x in enumerate(xs)]
        page.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    touch("touchStart", 150, 250)
    touch("touchMove", 100, 300)
    touch("touchEnd")
    assert page.execute_script("return zoom.factor") == pytest.approx(2)
    assert page.execute_script("return visualViewport.scale") == 1


def test_saved_picture(page, tmp_path):
    source = Image.open(write_photo(tmp_path)).convert("RGB")
    choose_files(page, tmp_path / "a photo.png")
    best, second = page.execute_script("return detections().slice(0, 2)")
    set_score(page, round((best["score"] + second["score"]) / 2, 2) if best["score"] - second["score"] > 0.02 else 0.05)
    boxes = page.execute_script("return visible().map(([, { box, label }]) => [...box, label])")
    page.find_element("id", "save-picture").click()
    path = wait_for_file(tmp_path / "a photo-detections.png")
    saved = np.asarray(Image.open(path).convert("RGB"))
    assert saved.shape == (96, 128, 3)
    for x1, y1, x2, y2, label in boxes:
        edge = saved[max(int(y1) - 1, 0) : int(y2) + 2, max(int(x1) - 1, 0) : int(x2) + 2]
        assert (edge == tuple(bytes.fromhex(PALETTE[label][1:]))).all(axis=2).sum() > 10
    path.unlink()
    page.find_element("xpath", "//*[@id='classes']/button[text()='none'] | //*[@id='classes']/button[1]").click()
    set_score(page, 1)
    page.find_element("id", "save-picture").click()
    saved = np.asarray(Image.open(wait_for_file(path)).convert("RGB"))
    assert (saved == np.asarray(source)).all()


def test_many_classes_have_distinct_boxes_and_labels(open_page, tmp_path):
    model = small_model(num_classes=80, class_names=NAMES, category_ids=tuple(range(1, 81)), num_queries=30)
    with running_server(model) as client:
        page = open_page(client)
        wait(page, "state.model")
        choose_files(page, write_photo(tmp_path))
        set_score(page, 0.05)
        labels = page.execute_script("return detections().map(({ label }) => label)")
        styles = page.execute_script("return detections().map(({ label }) => Object.values(styleOf(label)).join())")
        order = list(dict.fromkeys(labels))
        assert len(order) > len(PALETTE)
        by_label = dict(zip(labels, styles, strict=True))
        assert len({by_label[label] for label in order[:28]}) == len(order[:28])
        assert [by_label[label].split(",")[0] for label in order[:7]] == list(PALETTE)
        lines = page.execute_script(
            """return [...document.querySelectorAll('#boxes .hit')].map((g) => [+g.dataset.item,
                `${g.lastChild.getAttribute('stroke')},${g.lastChild.getAttribute('stroke-dasharray') ?? ''}`])"""
        )
        assert {index: styles[index] for index, _ in lines} == dict(lines)


def test_few_classes_have_the_colors_of_drawings(page, tmp_path):
    choose_files(page, write_photo(tmp_path))
    styles = page.execute_script("return state.model.classes.map(({ label }) => Object.values(styleOf(label)))")
    assert styles == [[color, None] for color in PALETTE[:3]]


def test_filter_chips_do_not_look_like_the_main_button(page, tmp_path):
    choose_files(page, write_photo(tmp_path))
    set_score(page, 0.05)
    chip, main = page.find_element("css selector", "#classes button"), page.find_element("id", "choose")

    def look(element):
        return [element.value_of_css_property(name) for name in ("background-color", "text-decoration-line")]

    on = look(chip)
    assert on[0] != look(main)[0]
    chip.click()
    assert look(chip)[0] != look(main)[0]
    assert look(chip) != on


def test_words_fit_the_device(open_page, client, tmp_path):
    explains = "points that the model sampled"
    words = {}
    for width in (1280, 390):
        page = open_page(client, width)
        wait(page, "state.model")
        text = text_of(page, "invitation")
        choose_files(page, write_photo(tmp_path))
        set_score(page, 0.05)
        words[width] = f"{text} {text_of(page, 'status')}".lower()
        assert explains in words[width]
        assert re.search(r"found in \d+\.\d\d s\.", words[width])
    assert all(word in words[1280] for word in ("drop", "paste", "hover"))
    assert not any(word in words[390] for word in ("drop", "paste", "hover", "click"))


def test_example(page, client):
    page.find_element("id", "example").click()
    wait(page, "state.image?.result")
    assert page.execute_script("return [state.image.name, state.image.result.width]") == ["example.jpg", 510]
    assert client.get("/example.jpg").headers["content-type"] == "image/jpeg"
    assert shown(page)[:2] == [True, "example.jpg"]
    assert console_errors(page) == []


def test_camera(page, tmp_path):
    ready = "!document.getElementById('video').hidden && document.getElementById('video').videoWidth"
    choose_files(page, write_photo(tmp_path))
    set_score(page, 0.05)
    status = text_of(page, "status")
    page.find_element("id", "camera").click()
    wait(page, ready)
    assert shown(page) == [False, "", False, False]
    assert text_of(page, "status") == ""
    page.find_element("id", "cancel").click()
    wait(page, "!document.getElementById('picture').hidden")
    assert page.execute_script("return state.camera === null && document.getElementById('video').hidden")
    assert shown(page) == [True, "a photo.png", True, True]
    assert text_of(page, "status") == status
    page.find_element("id", "camera").click()
    wait(page, ready)
    page.find_element("id", "shoot").click()
    wait(page, "state.image?.result && state.image.name === 'camera.jpg'")
    assert page.execute_script("return state.camera === null")
    assert shown(page)[:2] == [True, "camera.jpg"]
    assert console_errors(page) == []


def test_token(open_page, tmp_path):
    with running_server(token=TOKEN) as client:
        page = open_page(client)
        wait(page, "!document.getElementById('access').hidden")
        assert text_of(page, "error") == "This server needs an access token."
        choose_files(page, write_photo(tmp_path), until="true")
        field = page.find_element("id", "token")
        field.send_keys("another-token-of-enough-letters\n")
        wait(page, "document.getElementById('error').textContent === 'The access token is wrong.'")
        assert page.find_element("id", "access").is_displayed()
        field.send_keys(TOKEN)  # replaces the wrong one, which is selected
        page.find_element("css selector", "#access button").click()
        wait(page, "state.image?.result")  # of the file that was chosen before
        assert not page.find_element("id", "access").is_displayed()
        assert text_of(page, "error") == ""
        assert page.execute_script("return state.image.result.width") == 128
        assert TOKEN not in page.current_url
