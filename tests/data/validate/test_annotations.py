"""Faulty annotation files of every format: issues of `check`, and training stops only for errors."""

import pytest

from deformable_detr.utils.errors import UserError
from tests.support.annotation_files import COCO, TRAIN, VAL, VOC, YOLO
from tests.support.data_problems import assert_issues, check_report, issue_codes, load_for_training
from tests.support.datasets import write_coco_dataset, write_voc_dataset, write_yolo_dataset


@pytest.mark.parametrize("case", COCO)
def test_coco(tmp_path, case):
    change, expected, name = COCO[case]
    root = write_coco_dataset(tmp_path / "set")
    assert issue_codes(root) == set(), "valid without the fault"
    change(root)
    assert_issues(root, expected, name)


@pytest.mark.parametrize("case", YOLO)
def test_yolo(tmp_path, case):
    change, expected, name = YOLO[case]
    root = write_yolo_dataset(tmp_path / "set")
    assert issue_codes(root) == set(), "valid without the fault"
    change(root)
    assert_issues(root, expected, name)


def test_data_yaml_fault_is_reported_once(tmp_path):
    root = write_yolo_dataset(tmp_path)
    (root / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [cat, cat]\n")
    (issue,) = check_report(root).issues
    assert "'names' lists 'cat' twice" in issue.line


@pytest.mark.parametrize("case", VOC)
def test_voc(tmp_path, case):
    change, expected, name = VOC[case]
    root = write_voc_dataset(tmp_path / "set")
    assert issue_codes(root) == set(), "valid without the fault"
    change(root)
    assert_issues(root, expected, name)


def test_missing_and_empty_datasets(tmp_path):
    with pytest.raises(UserError, match="no such dataset"):
        check_report(tmp_path / "gone")
    assert issue_codes(tmp_path) == {"split-missing"}


def test_single_split(tmp_path):
    root = write_coco_dataset(tmp_path)
    for path in (root / TRAIN, root / "train", root / VAL):
        report = check_report(path)
        assert [len(split.images) for split in report.splits] == [1 if path == root / VAL else 3]
        (error,) = report.errors
        assert error.code == "split-missing", "as in training"
        with pytest.raises(UserError, match=r"(no|not the) '(train|val)' split"):
            load_for_training(path)
    (root / TRAIN).rename(root / "train/all.json")
    (root / "train").rename(root / "images")
    report = check_report(root / "images/all.json")
    assert [(split.name, len(split.images)) for split in report.splits] == [("train", 3)]
    assert [finding.code for finding in report.errors] == ["splits-same"]
    with pytest.raises(UserError, match="would be both the training and the validation split"):
        load_for_training(root / "images/all.json")


def test_test_split_is_checked(tmp_path):
    root = write_coco_dataset(tmp_path)
    assert [split.name for split in check_report(root).splits] == ["train", "val"]
    write_coco_dataset(tmp_path, {"test": {"a": [(0, (4, 2, 16, 10))]}}, folders=("test",))
    report = check_report(root)
    assert [split.name for split in report.splits] == ["train", "val", "test"]
    (root / "test/a.png").write_bytes((root / "train/a.png").read_bytes())
    assert issue_codes(root) == {"leak"}
