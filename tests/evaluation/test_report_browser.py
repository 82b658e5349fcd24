"""Report and training page in a browser: sorting, selecting, hovering, layout, no console messages."""

import base64
import io
import itertools
import json

import pytest
from PIL import Image

from deformable_detr.data.dataset import open_dataset
from deformable_detr.evaluation.gallery import FOLDER, add_to_gallery
from deformable_detr.evaluation.report import write_report
from deformable_detr.evaluation.training_page import write_training_page
from deformable_detr.utils.rle import encode_masks
from deformable_detr.visualize.web.html import jpeg_data_uri
from tests.support.browser import overflowing_texts
from tests.support.detections import evaluation_result, page_data, synthetic_detections
from tests.support.masks import write_triangles

pytestmark = pytest.mark.slow
COLORS = {
    "rim": (26, 26, 26),
    "truth": (86, 180, 233),
    "right": (44, 199, 154),
    "wrong": (255, 138, 61),
    "missed": (240, 228, 66),
    "crowd": (187, 187, 187),
}
LONG = "a class with a very long name that does not fit, Straßenverkehrsschild"


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    truth, results = synthetic_detections(images=20, classes=14, seed=3)
    truth["categories"][3]["name"], truth["categories"][4]["name"] = LONG, "カード"
    paths = {}
    for image in truth["images"]:
        paths[image["id"]] = folder / f"{image['id']}.png"
        Image.new("RGB", (640, 480), (120, 90, 60)).save(paths[image["id"]])
    one = evaluation_result(truth, results, paths, "a model")
    two = evaluation_result(truth, results[::2], paths, "another")
    return {
        "one": write_report(folder / "one.html", [one], "a set", "val"),
        "two": write_report(folder / "two.html", [one, two], "a set", "val"),
        "none": write_report(folder / "none.html", [evaluation_result(truth, [], paths, "idle")], "a set", "val"),
        "run": write_training_page(run(folder / "run")),
        **masked_pages(folder / "masked"),
    }


def masked_pages(folder):
    """Return a report and a training page with masks of one image."""
    masks = write_triangles(folder, (240, 320))
    dataset = open_dataset(folder, split="val", masks=True)
    results = [
        {"image_id": 5, "category_id": 7, "bbox": annotation["bbox"], "score": score, "segmentation": rle}
        for annotation, rle, score in zip(
            dataset.ground_truth["annotations"], encode_masks(masks), (0.75, 0.5), strict=False
        )
    ]
    [corner] = encode_masks(masks[1:, ::-1])
    results.append({**results[0], "bbox": [200, 20, 80, 80], "score": 0.6, "segmentation": corner})
    add_to_gallery(run(folder / "run"), 400, 4, dataset, results)
    with open(folder / "run" / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"kind": "evaluation", "step": 400, "epoch": 4, "AP": 0.5}) + "\n")
    result = evaluation_result(dataset.ground_truth, results, {5: dataset.path(0)}, masks=True)
    return {
        "masked run": write_training_page(folder / "run"),
        "masked": write_report(folder / "masked.html", [result], "a set", "val"),
    }


