"""Datasets in layouts of exporters: several folders, lists, files of systems, and names inside of label files."""

import json
import os
import shutil

import pytest

from deformable_detr.config.schema import DataConfig
from deformable_detr.data.dataset import open_dataset
from deformable_detr.data.formats import find_source
from deformable_detr.utils.errors import UserError
from tests.support.data_problems import check_report, issue_codes, load_for_training
from tests.support.datasets import (
    expected_objects,
    read_objects,
    write_coco_dataset,
    write_image,
    write_voc_dataset,
    write_yolo_dataset,
)
from tests.support.label_formats import OBJECTS, WRITERS, expected, write_task

SPLITS = ("train", "val")
EXPECTED = {split: expected_objects(split) for split in SPLITS}


def objects_of(root, **options):
    return {split: read_objects(root, split, **options) for split in SPLITS}


def write_yolo_with_classes(root, layout="{kind}/{split}", classes="classes.txt"):
    write_yolo_dataset(root, layout)
    (root / "data.yaml").unlink()
    (root / classes).parent.mkdir(parents=True, exist_ok=True)
    (root / classes).write_text("cat\ndog\n")
    return root


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("folders", ["set", "a/b/set"])
def test_splits_in_more_folders(tmp_path, name, folders):
    """The folder above must not be read as one split with the images of all."""
    root = tmp_path / folders
    root.mkdir(parents=True)
    write_task(root, WRITERS[name])
    for path in [path for path in root.rglob("*") if path.is_file()]:
        junk = tmp_path / "__MACOSX" / path.relative_to(tmp_path).with_name(f"._{path.name}")
        junk.parent.mkdir(parents=True, exist_ok=True)
        junk.write_bytes(b"\0\5\26\7")
    for split in SPLITS:
        assert {stem: len(objects) for stem, objects in read_objects(tmp_path, split).items()} == {
            stem: len(objects) for stem, objects in expected(split).items()
        }


@pytest.mark.parametrize("name", WRITERS)
def test_files_of_systems_are_ignored(tmp_path, name):
    root = write_task(tmp_path, WRITERS[name])
    codes = issue_codes(root)
    for folder in [root, *(path for path in root.rglob("*") if path.is_dir())]:
        (folder / "@eaDir/p0.jpg").mkdir(parents=True)  # Synology: a folder per image
        write_image(folder / "@eaDir/p0.jpg/SYNOPHOTO_THUMB_M.jpg")
        (folder / "Thumbs.db").write_bytes(b"\xd0\xcf")
    assert issue_codes(root) == codes
    assert sum(len(split.positions) for split in check_report(root).splits) == OBJECTS


def test_images_among_voc_labels(tmp_path):
    root = write_voc_dataset(tmp_path)
    write_image(root / "Annotations/preview/p.png")
    assert objects_of(root) == EXPECTED


@pytest.mark.parametrize("names", ["images labels", "Images Annotations"])
def test_voc_split_folders_inside_images_and_labels(tmp_path, names):
    root = write_voc_dataset(tmp_path, flat=True)
    for split in ("train", "valid"):
        for folder, suffix in zip(names.split(), (".jpg", ".xml"), strict=True):
            (root / folder / split).mkdir(parents=True)
            for path in (root / split).glob(f"*{suffix}"):
                path.rename(root / folder / split / path.name)
        (root / split).rmdir()
    assert objects_of(root) == EXPECTED


def test_coco_export_per_split(tmp_path):
    """CVAT and Datumaro: annotations/instances_default.json beside images/default in each folder."""
    root = write_coco_dataset(tmp_path)
    for split in ("train", "valid"):
        (root / split / "annotations").mkdir()
        (root / split / "images/default").mkdir(parents=True)
        (root / split / "_annotations.coco.json").rename(root / split / "annotations/instances_default.json")
        (root / split / "annotations/person_keypoints_default.json").write_text("{}")
        for path in (root / split).glob("*.png"):
            path.rename(root / split / "images/default" / path.name)
    assert objects_of(root) == EXPECTED


def test_several_coco_files_are_named(tmp_path):
    root = write_coco_dataset(tmp_path)
    file = root / "train/_annotations.coco.json"
    for name in ("part 1.json", "part 2.json"):
        shutil.copy(file, file.with_name(name))
    file.unlink()
    with pytest.raises(UserError, match=r"train: has several annotation files: part 1\.json, part 2\.json; merge"):
        open_dataset(root)


