"""The page in a browser: choose, hover, filter, keyboard, paste, drop, masks and JSON of the results."""

import io
import json
import time

import numpy as np
import pytest
from PIL import Image

from deformable_detr.utils.rle import decode_masks
from tests.support.browser import (
    choose_files,
    console_errors,
    count_elements,
    drop,
    read_canvas,
    set_score,
    text_of,
    transfer,
    wait,
    wait_for_file,
)
from tests.support.masks import with_masks
from tests.support.server import encode_image, running_server, small_model, write_photo

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def client():
    with running_server(small_model(decoder_layers=3)) as client:
        yield client


def test_choose_hover_filter_and_download(open_page, client, tmp_path):
    from selenium.webdriver import ActionChains, Keys

    driver = open_page(client)
    wait(driver, "state.model")
    choose_files(driver, write_photo(tmp_path))
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

    driver.find_element("id", "save-json").click()
    saved = wait_for_file(tmp_path / "a photo.json")
    content = json.loads(saved.read_text())
    assert [detection["score"] for detection in content["detections"]] == pytest.approx(
        [detection["score"] for detection in visible], abs=1e-4
    )
    assert console_errors(driver) == []


def test_masks_are_painted_and_can_be_switched_off(open_page, tmp_path):
    with running_server(with_masks(small_model())) as client:
        driver = open_page(client)
        wait(driver, "state.model")
        choose_files(driver, write_photo(tmp_path))
        set_score(driver, 0.05)
        detections = driver.execute_script("return state.image.result.detections")
        [mask] = decode_masks([detections[0]["mask"]], (96, 128)).numpy()
        driver.execute_script(
            """const { mask } = state.image.result.detections[0];
            window.small = el("canvas", { width: 128, height: 96 });
            paintMasks(small, [{ mask, color: [255, 0, 0], opacity: OPACITY }], 1);"""
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
    choose_files(driver, write_photo(tmp_path))
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
        driver.execute_script(transfer(data, name, "image/png") + "openFiles(t.files);")
    wait(driver, "state.image?.result && document.getElementById('busy').hidden")
    time.sleep(2.5)
    image = driver.execute_script(
        "const i = document.getElementById('image'); return [i.naturalWidth, i.naturalHeight, i.alt]"
    )
    assert image == [60, 40, "quick.png"]
    assert driver.execute_script("return state.image.file.size") == len(encode_image("PNG", 40, 60, seed=2))
    assert console_errors(driver) == []


def test_keyboard(open_page, client, tmp_path):
    from selenium.webdriver import ActionChains, Keys

    driver = open_page(client)
    wait(driver, "state.model")
    choose_files(driver, write_photo(tmp_path))
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
    for name in ("choose", "example", "camera", "save-picture", "save-json", "score", "0", "1"):
        assert name in focused
    wait(driver, "document.querySelector('#points .point')")
    assert driver.execute_script("return state.active") == 1
    ActionChains(driver).send_keys(Keys.ENTER).perform()
    assert driver.execute_script("return [state.pinned, document.activeElement.dataset.item]") == [1, "1"]
    ring = driver.execute_script("return getComputedStyle(document.activeElement).outlineStyle")
    assert ring != "none"


def test_drop_and_paste(open_page, client):
    driver = open_page(client)
    wait(driver, "state.model")
    drop(driver, encode_image(), "dropped.png", "image/png")
    wait(driver, "state.image?.result && state.image.name === 'dropped.png' && document.getElementById('busy').hidden")
    driver.execute_script(
        transfer(encode_image(seed=1), "pasted.png", "image/png")
        + "document.body.dispatchEvent(new ClipboardEvent('paste', {clipboardData: t, bubbles: true}))"
    )
    wait(driver, "state.image?.result && state.image.name === 'pasted.png' && document.getElementById('busy').hidden")
    assert console_errors(driver) == []


def test_saved_boxes_refer_to_the_original_image(open_page, client, tmp_path):
    driver = open_page(client)
    wait(driver, "state.model")
    driver.execute_script("state.model.limits.body_bytes = 1000")  # forces conversion
    choose_files(driver, write_large_image(tmp_path, 5000, 3001))
    set_score(driver, 0.05)
    sent, saved = driver.execute_script("return [state.image.result, results()]")
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
