"""Label files whose names differ from those of their images, and images of formats that are not read."""

import os
import shutil

import pytest

from deformable_detr.data.dataset import open_dataset
from deformable_detr.utils.errors import UserError
from tests.support.data_problems import check_report, issue_codes
from tests.support.datasets import expected_objects, read_objects, write_voc_dataset, write_yolo_dataset

SPLITS = ("train", "val")


def objects_of(root):
    return [objects for split in SPLITS for objects in read_objects(root, split).values()]


EXPECTED = [objects for split in SPLITS for objects in expected_objects(split).values()]

RENAMES = {
    "hash prefix": lambda stem: f"3fa81c02-{stem}",
    "hash suffix": lambda stem: f"{stem}_743c",
    "capitals": str.upper,
    "two suffixes": lambda stem: f"{stem}.webp",
    "sub-folder": lambda stem: f"sub/{stem}",
}


def rename_labels(folder, rename):
    for path in sorted(folder.rglob("*.*")):
        target = path.parent / f"{rename(path.stem)}{path.suffix}"
        target.parent.mkdir(exist_ok=True)
        path.rename(target)


@pytest.mark.parametrize("rename", RENAMES.values(), ids=RENAMES.keys())
@pytest.mark.parametrize("format", ["yolo", "voc"])
def test_renamed_labels_are_read_and_reported(tmp_path, format, rename):
    root = write_yolo_dataset(tmp_path) if format == "yolo" else write_voc_dataset(tmp_path)
    for split in SPLITS if format == "yolo" else [""]:
        rename_labels(root / ("labels" if format == "yolo" else "Annotations") / split, rename)
    assert objects_of(root) == EXPECTED
    issues = [issue for issue in check_report(root).issues if issue.code == "label-name"]
    assert len(issues) == sum(len(objects) > 0 for objects in EXPECTED)
    assert "its objects are read for 'a." in issues[0].message


def test_labels_without_an_image_are_an_error(tmp_path):
    root = write_yolo_dataset(tmp_path)
    (root / "labels/train/phto.txt").write_text("0 0.5 0.5 0.1 0.1\n1 0.5 0.5 0.1 0.1\n")
    shutil.copy(root / "images/train/b.png", root / "images/train/photo.png")
    with pytest.raises(UserError, match=r"phto\.txt: belongs to no image; the most similar name is 'photo\.png'"):
        open_dataset(root)
    assert check_report(root).left_out == 2
    assert "2 objects left out" in check_report(root).summary


def test_other_text_files_are_no_labels(tmp_path):
    root = write_yolo_dataset(tmp_path)
    for name, text in {
        "classes": "cat\ndog\n", "README": "Exported with 5 of 7 options on\n", "empty": "", "x": "0 0.5\n",
        ".hidden": "0 1 1 1 1\n",
    }.items():  # fmt: skip
        (root / f"labels/train/{name}.txt").write_text(text)
    assert objects_of(root) == EXPECTED
    assert "label-unmatched" not in issue_codes(root)


def test_labels_of_other_splits_are_no_strays(tmp_path):
    """One folder of images and labels, and a list per split."""
    root = write_yolo_dataset(tmp_path, "{kind}")
    lines = {"train": ["a", "b", "empty"], "val": ["c"]}
    for split, stems in lines.items():
        names = [path.name for path in sorted((root / "images").iterdir()) if path.stem in stems]
        (root / f"{split}.txt").write_text("".join(f"images/{name}\n" for name in names))
    (root / "labels/empty.txt").touch()
    (root / "data.yaml").write_text("train: train.txt\nval: val.txt\nnames: [cat, dog]\n")
    assert not issue_codes(root) & {"label-unmatched", "label-name"}
    rename_labels(root / "labels", RENAMES["hash prefix"])
    assert objects_of(root) == EXPECTED
    (root / "labels/gone.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    assert "label-unmatched" not in issue_codes(root), "every image of the lists has its labels"


def test_images_of_unread_formats_are_counted(tmp_path):
    root = write_yolo_dataset(tmp_path)
    os.rename(root / "images/train/a.png", root / "images/train/a.heic")
    (root / "images/train/raw.DNG").touch()
    report = check_report(root)
    [issue] = [issue for issue in report.issues if issue.code == "image-format"]
    assert "2 files in formats that are not read (a.heic, raw.DNG), 1 of them labeled" in issue.message
    assert report.left_out == issue.objects == len(expected_objects("train")["a"])


def test_labels_beside_images_with_empty_label_folder(tmp_path):
    """LabelImg writes only classes.txt into another folder."""
    root = write_yolo_dataset(tmp_path)
    for path in sorted((root / "labels").rglob("*.txt")):
        path.rename(root / "images" / path.relative_to(root / "labels"))
    assert objects_of(root) == EXPECTED


def test_class_names_beside_the_labels(tmp_path):
    root = write_yolo_dataset(tmp_path)
    (root / "data.yaml").unlink()
    for split in SPLITS:
        (root / f"labels/{split}/classes.txt").write_text("cat\ndog\n")
    assert objects_of(root) == EXPECTED
    (root / "labels/val/classes.txt").write_text("dog\ncat\n")
    with pytest.raises(UserError, match=r"val/classes\.txt: lists other classes than .*train/classes\.txt"):
        open_dataset(root)


def test_fiftyone_voc(tmp_path):
    write_voc_dataset(tmp_path / "x")
    (tmp_path / "y").mkdir()
    (tmp_path / "x/JPEGImages").rename(tmp_path / "y/data")
    (tmp_path / "x/Annotations").rename(tmp_path / "y/labels")
    assert len(open_dataset(tmp_path / "y")) == 4


def test_voc_images_in_sub_folders(tmp_path):
    root = write_voc_dataset(tmp_path)
    shutil.rmtree(root / "ImageSets")
    for folder in ("JPEGImages", "Annotations"):
        (root / folder / "day1").mkdir()
        for path in sorted((root / folder).glob("[ab].*")):
            path.rename(path.parent / "day1" / path.name)
    (root / "ImageSets/Main").mkdir(parents=True)
    (root / "ImageSets/Main/train.txt").write_text("day1/a\nday1/b.jpg\nempty\n")
    (root / "ImageSets/Main/val.txt").write_text("c\n")
    assert objects_of(root) == EXPECTED
