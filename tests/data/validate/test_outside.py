"""Labeled images that are in no split: counted, with the folder and the way into a split; nothing else is."""

import shutil

import pytest

from tests.support.data_problems import check_report, load_for_training
from tests.support.datasets import write_image, write_voc_dataset, write_yolo_dataset
from tests.support.label_formats import OBJECTS, SIZE, WRITERS, write_task

EXTRA = {
    "x0": [("disc", 10.0, 20.0, 50.0, 60.0), ("square", 0.0, 0.0, 30.5, 20.0)],
    "x1": [("disc", 1.0, 2.0, 9.0, 9.0)],
}


def outside(root):
    return [issue for issue in check_report(root).issues if issue.code == "outside-splits"]


def write_extra(folder, write):
    for number, name in enumerate(EXTRA):
        write_image(folder / f"{name}.jpg", SIZE, seed=90 + number)
    write(folder, EXTRA)


@pytest.mark.parametrize("place", ["", "more", "more/deep"])
@pytest.mark.parametrize("extra", WRITERS)
@pytest.mark.parametrize("name", WRITERS)
def test_labels_beside_the_splits_are_counted(tmp_path, name, extra, place):
    root = write_task(tmp_path, WRITERS[name])
    write_extra(root / place, WRITERS[extra])
    report = check_report(root)
    assert sum(len(split.positions) for split in report.splits) == OBJECTS, report.summary
    assert report.left_out == 3
    (issue,) = outside(root)
    assert issue.file == root / place
    assert issue.message.startswith("has 2 labeled images with 3 objects in no split: x0.jpg (")
    assert ("convert the labels" in issue.hint) == (name != extra)
    assert any("outside-splits" in line for line in load_for_training(root))


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("images/x.png", "labels/x.txt"), ("images/more/x.png", "labels/more/x.txt"), ("new/x.png", "new/x.txt"),
        ("new/images/x.png", "new/labels/x.txt"), ("images/more/x.png", "labels/x.txt"), ("x.png", "x.txt"),
        ("images/more/x.heic", "labels/more/x.txt"),
    ],
)  # fmt: skip
def test_yolo_labels_beside_the_split_folders_are_counted(tmp_path, image, label):
    root = write_yolo_dataset(tmp_path)
    (root / label).parent.mkdir(parents=True, exist_ok=True)
    (root / label).write_text("0 0.5 0.5 0.1 0.1\n1 0.5 0.5 0.2 0.1\n")
    write_image(root / image.replace("heic", "png"), seed=90).rename(root / image)
    (issue,) = outside(root)
    assert (issue.file, issue.objects, issue.split) == ((root / image).parent, 2, "train")
    assert issue.hint == "move images and label files to those of a split, such as images/train"
    assert outside(root / "data.yaml")


@pytest.mark.parametrize("name", ["yolo", "voc"])
def test_images_that_cannot_be_read_are_counted_once(tmp_path, name):
    root = write_task(tmp_path, WRITERS[name])
    (root / "train/p1.jpg").rename(root / "train/p1.heic")
    (root / "train/sub").mkdir()
    for path in ("p0.jpg", "p2.jpg"):
        (root / "train" / path).rename(root / "train/sub" / path)
    report = check_report(root)
    assert sum(len(split.positions) for split in report.splits) + report.left_out == OBJECTS


def test_a_test_folder_that_the_yaml_does_not_name_is_no_matter_of_training(tmp_path):
    root = write_yolo_dataset(tmp_path)
    write_image(root / "images/test/x.png", seed=90)
    (root / "labels/test").mkdir()
    (root / "labels/test/x.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    (issue,) = outside(root)
    assert (issue.split, issue.hint) == ("test", "name this folder under test in data.yaml")
    assert not any("outside-splits" in line for line in load_for_training(root))


def test_pascal_voc_pairs_at_the_root_do_not_hide_the_splits(tmp_path):
    """The files in the folders of the splits are read, in whatever format, not those of no split."""
    root = write_task(tmp_path, WRITERS["labelme"])
    write_extra(root, WRITERS["voc"])
    report = check_report(root)
    assert [(split.name, split.source.format) for split in report.splits] == [("train", "labelme"), ("val", "labelme")]


def test_a_coco_file_without_a_split_name_is_not_the_test_split(tmp_path):
    root = write_task(tmp_path, WRITERS["coco"])
    for folder in ("images/extra", "annotations"):
        (root / folder).mkdir(parents=True)
    write_extra(root / "images/extra", WRITERS["coco"])
    (root / "images/extra/_annotations.coco.json").rename(root / "annotations/extra.json")
    assert [split.name for split in check_report(root).splits] == ["train", "val"]
    assert [issue.objects for issue in outside(root)] == [3]


def other_files(root):
    """Files that belong to no split and lose no object."""
    for name in ("cover.png", "pool/a.png", "docs/b.png"):
        write_image(root / name, seed=len(name) + 60)
    (root / "pool/a.txt").write_text("a photo of 2 dogs\n")
    for folder in ("predictions", "pred/labels"):
        (root / folder).mkdir(parents=True)
        (root / folder / "a.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    write_image(root / "runs/predict/a.png", seed=70)
    (root / "runs/predict/a.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    (root / "link").symlink_to(root, target_is_directory=True)


@pytest.mark.parametrize("name", WRITERS)
def test_other_files_are_no_labels_outside_the_splits(tmp_path, name):
    root = write_task(tmp_path, WRITERS[name])
    other_files(root)
    shutil.copytree(root / "train", root / "backup")
    report = check_report(root)
    assert report.left_out == 0
    assert not outside(root)


def test_images_that_a_list_leaves_out_are_left_out_on_purpose(tmp_path):
    root = write_voc_dataset(tmp_path)
    shutil.copy(root / "Annotations/a.xml", root / "Annotations/x.xml")
    write_image(root / "JPEGImages/x.png", seed=90)
    assert not outside(root)
