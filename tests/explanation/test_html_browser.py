"""The page in a browser: hover, click, keyboard and toggles show the right points; layout."""

import pytest
import torch

from deformable_detr.explanation import trace
from deformable_detr.explanation.html import page
from tests.support.browser import overflowing_texts
from tests.support.explanations import HEADS, LEVELS, POINTS, random_image, random_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def traced():
    return trace(random_model(two_stage=True, refine=True), random_image(130, 200), threshold=0.0, top_k=6)


def write_page(text, folder):
    path = folder / "page.html"
    path.write_text(text, encoding="utf-8")
    return path


def displayed_points(driver):
    """Return the (N, 3) x, y and weight of the displayed points, and the set of (level, head)."""
    script = """return [...document.querySelectorAll('.point')].map(
        p => ['x', 'y', 'weight', 'level', 'head'].map(k => +p.dataset[k]))"""
    drawn = torch.tensor(driver.execute_script(script), dtype=torch.float32).view(-1, 5)
    return drawn[:, :3], {tuple(row) for row in drawn[:, 3:].int().tolist()}


def expected(sampling):
    return torch.cat([sampling.locations, sampling.weights[..., None]], dim=-1).view(-1, 3)


def same_points(drawn, sampling):
    expected_points = expected(sampling)
    assert len(drawn) == len(expected_points)
    nearest = torch.cdist(expected_points, drawn).min(dim=1).values
    return bool((nearest < 0.1).all())


def test_hover_click_slider_and_toggles(browse, traced, tmp_path):
    from selenium.webdriver import ActionChains, Keys

    driver = browse(write_page(page(traced, traced.detection(0)), tmp_path))
    samplings = [traced.detection(number).layers for number in range(6)]
    assert same_points(displayed_points(driver)[0], samplings[0][-1])

    # The center of a marker on the screen is at its location in the image.
    script = """const p = [...document.querySelectorAll('.point:not([opacity])')].at(-1), b = p.getBoundingClientRect();
        const i = document.querySelector('image').getBoundingClientRect();
        return [(b.x + b.width / 2 - i.x) / i.width, (b.y + b.height / 2 - i.y) / i.height, 
            +p.dataset.x, +p.dataset.y]"""
    x, y, px, py = driver.execute_script(script)
    assert x * 200 == pytest.approx(px, abs=1.0)
    assert y * 130 == pytest.approx(py, abs=1.0)

    find = driver.find_element
    find("css selector", "#detections button[data-item='3']").click()
    assert same_points(displayed_points(driver)[0], samplings[3][-1])
    find("id", "layer").send_keys(Keys.HOME)
    assert same_points(displayed_points(driver)[0], samplings[3][0])
    assert "1 of 2" in find("id", "layer-now").text
    find("id", "layer").send_keys(Keys.END)
    assert same_points(displayed_points(driver)[0], samplings[3][-1])
    find("id", "layer").send_keys(Keys.HOME)

    find("css selector", "#levels button[data-index='1']").click()
    assert displayed_points(driver)[1] == {(level, head) for level in (0, 2) for head in range(HEADS)}
    find("css selector", "#heads button[data-index='0']").click()
    drawn, kinds = displayed_points(driver)
    assert kinds == {(0, 1), (2, 1)}
    assert len(drawn) == 2 * POINTS
    for name in ("levels", "heads"):
        find("xpath", f"//*[@id='{name}']/button[text()='none']").click()
    assert not len(displayed_points(driver)[0])
    for name in ("levels", "heads"):
        find("xpath", f"//*[@id='{name}']/button[text()='all']").click()
    assert len(displayed_points(driver)[0]) == HEADS * LEVELS * POINTS

    top = driver.execute_script("return +document.querySelector('#boxes').lastElementChild.dataset.item")
    ActionChains(driver).move_to_element(find("css selector", f".hit[data-item='{top}']")).perform()
    assert same_points(displayed_points(driver)[0], samplings[top][0])
    ActionChains(driver).move_to_element(find("id", "title")).perform()
    assert same_points(displayed_points(driver)[0], samplings[3][0])  # back to the selected one
    ActionChains(driver).move_to_element(find("css selector", f".hit[data-item='{top}']")).click().perform()
    ActionChains(driver).move_to_element(find("id", "title")).perform()
    assert same_points(displayed_points(driver)[0], samplings[top][0])  # boxes can be clicked too

    driver.execute_script("document.querySelector(\"#detections [data-item='5']\").focus()")
    ActionChains(driver).send_keys(Keys.ENTER).perform()
    assert same_points(displayed_points(driver)[0], samplings[5][0])
    before = driver.execute_script("return document.getElementById('view').getAttribute('viewBox')")
    find("id", "zoom").click()
    assert driver.execute_script("return document.getElementById('view').getAttribute('viewBox')") != before
    assert driver.get_log("browser") == []


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_layout(browse, traced, tmp_path, width, dark):
    driver = browse(write_page(page(traced, traced.point(100, 60)), tmp_path), width, dark)
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width
    assert overflowing_texts(driver) == []
    background = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (not dark)
    assert len(displayed_points(driver)[0]) == LEVELS * HEADS * LEVELS * POINTS
