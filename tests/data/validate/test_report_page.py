"""The HTML report of `check`."""

import json
import re
from html.parser import HTMLParser

import pytest

from tests.support.browser import overflowing_texts
from tests.support.data_problems import TRAIN, run_check, write_faulty_dataset
from tests.support.datasets import write_coco_dataset


class Page(HTMLParser):
    """Collects tags with their links, and the text."""

    def __init__(self, text):
        super().__init__()
        self.links, self.tags, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.links += [value for key, value in attributes if key in ("href", "src") and value]

    def handle_data(self, data):
        self.texts.append(data)


def test_report_page(tmp_path, capsys):
    root = write_faulty_dataset(tmp_path / "a <b> & set")
    content = json.loads((root / TRAIN).read_text())
    content["categories"].append({"id": 40, "name": "<script>alert(1)</script>"})
    (root / TRAIN).write_text(json.dumps(content))
    run_check(capsys, root, "--report", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    assert "<script" not in text
    assert "http" not in re.sub(r"base64,[^\"]*", "", text), "self-contained"
    assert all(link.startswith(("#", "data:image/jpeg;base64,")) for link in page.links)
    sections = [attributes["id"] for tag, attributes in page.tags if tag == "section"]
    assert {"image-missing", "leak", "box-outside", "box-overhang", "image-rotated"} <= set(sections)
    assert [link[1:] for link in page.links if link.startswith("#")] == sections
    assert len([tag for tag, _ in page.tags if tag == "svg"]) >= len(sections) // 2
    boxes = [attributes for tag, attributes in page.tags if tag == "rect" and attributes["class"] == "box suspect"]
    # The box that crosses the border of the 40 × 20 image.
    assert ("20.0", "10.0", "30.0", "20.0") in [
        tuple(box[key] for key in ("x", "y", "width", "height")) for box in boxes
    ]
    assert "Training cannot use this dataset yet." in page.texts


def test_report_page_of_a_valid_dataset(tmp_path, capsys):
    root = write_coco_dataset(tmp_path / "set")
    run_check(capsys, root, "--report", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "Training can use this dataset." in text
    assert 'error"><b>0</b><span>errors' in text


def test_overview_of_classes_and_box_sizes(tmp_path, capsys):
    root = write_coco_dataset(tmp_path / "set")
    run_check(capsys, root, "--report", tmp_path / "page.html")
    texts = [text for text in Page((tmp_path / "page.html").read_text()).texts if text.strip()]

    def bars(split, start):
        values = texts[texts.index(split) :]
        values = values[next(k for k, text in enumerate(values) if text.startswith(start)) + 1 :]
        return dict(zip(values[::2], values[1::2], strict=False))

    classes = bars("train: 3 images, 3 objects", "Objects per class")
    assert (classes["dog"], classes["cat"]) == ("2 in 2 images", "1 in 1 image")
    sizes = bars("train: 3 images, 3 objects", "Objects per box size, √(width × height) in pixels, median 14")
    names = ["under 8", "8 to 16", "16 to 32", "32 to 64", "64 to 128", "128 to 256", "256 to 512", "512 and more"]
    assert [sizes[name] for name in names] == ["0", "2", "1", "0", "0", "0", "0", "0"]
    sizes = bars("val: 1 images, 2 objects", "Objects per box size")
    assert [sizes[name] for name in names] == ["0", "1", "1", "0", "0", "0", "0", "0"]


@pytest.mark.slow
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_layout_has_no_overflow(browse, tmp_path, capsys, width, dark):
    run_check(capsys, write_faulty_dataset(tmp_path / "set"), "--report", tmp_path / "page.html")
    driver = browse(tmp_path / "page.html", width, dark)
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width
    assert overflowing_texts(driver) == []
    assert len(driver.find_elements("css selector", "#classes .bar")) > 16
    assert driver.get_log("browser") == []
