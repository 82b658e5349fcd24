"""Unusual datasets: encodings, types, links, path spellings and rare image formats."""

import json
import os

import pytest

from deformable_detr.cli.dataset_copy import check_dataset as run
from deformable_detr.config.schema import Config
from tests.support.annotation_files import TRAIN
from tests.support.data_problems import assert_issues, check_report, issue_codes
from tests.support.datasets import write_coco_dataset, write_image, write_voc_dataset, write_yolo_dataset
from tests.support.unusual_inputs import DATASETS


@pytest.mark.parametrize("case", DATASETS)
def test_unusual_dataset(tmp_path, case):
    make, change, expected, name = DATASETS[case]
    root = make(tmp_path / "set")
    if callable(change):
        change(root)
    else:
        (root / "train/a.png").write_bytes(change)
    assert_issues(root, expected, name)


@pytest.mark.parametrize("make", [write_coco_dataset, write_yolo_dataset, write_voc_dataset])
def test_valid_datasets_have_no_issues(tmp_path, make):
    assert issue_codes(make(tmp_path)) == set()


def test_file_names_that_are_not_utf8(tmp_path, capsys):
    """Linux allows any bytes; such names are reported, written and copied."""
    root = write_yolo_dataset(tmp_path / "set")
    for name in (b"\xff.png", b"\xfe.png"):
        write_image(tmp_path / "good.png").rename(os.fsdecode(os.fsencode(root / "images/train") + b"/" + name))
    os.truncate(os.fsdecode(os.fsencode(root / "images/train") + b"/\xff.png"), 60)
    (line,) = (finding.line for finding in check_report(root).errors)
    assert "\\udcff.png: cannot be read" in line
    page, json_file = tmp_path / "page.html", tmp_path / "facts.json"
    assert run(root, Config(), tmp_path / "fixed", page, json_file)
    assert "\\udcff" in capsys.readouterr().out
    assert os.fsencode(json.loads(json_file.read_text())["issues"][0]["file"]).endswith(b"/\xff.png")
    names = [record["file_name"] for record in json.loads((tmp_path / "fixed" / TRAIN).read_text())["images"]]
    assert os.fsencode(sorted(names)[-1]).endswith(b"\xfe.png")
