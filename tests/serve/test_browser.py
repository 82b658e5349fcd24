"""The page in a browser: choose, hover, filter, keyboard, paste, drop, camera, download and layout."""

import base64
import io
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deformable_detr.detector import load_detector
from deformable_detr.utils.rle import decode_masks
from tests.support.masks import with_masks
from tests.support.server import encode_image, running_server, small_model

pytestmark = pytest.mark.slow

TOKEN = "a-token-of-enough-letters"


@pytest.fixture(scope="module")
def client():
    model_folder = os.environ.get("MODEL")  # a model folder, for meaningful screenshots
    with running_server(load_detector(model_folder) if model_folder else small_model(decoder_layers=3)) as client:
        yield client


@pytest.fixture(scope="module")
def token_client():
    with running_server(token=TOKEN) as client:
        yield client


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


def choose_file(driver, path):
    driver.find_element("id", "file").send_keys(str(path))
    wait(driver, "state.result && document.getElementById('busy').hidden")


def write_photo(tmp_path, seed=0):
    path = tmp_path / "a photo.png"
    path.write_bytes(encode_image("PNG", 96, 128, seed=seed))
    return path


def set_score(driver, value):
    driver.execute_script(
        "const s = document.getElementById('score'); s.value = arguments[0]; s.dispatchEvent(new Event('input'))", value
    )


def count_elements(driver, selector):
    return driver.execute_script(f"return document.querySelectorAll({json.dumps(selector)}).length")


def text_of(driver, name):
    return driver.find_element("id", name).text


def console_errors(driver):
    return [entry["message"] for entry in driver.get_log("browser")]