def test_objects_in_another_coco_file_are_counted(tmp_path):
    root = write_coco_dataset(tmp_path)
    file = root / "train/_annotations.coco.json"
    content = json.loads(file.read_text())
    shutil.copy(file, file.with_name("more.json"))
    kept = [record for record in content["annotations"] if record["image_id"] != 1]
    file.write_text(json.dumps(content | {"images": content["images"][1:], "annotations": kept}))
    report = check_report(root)
    [issue] = [issue for issue in report.issues if issue.code == "annotations-unread"]
    assert issue.file.name == "more.json"
    assert report.left_out == issue.objects == len(content["annotations"]) - len(kept)


def test_images_of_other_splits_are_not_unlisted(tmp_path):
    """One folder of images, a file per split, and one with both."""
    root = write_coco_dataset(tmp_path)
    contents = [json.loads((root / folder / "_annotations.coco.json").read_text()) for folder in ("train", "valid")]
    for folder, content in zip(("train", "valid"), contents, strict=True):
        (root / folder / "_annotations.coco.json").rename(root / f"{folder}.json")
        for path in (root / folder).iterdir():
            path.rename(root / path.name)
        (root / folder).rmdir()
        for record in content["annotations"] if folder == "valid" else ():
            record["image_id"] += 100
        for record in content["images"] if folder == "valid" else ():
            record["id"] += 100
    both = {key: contents[0][key] + contents[1][key] for key in ("images", "annotations")}
    (root / "both.json").write_text(json.dumps(contents[0] | both))
    assert not issue_codes(root) & {"annotations-unread", "images-unlisted"}


@pytest.mark.parametrize(
    "write", [write_coco_dataset, write_yolo_with_classes, lambda root: write_voc_dataset(root, True)]
)
def test_two_folders_of_one_split(tmp_path, write):
    root = write(tmp_path)
    first = next(path for path in root.rglob("val*") if path.is_dir())
    other = first.with_name({"val": "valid", "valid": "val"}[first.name])
    other.mkdir()
    assert len(open_dataset(root, "val")) == len(EXPECTED["val"]), "an empty folder is no split"
    shutil.rmtree(other)
    shutil.copytree(first, other)
    with pytest.raises(UserError, match=r"val and valid may both be the 'val' split; merge them"):
        open_dataset(root, "val")


def test_labels_beside_split_folders_are_no_test_split(tmp_path):
    root = write_voc_dataset(tmp_path, flat=True)
    shutil.copy(root / "train/a.jpg", root / "x.jpg")
    shutil.copy(root / "train/a.xml", root / "x.xml")
    assert [split.name for split in check_report(root).splits] == ["train", "val"]


def test_other_json_files_beside_those_of_labelme(tmp_path):
    root = write_task(tmp_path, WRITERS["labelme"])
    (root / "train/a.json").write_text("{}")
    assert [(issue.code, issue.file.name) for issue in check_report(root).errors] == [("label-unreadable", "a.json")]


@pytest.mark.parametrize(
    "classes", ["obj.names", "data/coco.names", "Classes.txt", "labels/classes.txt", "labels/train/classes.txt"]
)
def test_places_of_class_names(tmp_path, classes):
    assert objects_of(write_yolo_with_classes(tmp_path, classes=classes)) == EXPECTED


def test_lists_of_classes_may_be_extended_but_not_differ(tmp_path):
    root = write_yolo_with_classes(tmp_path, classes="labels/train/classes.txt")
    (root / "classes.txt").write_text("cat\ndog\nbird\n\n")
    assert objects_of(root) == EXPECTED
    (root / "classes.txt").write_text("dog\ncat\nbird\n")
    with pytest.raises(UserError, match=r"train/classes\.txt: lists other classes than .*classes\.txt"):
        open_dataset(root)


def test_a_list_of_classes_that_contradicts_the_yaml_is_told(tmp_path):
    root = write_yolo_dataset(tmp_path)
    for path, text in {"labels/train/classes.txt": "cat\ndog\nbird\n", "classes.txt": "Cat\n"}.items():
        (root / path).write_text(text)
    (root / "darknet").mkdir()
    (root / "darknet/coco.names").write_text("person\nbicycle\n")
    assert "classes-differ" not in issue_codes(root)
    (root / "labels/val/classes.txt").write_text("cat\nhorse\n")
    (issue,) = (issue for issue in check_report(root).issues if issue.code == "classes-differ")
    assert issue.file == root / "labels/val/classes.txt"
    assert issue.message == f"names class 1 'horse', but {root / 'data.yaml'} says 'dog', which is used"
    assert read_objects(root, "train") == EXPECTED["train"]


