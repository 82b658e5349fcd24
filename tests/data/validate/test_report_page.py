"""The HTML report of `check`."""

import json
import re
from html.parser import HTMLParser

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