def test_choose_hover_filter_and_download(open_page, client, tmp_path):
    from selenium.webdriver import ActionChains, Keys

    driver = open_page(client)
    wait(driver, "state.model")
    choose_file(driver, write_photo(tmp_path))
    set_score(driver, 0.05)
    expected = client.post("/v1/detect", content=write_photo(tmp_path).read_bytes(), params={"threshold": 0.05},
                         headers={"Content-Type": "image/png"}).json()["images"][0]  # fmt: skip
    object_count = len(expected["detections"])
    assert object_count > 3
    assert count_elements(driver, "#boxes .hit") == count_elements(driver, "#found button") == object_count
    assert f"{object_count} objects" in text_of(driver, "status")

    # The boxes on the displayed image are those of the response.
    script = """const i = document.getElementById('image').getBoundingClientRect();
        return [...document.querySelectorAll('.hit')].map(g => {
            const b = g.firstChild.getBoundingClientRect(), w = 128 / i.width, h = 96 / i.height;
            return [+g.dataset.item, (b.x - i.x) * w, (b.y - i.y) * h, (b.right - i.x) * w, (b.bottom - i.y) * h] })"""
    for index, *box in driver.execute_script(script):
        assert box == pytest.approx(expected["detections"][index]["box"], abs=0.5)

    # Hovering shows the sampling points of /v1/explain.
    top = driver.execute_script("return +[...document.querySelectorAll('.hit')].at(-1).dataset.item")
    ActionChains(driver).move_to_element(driver.find_element("css selector", f".hit[data-item='{top}']")).perform()
    wait(driver, "document.querySelector('#points .point')")
    explanation = driver.execute_script("return explanationOf(state.active)")
    assert explanation["label"] == expected["detections"][top]["label"]
    assert count_elements(driver, "#points .point") == len(explanation["layers"][-1]["points"])
    assert "3 of 3" in text_of(driver, "layer-now")
    first = driver.execute_script("return document.querySelector('#points').innerHTML")
    ActionChains(driver).click().perform()  # pins the selection
    driver.find_element("id", "layer").send_keys(Keys.HOME)
    assert "1 of 3" in text_of(driver, "layer-now")
    assert driver.execute_script("return document.querySelector('#points').innerHTML") != first

    # Filters.
    labels = {detection["label"] for detection in expected["detections"]}
    chip = driver.find_element("css selector", "#classes button[data-label]")
    label = int(chip.get_attribute("data-label"))
    chip.click()
    remaining = [item for item in expected["detections"] if item["label"] != label]
    assert count_elements(driver, "#boxes .hit") == len(remaining)
    assert chip.get_attribute("aria-pressed") == "false"
    chip.click()
    if len(labels) > 1:
        driver.find_element("xpath", "//*[@id='classes']/button[text()='none']").click()
        assert count_elements(driver, "#boxes .hit") == 0
        driver.find_element("xpath", "//*[@id='classes']/button[text()='all']").click()
    middle = sorted(detection["score"] for detection in expected["detections"])[object_count // 2]
    set_score(driver, round(middle, 2))
    visible = [item for item in expected["detections"] if item["score"] >= round(middle, 2)]
    assert count_elements(driver, "#boxes .hit") == len(visible) < object_count

    driver.find_element("id", "download").click()
    saved = tmp_path / "a photo.json"
    end = time.monotonic() + 20
    while not saved.exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    content = json.loads(saved.read_text())
    assert [detection["score"] for detection in content["detections"]] == pytest.approx(
        [detection["score"] for detection in visible], abs=1e-4
    )
    assert console_errors(driver) == []


def read_canvas(driver, canvas):
    """Return the RGBA pixels (height, width, 4) of a canvas."""
    data = driver.execute_script(f"return {canvas}.toDataURL().split(',')[1]")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_masks_are_painted_and_can_be_switched_off(open_page, tmp_path):
    with running_server(with_masks(small_model())) as client:
        driver = open_page(client)
        wait(driver, "state.model")
        choose_file(driver, write_photo(tmp_path))
        set_score(driver, 0.05)
        detections = driver.execute_script("return state.result.detections")
        [mask] = decode_masks([detections[0]["mask"]], (96, 128)).numpy()
        driver.execute_script(
            """const { mask } = state.result.detections[0];
            window.small = el("canvas", { width: 128, height: 96 });
            paintMasks(small, [{ mask, color: [255, 0, 0], opacity: FILL }], 1);"""
        )
        pixels = read_canvas(driver, "small")
        rim, outline = pixels[..., 3] * ~mask, mask & (pixels[..., 3] == 255)
        assert set(pixels[mask][:, 3].tolist()) == {110, 255}
        assert (pixels[outline] == [255, 0, 0, 255]).all()
        assert set(rim.ravel().tolist()) == {0, 255}
        assert (pixels[rim > 0] == [26, 26, 26, 255]).all()

        def painted():
            return np.count_nonzero(read_canvas(driver, "byId('masks')")[..., 3])

        everything = painted()
        driver.execute_script("select(0)")
        assert 0 < painted() < everything
        driver.execute_script("select(-1)")
        assert painted() == everything
        toggle = driver.find_element("id", "show-masks")
        toggle.click()
        assert painted() == 0
        assert toggle.get_attribute("aria-pressed") == "false"
        toggle.click()
        assert painted() == everything
        set_score(driver, 1)
        assert painted() == 0
        assert console_errors(driver) == []


def test_no_masks_without_a_model_that_has_them(open_page, client, tmp_path):
    driver = open_page(client)
    wait(driver, "state.model")
    choose_file(driver, write_photo(tmp_path))
    assert not driver.find_element("id", "show-masks").is_displayed()
    assert count_elements(driver, "#view.masked") == 0


def test_last_chosen_image_is_shown(open_page, client, tmp_path):
    """Even if the first one takes longer to prepare."""
    driver = open_page(client)
    wait(driver, "state.model")
    driver.execute_script(
        """const original = prepare;
        prepare = async (file) => {
          if (file.name === 'slow.png') await new Promise((go) => setTimeout(go, 1500));
          return original(file);
        };"""
    )
    for data, name in (
        (encode_image("PNG", 96, 128, seed=1), "slow.png"),
        (encode_image("PNG", 40, 60, seed=2), "quick.png"),
    ):
        driver.execute_script(transfer(data, name, "image/png") + "detect(t.files[0]);")
    wait(driver, "state.result && document.getElementById('busy').hidden")
    time.sleep(2.5)
    image = driver.execute_script(
        "const i = document.getElementById('image'); return [i.naturalWidth, i.naturalHeight, i.alt]"
    )
    assert image == [60, 40, "quick.png"]
    assert driver.execute_script("return state.file.size") == len(encode_image("PNG", 40, 60, seed=2))
    assert console_errors(driver) == []


def test_keyboard(open_page, client, tmp_path):
    from selenium.webdriver import ActionChains, Keys

    driver = open_page(client)
    wait(driver, "state.model")
    choose_file(driver, write_photo(tmp_path))
    set_score(driver, 0.05)
    focused = []
    driver.execute_script("document.body.focus()")
    for _ in range(60):
        ActionChains(driver).send_keys(Keys.TAB).perform()
        focused.append(
            driver.execute_script("const e = document.activeElement; return e.id || e.dataset.item || e.textContent")
        )
        if focused[-1] == "1":
            break
    for name in ("choose", "camera", "download", "score", "0", "1"):
        assert name in focused
    wait(driver, "document.querySelector('#points .point')")
    assert driver.execute_script("return state.active") == 1
    ActionChains(driver).send_keys(Keys.ENTER).perform()
    assert driver.execute_script("return [state.pinned, document.activeElement.dataset.item]") == [1, "1"]
    ring = driver.execute_script("return getComputedStyle(document.activeElement).outlineStyle")
    assert ring != "none"


def transfer(data, name, kind):
    return f"""const t = new DataTransfer();
        t.items.add(new File([Uint8Array.from(atob('{base64.b64encode(data).decode()}'), c => c.charCodeAt(0))],
            '{name}', {{type: '{kind}'}}));"""


def test_drop_and_paste(open_page, client):
    driver = open_page(client)
    wait(driver, "state.model")
    driver.execute_script(
        transfer(encode_image(), "dropped.png", "image/png")
        + "document.body.dispatchEvent(new DragEvent('drop', {dataTransfer: t, bubbles: true, cancelable: true}))"
    )
    wait(driver, "state.result && state.name === 'dropped.png' && document.getElementById('busy').hidden")
    driver.execute_script(
        transfer(encode_image(seed=1), "pasted.png", "image/png")
        + "document.body.dispatchEvent(new ClipboardEvent('paste', {clipboardData: t, bubbles: true}))"
    )
    wait(driver, "state.result && state.name === 'pasted.png' && document.getElementById('busy').hidden")
    assert console_errors(driver) == []


def test_unsupported_formats_are_converted_or_reported(open_page, client):
    driver = open_page(client)
    wait(driver, "state.model")
    svg = b"<svg xmlns='http://www.w3.org/2000/svg' width='80' height='60'><rect width='40' height='30'/></svg>"
    for data, kind in (
        (svg, "image/svg+xml"),
        (b"not an image", "image/heic"),
        (b"text", "text/plain"),
    ):
        driver.execute_script(
            transfer(data, "x", kind)
            + "document.body.dispatchEvent(new DragEvent('drop', {dataTransfer: t, bubbles: true, cancelable: true}))"
        )
        wait(
            driver,
            "document.getElementById('busy').hidden && (state.result || document.getElementById('error').textContent)",
        )
        assert "image" in text_of(driver, "error")
    truncated = encode_image("JPEG", 200, 200)[:3000]
    driver.execute_script(
        transfer(truncated, "x.jpg", "image/jpeg")
        + "document.body.dispatchEvent(new DragEvent('drop', {dataTransfer: t, bubbles: true, cancelable: true}))"
    )
    wait(driver, "document.getElementById('error').textContent.includes('truncated')")


def test_saved_boxes_refer_to_the_original_image(open_page, client, tmp_path):
    driver = open_page(client)
    wait(driver, "state.model")
    driver.execute_script("state.model.limits.body_bytes = 1000")  # forces conversion
    choose_file(driver, write_large_image(tmp_path, 5000, 3001))
    set_score(driver, 0.05)
    sent, saved = driver.execute_script("return [state.result, results()]")
    assert sent["width"] * sent["height"] <= 12.1e6
    assert [saved["width"], saved["height"]] == [5000, 3001]
    assert len(saved["detections"]) == len(sent["detections"]) > 3
    scale = [5000 / sent["width"], 3001 / sent["height"]]
    for saved_item, sent_item in zip(saved["detections"], sent["detections"], strict=True):
        assert saved_item["box"] == pytest.approx(
            [side * scale[i % 2] for i, side in enumerate(sent_item["box"])], abs=0.1
        )
    assert console_errors(driver) == []


def write_large_image(tmp_path, width, height):
    path = tmp_path / "large.png"
    small = Image.open(io.BytesIO(encode_image("PNG", 96, 128)))
    small.resize((width, height)).save(path, compress_level=1)
    return path


def test_camera(open_page, client):
    driver = open_page(client)
    wait(driver, "state.model")
    driver.find_element("id", "camera").click()
    wait(driver, "!document.getElementById('video').hidden && document.getElementById('video').videoWidth")
    driver.find_element("id", "cancel").click()
    assert driver.execute_script("return state.camera === null && document.getElementById('video').hidden")
    driver.find_element("id", "camera").click()
    wait(driver, "!document.getElementById('video').hidden && document.getElementById('video').videoWidth")
    driver.find_element("id", "shoot").click()
    wait(driver, "state.result && state.name === 'camera.jpg'")
    assert driver.execute_script("return state.camera === null")
    assert console_errors(driver) == []


def test_token(open_page, token_client, tmp_path):
    driver = open_page(token_client)
    wait(driver, "!document.getElementById('access').hidden")
    assert "token" in text_of(driver, "error")
    driver.find_element("id", "token").send_keys(TOKEN)
    driver.find_element("css selector", "#access button").click()
    wait(driver, "state.model && document.getElementById('access').hidden")
    choose_file(driver, write_photo(tmp_path))
    assert driver.execute_script("return state.result.width") == 128
    assert TOKEN not in driver.current_url


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_layout(open_page, client, tmp_path, width, dark):
    """Set SCREENSHOTS to a folder to save the pages, and MODEL and PHOTO to choose their content."""
    driver = open_page(client, width, dark)
    wait(driver, "state.model")
    pages = [layout_problems(driver, f"empty-{width}-{dark}")]
    choose_file(driver, os.environ.get("PHOTO") or write_photo(tmp_path))
    set_score(driver, 0.3)
    pages.append(layout_problems(driver, f"result-{width}-{dark}"))
    driver.execute_script("select(visible()[0][0], true)")
    wait(driver, "document.querySelector('#points .point')")
    pages.append(layout_problems(driver, f"explained-{width}-{dark}"))
    assert pages == [([], True)] * 3
    background = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (not dark)


def layout_problems(driver, name):
    """Return clipped and overlapping elements, and whether the page fits the screen; save a screenshot."""
    if "SCREENSHOTS" in os.environ:
        (Path(os.environ["SCREENSHOTS"]) / f"{name}.png").write_bytes(
            base64.b64decode(driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})["data"])
        )
    script = """const parts = 'button, h1, p, label, .control > span, input[type=range], .legend';
        const shown = [...document.querySelectorAll(parts)]
        .filter(e => e.offsetParent && (e.textContent.trim() || e.tagName !== 'P') && !e.closest('#found'));
        const clipped = shown.filter(e => (e.scrollWidth > e.clientWidth + 1 && e.clientWidth)
            || e.getBoundingClientRect().right > innerWidth + 0.5);
        const rects = shown.map(e => [e, e.getBoundingClientRect()]);
        const lying = rects.filter(([e, a], i) => rects.some(([f, b], j) => i < j && !e.contains(f) && !f.contains(e)
            && a.x < b.right - 1 && b.x < a.right - 1 && a.y < b.bottom - 1 && b.y < a.bottom - 1));
        return [...clipped, ...lying.map(([e]) => e)].map(e => e.outerHTML.slice(0, 80))"""
    return driver.execute_script(script), driver.execute_script(
        "return document.documentElement.scrollWidth <= innerWidth"
    )