def test_darknet_lists(tmp_path):
    root = write_yolo_with_classes(tmp_path, layout="data/obj", classes="data/obj.names")
    for split, stems in EXPECTED.items():
        (root / f"data/{split}.txt").write_text("".join(f"data/obj/{stem}.png\n" for stem in stems))
    assert objects_of(root) == EXPECTED


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_lists_of_windows(tmp_path, encoding):
    """CVAT writes subsets in capitals; PowerShell writes UTF-16."""
    root = write_yolo_dataset(tmp_path, yaml_text="Train: Train.txt\nValidation: Val.txt\nnames: [cat, dog]\n")
    for split in SPLITS:
        lines = [f'"C:\\data\\images\\{split}\\{path.name}"\r\n' for path in (root / "images" / split).iterdir()]
        (root / f"{split.capitalize()}.txt").write_bytes("".join(lines).encode(encoding))
    assert objects_of(root) == EXPECTED


@pytest.mark.parametrize("flat", [True, False])
def test_voc_files_are_found_by_the_image_that_they_name(tmp_path, flat):
    root = write_voc_dataset(tmp_path, flat=flat)
    for number, path in enumerate(sorted(root.rglob("*.xml"))):
        path.rename(path.with_name(f"{number:06d}.xml"))
    labels = [path for path in root.rglob("*.xml") if b"<object>" in path.read_bytes()]
    report = check_report(root)
    assert len([issue for issue in report.issues if issue.code == "label-name"]) == len(labels)
    assert [len(split.positions) for split in report.splits] == [
        sum(map(len, objects.values())) for objects in EXPECTED.values()
    ]


def test_labels_of_another_split_are_counted_once(tmp_path):
    """Images in sub-folders without such of labels."""
    root = write_yolo_dataset(tmp_path)
    for split in SPLITS:
        for path in list((root / "images" / split).iterdir()):
            (path.parent / path.stem).mkdir()
            path.rename(path.parent / path.stem / "0.png")
        for path in (root / "labels" / split).iterdir():
            path.rename(path.with_name(f"lost_{path.name}"))
    report = check_report(root)
    objects = sum(len(boxes) for split in EXPECTED.values() for boxes in split.values())
    assert sum(len(split.positions) for split in report.splits) + report.left_out == objects
    assert {issue.split for issue in report.issues if issue.file.parent == root / "labels/val"} == {"val"}


def test_missing_images_of_lists_are_counted(tmp_path):
    for root in (write_yolo_dataset(tmp_path / "yolo"), write_voc_dataset(tmp_path / "voc")):
        [image] = [path for path in root.rglob("a.*") if path.suffix in (".png", ".jpg")]
        if root.name == "yolo":
            lines = "".join(f"./images/train/{path.name}\n" for path in image.parent.iterdir())
            (root / "train.txt").write_text(lines)
            (root / "data.yaml").write_text("train: train.txt\nval: images/val\nnames: [cat, dog]\n")
        image.unlink()
        report = check_report(root)
        assert report.left_out == len(EXPECTED["train"]["a"])
        assert {issue.code for issue in report.errors} >= {"image-missing", "label-unmatched"}
        with pytest.raises(UserError, match=r"line . names .*(no such image|which is missing)"):
            load_for_training(root)


@pytest.mark.parametrize("suffix", [".PEF", ".hif", ".JPG_large", ".mp4", ""])
def test_labeled_files_of_any_other_format_are_counted(tmp_path, suffix):
    root = write_yolo_dataset(tmp_path)
    os.rename(root / "images/train/a.png", root / f"images/train/a{suffix}")
    shutil.copy(root / "images/train/b.png", root / "images/train/b.CR2")  # the camera's original: nothing is lost
    [issue] = [issue for issue in check_report(root).issues if issue.code == "image-format"]
    assert issue.message == "has a format that is not read; it is labeled"
    assert issue.file.name == f"a{suffix}"
    assert issue.objects == len(EXPECTED["train"]["a"])


def test_unread_image_in_a_voc_list(tmp_path):
    root = write_voc_dataset(tmp_path)
    os.rename(root / "JPEGImages/a.jpg", root / "JPEGImages/a.heic")
    with pytest.raises(UserError, match=r"line 1 names 'a', but a\.heic has a format that is not read; convert it"):
        open_dataset(root)
    assert check_report(root).left_out == len(EXPECTED["train"]["a"])


@pytest.mark.parametrize(
    ("file", "content", "text"),
    [
        ("samples.json", {"samples": [{"detections": [{"bounding_box": [0, 0, 1, 1]}]}]}, "FiftyOne's own JSON"),
        ("train/xmls/a.xml", "<annotation><object/></annotation>", "Pascal VOC in another layout"),
    ],
)
def test_layouts_that_are_not_read_are_named(tmp_path, file, content, text):
    write_image(tmp_path / "train/images/a.jpg")
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=text):
        find_source(tmp_path, "train", DataConfig())