def run(folder):
    (folder / FOLDER).mkdir(parents=True)
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(10, 310, 10):
            train = {"kind": "train", "step": step, "epoch": step // 100, "seconds": 7.0 * step, "loss": 900 / step,
                     "loss_class": 90 / step, "loss_bbox": 9 / step, "loss_giou": 30 / step, "lr": 1e-4,
                     "images_per_second": 12.0}  # fmt: skip
            file.write(json.dumps(train) + "\n")
            if step % 100 == 0:
                evaluation = {"kind": "evaluation", "step": step, "epoch": step // 100, "AP": step / 1000,
                              "AP50": step / 500, "AP75": None, "AP_small": 0.1}  # fmt: skip
                file.write(json.dumps(evaluation) + "\n")
    image = {"name": "x.png", "width": 200, "height": 100, "objects": [[10, 10, 50, 60, 0]],
             "image": jpeg_data_uri(Image.new("RGB", (200, 100)), 480)}  # fmt: skip
    gallery = {"ids": [4], "names": [LONG], "images": [image]}
    (folder / FOLDER / "images.json").write_text(json.dumps(gallery))
    with open(folder / FOLDER / "predictions.jsonl", "w") as file:
        for step in (100, 200, 300):
            boxes = [[12, 12, 50, 60, 0, step / 400], [100, 5, 40, 40, 0, 0.2]]
            file.write(json.dumps({"step": step, "epoch": step // 100, "ids": [4], "images": [boxes]}) + "\n")
    return folder


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("name", ["one", "two", "none", "run", "masked", "masked run"])
def test_layout_has_no_overflow(browse, pages, name, width, dark):
    driver = browse(pages[name], width, dark)
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width
    assert overflowing_texts(driver) == []
    background = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (not dark)
    overflowing_labels = """return [...document.querySelectorAll('.chart svg text')].filter(text => {
        const t = text.getBoundingClientRect(), s = text.ownerSVGElement.getBoundingClientRect();
        return t.left < s.left - 1 || t.right > s.right + 1 || t.top < s.top - 1 || t.bottom > s.bottom + 1;
    }).map(text => text.textContent)"""
    assert driver.execute_script(overflowing_labels) == []
    clipped_cells = """return [...document.querySelectorAll('caption, #speed-table td, #metrics-table td')].filter(
        cell => cell.scrollWidth > cell.clientWidth + 1 || cell.clientHeight > 60).map(cell => cell.textContent)"""
    assert driver.execute_script(clipped_cells) == []
    label_positions = """return [...document.querySelectorAll('#gallery svg')].map(picture => [
        ...picture.querySelectorAll('.label')].map(label => {
            const [p, r, t] = [picture, ...label.children].map(e => e.getBoundingClientRect());
            return [r.left - p.left, r.top - p.top, r.right - p.left, r.bottom - p.top, p.width, p.height,
                t.right - r.right];
        }))"""
    images = driver.execute_script(label_positions)
    assert any(len(positions) > 2 for positions in images) or name not in ("one", "two")
    for positions in images:
        for left, top, right, bottom, image_width, image_height, overflow in positions:
            assert min(left, top, image_width - right, image_height - bottom) > -0.5
            assert overflow < 0.5  # the text stays on its background
        for a, b in itertools.combinations(positions, 2):
            assert min(a[2], b[2]) - max(a[0], b[0]) < 0.5 or min(a[3], b[3]) - max(a[1], b[1]) < 0.5
    assert driver.get_log("browser") == []


def painted_colors(driver):
    """Return the colors of the masks of each picture as (name, alpha)."""
    pictures = driver.execute_script(
        "return [...document.querySelectorAll('#gallery svg image:nth-of-type(2)')].map(i => i.getAttribute('href'))"
    )
    colors = []
    for picture in pictures:
        image = Image.open(io.BytesIO(base64.b64decode(picture.split(",")[1])))
        found = [color for _, color in image.getcolors(10**6) if color[3]]
        # The browser stores colors multiplied by alpha, which rounds them.
        close = [
            [name for name in COLORS if max(map(abs, map(int.__sub__, COLORS[name], rgb))) <= 2] for *rgb, _ in found
        ]
        colors.append({(name, color[3]) for [name], color in zip(close, found, strict=True)})
    return colors


def test_masks_are_painted(browse, pages):
    """The ground truth has outlines, detections have fills."""
    driver = browse(pages["masked"])
    objects, detections = painted_colors(driver)
    assert objects == {("rim", 255), ("truth", 255), ("missed", 255), ("crowd", 255)}
    assert detections == {("rim", 255), ("right", 255), ("right", 110), ("wrong", 255), ("wrong", 110)}
    assert driver.get_log("browser") == []
    driver.get(pages["masked run"].as_uri())
    [colors] = painted_colors(driver)
    assert colors == {("rim", 255), ("truth", 255), ("wrong", 255), ("wrong", 110)}
    driver.get(pages["one"].as_uri())
    assert driver.execute_script("return document.querySelectorAll('#gallery svg image').length") == 2 * 16


def test_report_interactions(browse, pages):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.support.ui import Select

    page_json = page_data(pages["one"].read_text(encoding="utf-8"))["models"][0]
    driver = browse(pages["one"])
    find, find_all = driver.find_element, driver.find_elements

    def column(number):
        return [cell.text for cell in find_all("css selector", f"#classes-table tbody td:nth-child({number})")]

    assert find("css selector", "#metrics-table tbody tr td:nth-child(2)").text == f"{page_json['metrics']['AP']:.3f}"
    assert column(3) == [f"{row['AP']:.3f}" for row in page_json["classes"]]
    headers = find_all("css selector", "#classes-table th button")
    headers[2].click()
    assert column(3) == sorted((f"{row['AP']:.3f}" for row in page_json["classes"]), reverse=True)
    headers[2].click()
    assert column(3) == sorted(f"{row['AP']:.3f}" for row in page_json["classes"])
    find("id", "find").send_keys("straß")
    assert column(1) == [LONG]
    assert find("id", "find-count").text == "1 of 14 classes"

    Select(find("id", "curve-class")).select_by_index(3)
    chart = find("css selector", "#curve .chart svg, #curve svg[role=img]")
    ActionChains(driver).move_to_element(chart).perform()
    readout = find("css selector", "#curve .readout").text
    recall = float(readout.split(":")[0].split()[-1])
    precision = page_json["curves"][3]["50"][round(recall * 100)] / 1000
    assert f"IoU 0.50 {precision:.3g}" in readout

    # A small box inside a large one can be hovered and shows its label.
    script = """const found = '#gallery figure:nth-child(2) svg .box:not([pointer-events])';
        const boxes = [...document.querySelectorAll(found)];
        return boxes.reduce((a, b) => a.getAttribute('width') * a.getAttribute('height') <
            b.getAttribute('width') * b.getAttribute('height') ? a : b)"""
    smallest = driver.execute_script(script)
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", smallest)
    ActionChains(driver).move_to_element(smallest).perform()
    hovered = driver.execute_script("return arguments[0].ownerSVGElement.lastElementChild.textContent", smallest)
    title = smallest.find_element("css selector", "title").get_attribute("textContent")
    assert hovered.split()[:-1] == title.removesuffix(", wrong").split()[:-1]

    matrix = page_json["confusion"]["matrix"]
    cell = find("css selector", "#matrix rect[data-cell='2,2']")
    ActionChains(driver).move_to_element(cell).perform()
    assert (
        find("id", "matrix-readout").text == f"{matrix[2][2]} of {sum(matrix[2])} “class 2” were detected as “class 2”"
    )
    gains = [element.text for element in find_all("css selector", "#errors-bars .value")]
    assert gains == [f"{error['gain']:.3f}" for error in page_json["errors"]["types"]]


def rows_of(driver, name):
    rows = driver.find_elements("css selector", f"#{name} tr")
    return [[cell.text for cell in row.find_elements("css selector", "th, td")] for row in rows]


def test_errors_and_f1_by_minimum_score(browse, pages):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.support.ui import Select

    page_json = page_data(pages["one"].read_text(encoding="utf-8"))["models"][0]
    driver = browse(pages["one"])
    heads, *rows = rows_of(driver, "errors-table")
    assert heads == ["", "best F1", "0.1", "0.3", "0.5", "0.7", "0.9"]
    counts = [[f"{count:,}" for count in column["counts"]] for column in page_json["error_counts"]]
    assert [row[1:] for row in rows] == [list(row) for row in zip(*counts, strict=True)]
    assert [row[0] for row in rows][::5] == ["Classification", "Missed"]
    for index in (0, 3):
        Select(driver.find_element("id", "curve-class")).select_by_index(index)
        chart = driver.find_element("css selector", "#f1 svg[role=img]")
        ActionChains(driver).move_to_element(chart).perform()
        readout = driver.find_element("css selector", "#f1 .readout").text
        score = float(readout.split(":")[0].split()[-1])
        assert 0.3 < score < 0.7
        assert readout.endswith(f"F1 {page_json['f1'][index][round(100 * score)] / 1000:.3g}")
    two = page_data(pages["two"].read_text(encoding="utf-8"))["models"]
    driver.get(pages["two"].as_uri())
    heads, *rows = rows_of(driver, "errors-table")
    assert heads[1] == "best F1"
    assert [row[0] for row in rows][::6] == ["A: Classification", "B: Classification"]
    assert [row[1] for row in rows] == [f"{count:,}" for model in two for count in model["error_counts"][0]["counts"]]
    driver.get(pages["none"].as_uri())
    assert rows_of(driver, "errors-table")[0][1] == "all"


def test_short_curves_have_markers(browse, pages):
    driver = browse(pages["run"])
    script = "return document.querySelectorAll(`#${arguments[0]} .marker`).length"
    assert driver.execute_script(script, "ap") == 6  # AP and AP50 of three evaluations
    assert driver.execute_script(script, "loss") == 0  # of 30 steps
    driver.get(pages["one"].as_uri())
    assert driver.execute_script("return document.querySelectorAll('.marker').length") == 0


def test_legends_name_the_ground_truth(browse, pages):
    driver = browse(pages["one"])
    texts = driver.find_element("id", "images-legend").text
    for text in ("ground truth, detected", "ground truth, missed", "correct detection", "wrong detection", "crowd"):
        assert text in texts
    driver.get(pages["run"].as_uri())
    assert driver.find_element("id", "legend").text.split("\n") == ["ground truth", "detection"]


def test_selecting_the_second_model(browse, pages):
    from selenium.webdriver.support.ui import Select

    page_json = page_data(pages["two"].read_text(encoding="utf-8"))["models"]
    driver = browse(pages["two"])
    assert len(driver.find_elements("css selector", "#gallery .panels")[0].find_elements("css selector", "figure")) == 3
    Select(driver.find_element("id", "confusion-model")).select_by_index(1)
    assert f"{page_json[1]['confusion']['threshold']:.3f}" in driver.find_element("id", "confusion-note").text
    row = driver.find_element("css selector", "#metrics-table tbody tr").text.split()
    first, second = (model["metrics"]["AP"] for model in page_json)
    assert row[1:3] == [f"{first:.3f}", f"{second:.3f}"]
    assert row[4] == f"{second - first:+.3f}".replace("-", "−")


def test_gallery_steps_through_the_evaluations(browse, pages):
    from selenium.webdriver import Keys

    driver = browse(pages["run"])
    find = driver.find_element
    assert find("id", "evaluation-now").text == "3 of 3: step 300"
    assert "1 detected, 1 in the ground truth" in find("css selector", "#gallery figcaption").text
    find("id", "evaluation").send_keys(Keys.HOME)
    assert find("id", "evaluation-now").text == "1 of 3: step 100"
    assert "0 detected, 1 in the ground truth" in find("css selector", "#gallery figcaption").text
    find("id", "score").send_keys(Keys.HOME)
    assert "2 detected, 1 in the ground truth" in find("css selector", "#gallery figcaption").text
    find("id", "follow").click()
    driver.refresh()
    assert find("id", "follow").is_selected()
