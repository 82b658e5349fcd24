"""YOLO and Pascal VOC datasets yield the same images, boxes and classes as the equivalent COCO JSON."""

import json
import os
import pickle
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from deformable_detr.config.schema import DataConfig
from deformable_detr.data.dataset import ensure_distinct_splits, open_dataset
from deformable_detr.data.formats import find_source
from deformable_detr.data.labels import label_trees
from deformable_detr.data.yolo_rows import read_row
from deformable_detr.structures import Category
from deformable_detr.utils.errors import UserError
from tests.support.data_problems import check_report
from tests.support.datasets import (
    SIZE,
    expected_objects,
    read_objects,
    voc_xml,
    write_coco_dataset,
    write_image,
    write_voc_dataset,
    write_yolo_dataset,
)


@pytest.mark.parametrize("layout", ["{kind}/{split}", "{split}/{kind}"])
def test_yolo(tmp_path, layout):
    write_yolo_dataset(tmp_path, layout)
    for split in ("train", "val"):
        assert read_objects(tmp_path, split) == expected_objects(split)
        assert read_objects(tmp_path / "data.yaml", split) == expected_objects(split)
    train, val = (open_dataset(tmp_path, split) for split in ("train", "val"))
    assert train.categories == val.categories == (Category(0, "cat"), Category(1, "dog"))
    ensure_distinct_splits(train, val, tmp_path)
    assert train.fingerprint != val.fingerprint
    assert pickle.loads(pickle.dumps(train)).fingerprint == train.fingerprint


def test_yolo_ground_truth_is_coco(tmp_path):
    truth = open_dataset(write_yolo_dataset(tmp_path), "train").ground_truth
    assert [record["id"] for record in truth["images"]] == [1, 2, 3]
    assert {tuple(record) for record in truth["annotations"]} == {
        ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
    }
    assert truth["annotations"][2]["bbox"] == pytest.approx([10, 5, 20, 10])
    json.dumps(truth)


@pytest.mark.parametrize(
    "yaml_text",
    [
        "path: {root}\ntrain: images/train\nval: images/val\nnc: 2\nnames: [cat, dog]\n",
        "path: nowhere\ntrain: ../images/train\nval: ../images/val\nnames: {{0: cat, 1: dog}}\n",
        "train: [images/train]\nvalid: images/val\nnames:\n  0: cat\n  1: dog\n",
        "train: lists/train.txt\nval: lists/val.txt\nnames: [cat, dog]\n",
        "path: .\ntrain: images\\train\nval: ..\\images\\val\nnc: '2'\nnames: {{'0': cat, \"1\": dog}}\n",
    ],
)
def test_data_yaml_variants(tmp_path, yaml_text):
    write_yolo_dataset(tmp_path, yaml_text=yaml_text.format(root=tmp_path))
    (tmp_path / "lists").mkdir()
    lines = ["./../images/train/a.png", "images/train/b.png", "", f"{tmp_path}/images/train/empty.png", ""]
    (tmp_path / "lists/train.txt").write_text("\n".join(lines))
    (tmp_path / "lists/val.txt").write_text("..\\images\\val\\c.png\r\n")
    for split in ("train", "val"):
        assert read_objects(tmp_path, split) == expected_objects(split)


@pytest.mark.parametrize(
    ("yaml_text", "message"),
    [
        ("names: [cat", "not valid YAML"),
        ("- a", "lacks the keys"),
        ("train: images/train\n", "'names' is not a list of names; list the classes"),
        ("train: images/train\nnames: cat dog\n", "'names' is not a list of names"),
        ("train: images/train\nnames: {1: cat, 2: dog}", "'names' is not a list of names"),
        ("train: images/train\nnames: [cat, [dog]]", "'names' is not a list of names"),
        ("train: images/train\nnc: 3\nnames: [cat, dog]", "nc is 3 but 'names' has 2"),
        ("train: pictures\nnames: [cat, dog]", "'train' is pictures, which is neither folder nor file"),
        ("train: {a: b}\nnames: [cat, dog]", "'train' must be a folder"),
        ("train: images/train\nnames: [cat, cat]", "'names' lists 'cat' twice; give each class its own name"),
        ("train: images\\\\tain\nnames: [cat, dog]", r"'train' is images\\\\tain, which is neither folder nor file"),
        ("val: images/val\nnames: [cat, dog]", "no 'train' split"),
    ],
)
def test_invalid_data_yaml_is_reported(tmp_path, yaml_text, message):
    write_yolo_dataset(tmp_path, yaml_text=yaml_text)
    with pytest.raises(UserError, match=message) as caught:
        open_dataset(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/data.yaml: ")
    assert "\n" not in str(caught.value)


def test_class_names_are_read_as_strings(tmp_path):
    names = ["yes", "no", "on", "off", "y", "null", "~", "007", "1e3", "1.0", "2020-01-01", "0x1f", "1_000", "="]
    yaml_text = "train: images/train\nval: images/val\nnc: 14\n"
    for text in (f"names: [{', '.join(names)}]\n", "names:\n" + "".join(f"  {n}: {t}\n" for n, t in enumerate(names))):
        write_yolo_dataset(tmp_path, yaml_text=yaml_text + text)
        assert [category.name for category in open_dataset(tmp_path).categories] == names
    write_yolo_dataset(
        tmp_path, yaml_text="a: &a {nc: 2, names: [cat, dog], test: }\n<<: *a\ntrain: images/train\nval: images/val\n"
    )
    assert read_objects(tmp_path, "train") == expected_objects("train")
    with pytest.raises(UserError, match="no 'test' split"):
        open_dataset(tmp_path, "test")


def test_yolo_rows():
    assert read_row("1 0.5 0.5 0.5 0.25", 2) == (1, (0.25, 0.375, 0.75, 0.625), [])
    polygon = [0.1, 0.2, 0.9, 0.2, 0.5, 0.8]
    assert read_row("0.0 0.1 0.2 0.9 0.2 0.5 0.8", 2) == (0, (0.1, 0.2, 0.9, 0.8), polygon), "box of a polygon"
    assert read_row("0 0 0 0 0", 1)[1] == (0, 0, 0, 0)
    assert read_row("1 0.5 0.5 0.5 0.25 0.9", 2) == read_row("1 0.5 0.5 0.5 0.25", 2), "confidence"
    assert read_row("0 1.005 0.5 0.1 0.1", 1)[0] == 0, "tolerates rounding by labeling tools"
    for row, message in {
        "0 0.5 0.5 0.5": "has 4 values", "0 0.1 0.1 0.2 0.2 -0.7": "has 6 values", "0 a b c d": "instead of numbers",
        "2 0.5 0.5 0.1 0.1": "has class 2, but the classes are 0 to 1", "-1 0 0 0 0": "has class -1",
        "0.5 0 0 0 0": "has class 0.5", "0 20 10 5 5": "outside 0..1", "0 nan 0 0 0": "not a finite number",
        "0 -0.2 0.5 0.1 0.1": "outside 0..1", "0 .5 .5 .2 .2 .5 .5 2 .4 .4 0": r"set kpt_shape: \[2, 3\] in data.yaml",
        "0 .5 .5 .2 .2 .9 -1": "outside 0..1", "0;.5;.5;.2": "has 4 values", "0 .5 .5 .2 .2 .9 0.5 1": "has 8 values",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=message):
            read_row(row, 2)


@pytest.mark.parametrize(
    "row",
    [
        "1,0.5,0.5,0.5,0.25", "1, 0.5, 0.5, 0.5, 0.25", "1;0.5;0.5;0.5;0.25;", "1\t0.5\t0.5\t0.5\t0.25",
        "1 0,5 0,5 0,5 0,25", "1;0,5;0,5;0,5;0,25", "1.0 5e-1 0.5 0.5 .25", "1 0.5 0.5 0.5 0.25 1",
        "1 0.5 0.5 0.5 0.25 17", "1 0.5 0.5 0.5 0.25 0.9 17", "1 0.5 0.5 0.5 0.25 0.9 1", "1 0.5 0.5 0.5 0.25 1 2",
    ],
)  # fmt: skip
def test_separators_and_values_after_the_box(tmp_path, row):
    assert read_row(row, 2) == read_row("1 0.5 0.5 0.5 0.25", 2)
    write_yolo_dataset(tmp_path)
    labels = next((tmp_path / "labels/train").glob("*.txt"))
    labels.write_text(f"{row}\n")
    labels.rename(labels.with_name("other.txt"))
    (issue,) = (issue for issue in check_report(tmp_path).issues if issue.code == "label-unmatched")
    assert issue.objects == 1, "rows of a label file without an image are counted"


def test_yolo_rows_with_keypoints(tmp_path):
    box = (1, (0.25, 0.375, 0.75, 0.625), [])
    assert read_row("1 0.5 0.5 0.5 0.25 0.9 0.9 2 0 0 0", 2, keypoints=6) == box
    assert read_row("1 0.5 0.5 0.5 0.25 0.1 0.2 0.3 0.4", 2, keypoints=4) == box
    for row, keypoints in {"1 0.5 0.5 0.5 0.25": 4, "1 0.5 0.5 0.5 0.25 0.1 0.2 0.3 0.4": 6}.items():
        with pytest.raises(ValueError, match=f"instead of class cx cy w h and {keypoints} keypoint values"):
            read_row(row, 2, keypoints)
    write_yolo_dataset(tmp_path)
    yaml_text = (tmp_path / "data.yaml").read_text()
    (tmp_path / "data.yaml").write_text(yaml_text + "kpt_shape: [2, 3]\n")
    for labels in (tmp_path / "labels").rglob("*.txt"):
        rows = labels.read_text().splitlines()
        labels.write_text("".join(f"{row} 0.1 0.9 2 0.9 0.1 1\n" for row in rows))
    assert read_objects(tmp_path, "train") == expected_objects("train")
    for shape in ("17", "[17]", "[17, x]", "[0, 2]"):
        (tmp_path / "data.yaml").write_text(yaml_text + f"kpt_shape: {shape}\n")
        with pytest.raises(UserError, match=r"data\.yaml: 'kpt_shape' must be two integers"):
            open_dataset(tmp_path)


def test_invalid_row_is_reported(tmp_path):
    write_yolo_dataset(tmp_path)
    labels = tmp_path / "labels/train/a.txt"
    labels.write_text(labels.read_text() + "\n0 0.5 0.5\n")
    with pytest.raises(UserError, match=r"labels/train/a\.txt: line 4 has 3 values .*; correct or remove the row"):
        open_dataset(tmp_path)


def test_label_folder_of_an_image_folder(tmp_path):
    for folder in ("images/x/labels/train", "flat/labels", "capital/Labels", "images/z/LABELS", "labelimg/images"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.txt").touch()
    (tmp_path / "labelimg/labels").mkdir()
    (tmp_path / "labelimg/labels/classes.txt").touch()
    for images, labels in {
        "images/x/images/train": "images/x/labels/train", "pictures": "pictures", "images/y": "images/y",
        "capital/Images": "capital/Labels", "images/z/images": "images/z/LABELS",
        "images/x/images/val": "images/x/labels", "flat/images/train": "flat/labels",
        "labelimg/images": "labelimg/images",
    }.items():  # fmt: skip
        assert label_trees(tmp_path / images)[1] == tmp_path / labels


@pytest.mark.parametrize(
    ("root", "layout"),
    [
        ("set", "{split}"),
        ("images/set", "{split}"),
        ("images/set", "{kind}/{split}"),
        ("images/set", "{split}/{kind}"),
        ("images", "{kind}/{split}"),
        ("set", "{kind}/x/images/{split}"),
    ],
)
def test_yolo_dataset_below_a_folder_named_images(tmp_path, root, layout):
    write_yolo_dataset(tmp_path / root, layout)
    for split in ("train", "val"):
        assert read_objects(tmp_path / root, split) == expected_objects(split)


def test_dots_in_yolo_image_names(tmp_path):
    write_yolo_dataset(tmp_path)
    for path in (tmp_path / "images/train/a.png", tmp_path / "labels/train/a.txt"):
        path.rename(path.with_stem("a.b"))
    assert read_objects(tmp_path, "train")["a.b"] == expected_objects("train")["a"]


def test_yolo_folders_are_case_insensitive(tmp_path):
    write_yolo_dataset(tmp_path, yaml_text="train: Images/train\nval: Images/val\nnames: [cat, dog]\n")
    for name in ("images", "labels"):
        (tmp_path / name).rename(tmp_path / name.title())
    for split in ("train", "val"):
        assert read_objects(tmp_path, split) == expected_objects(split)


@pytest.mark.parametrize(
    ("make", "suffix"),
    [(write_yolo_dataset, ".txt"), (partial(write_voc_dataset, flat=True), ".xml"), (write_voc_dataset, ".xml")],
)
def test_label_suffixes_are_case_insensitive(tmp_path, make, suffix):
    make(tmp_path)
    before = read_objects(tmp_path, "train")
    assert any(before.values())
    for path in [path for path in tmp_path.rglob(f"*{suffix}") if path.parent.name != "Main"]:
        path.rename(path.with_suffix(suffix.upper()))
    assert read_objects(tmp_path, "train") == before


def test_yolo_boxes_are_relative_to_the_upright_image(tmp_path):
    write_yolo_dataset(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    write_image(tmp_path / "images/train/b.png", SIZE[::-1], exif=exif)
    assert read_objects(tmp_path, "train") == expected_objects("train")


@pytest.mark.parametrize("flat", [False, True])
def test_voc(tmp_path, flat):
    write_voc_dataset(tmp_path, flat)
    for split in ("train", "val"):
        assert read_objects(tmp_path, split) == expected_objects(split)
    assert read_objects(tmp_path, "validation") == expected_objects("val")
    train = open_dataset(tmp_path, "train")
    assert train.categories == (Category(1, "cat"), Category(2, "dog"))
    with pytest.raises(UserError, match="no 'test' split"):
        open_dataset(tmp_path, "test")
    if flat:
        assert read_objects(tmp_path / "train", "train") == expected_objects("train")


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("names", [("train", "val"), ("train2", "holdout")])
def test_voc_classes_are_collected_from_all_splits(tmp_path, flat, names):
    write_voc_dataset(tmp_path, flat)
    data = DataConfig(train_split=names[0], val_split=names[1])
    for old, new in zip(("train", "valid" if flat else "val"), names, strict=True):
        folder = tmp_path if flat else tmp_path / "ImageSets/Main"
        (folder / (old if flat else f"{old}.txt")).rename(folder / (new if flat else f"{new}.txt"))
    annotation_file = tmp_path / names[1] / "c.xml" if flat else tmp_path / "Annotations/c.xml"
    annotation_file.write_text(annotation_file.read_text().replace("dog", "ant"))
    train = open_dataset(tmp_path, names[0], data)
    assert train.categories == (Category(1, "ant"), Category(2, "cat"), Category(3, "dog"))
    val = open_dataset(tmp_path, names[1], data, categories=train.categories)
    assert val[0][1].labels.tolist() == [1, 0]
    assert open_dataset(tmp_path, names[0], data, categories=train.categories[1:]).categories == train.categories[1:]
    with pytest.raises(UserError, match="which the model does not know"):
        open_dataset(tmp_path, names[1], data, categories=train.categories[1:])
    annotation_file.write_text("<broken")
    assert [category.name for category in open_dataset(tmp_path, names[0], data).categories] == ["cat", "dog"]


def test_classes_are_matched_by_name_if_the_format_has_no_ids(tmp_path):
    model = (Category(5, "dog"), Category(9, "cat"), Category(11, "bird"))
    for make in (write_voc_dataset, write_yolo_dataset):
        root = make(tmp_path / make.__name__)
        dataset = open_dataset(root, "val", categories=model)
        assert dataset.categories == model
        assert dataset[0][1].labels.tolist() == [1, 0]
        assert {record["category_id"] for record in dataset.ground_truth["annotations"]} == {5, 9}
        with pytest.raises(UserError, match=r"has category \d+ \('dog'\), which the model does not know"):
            open_dataset(root, "val", categories=model[1:])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation><object>", "is not valid XML"),
        ("", "is not valid XML"),
        ('<!DOCTYPE a [<!ENTITY x "y">]><annotation>&x;</annotation>', "document type or entities"),
        ("<annotation><object><name>cat</name></object></annotation>", r"object\[0\] \('cat'\) has no bndbox"),
        (
            voc_xml("a.jpg", [(0, (1, 1, 2, 2))]).replace("<xmin>1<", "<xmin>nan<"),
            r"object\[0\] \('cat'\) has no bndbox",
        ),
        (voc_xml("a.jpg", [(0, (1, 1, 2, 2))]).replace("cat", " "), r"object\[0\] has no name"),
    ],
)
def test_invalid_voc_file_is_reported(tmp_path, text, message):
    write_voc_dataset(tmp_path)
    (tmp_path / "Annotations/a.xml").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        open_dataset(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/Annotations/a.xml: ")


def test_voc_dataset_without_objects_is_rejected(tmp_path):
    write_voc_dataset(tmp_path)
    for path in (tmp_path / "Annotations").glob("*.xml"):
        path.write_text("<annotation/>")
    with pytest.raises(UserError, match="none of its files has an object, so there is no class"):
        open_dataset(tmp_path)


def test_missing_voc_files_are_reported(tmp_path):
    write_voc_dataset(tmp_path)
    (tmp_path / "Annotations/b.xml").unlink()
    with pytest.raises(UserError, match=r"Annotations/b\.xml: is missing; add it or remove b from train\.txt"):
        open_dataset(tmp_path)
    write_voc_dataset(tmp_path)
    (tmp_path / "JPEGImages/a.jpg").unlink()
    with pytest.raises(UserError, match=r"train\.txt: line 1 names 'a', but .*JPEGImages has no such image"):
        open_dataset(tmp_path)
    flat = write_voc_dataset(tmp_path / "flat", flat=True)
    (flat / "train/b.xml").unlink()
    assert read_objects(flat, "train")["b"] == [], "an image without objects"


@pytest.mark.parametrize(
    ("lines", "stems"),
    [
        ("card (1) train\ncard\n  card 1 \n", ["card (1) train", "card", "card 1"]),
        ("card.jpg\ncard 1.jpg\ncard (1) train\n", ["card", "card 1", "card (1) train"]),
        ("card\ncard.jpg\n", ["card"]),
    ],
    ids=["spaces", "file names", "duplicate"],
)
def test_voc_list_lines(tmp_path, lines, stems):
    for stem in ("card", "card 1", "card (1) train"):
        write_image(tmp_path / f"JPEGImages/{stem}.jpg")
        annotation_file = tmp_path / f"Annotations/{stem}.xml"
        annotation_file.parent.mkdir(exist_ok=True)
        annotation_file.write_text(voc_xml(f"{stem}.jpg", [(0, (len(stem), 2, 16, 10))], 1))
    (tmp_path / "ImageSets/Main").mkdir(parents=True)
    (tmp_path / "ImageSets/Main/train.txt").write_text(lines)
    objects = read_objects(tmp_path, "train")
    assert list(objects) == stems
    assert all(boxes == [("cat", [len(stem), 2, 16, 10])] for stem, boxes in objects.items())
    (tmp_path / "ImageSets/Main/train.txt").write_text(lines + "card (2) 1\n")
    with pytest.raises(UserError, match=r"line \d names 'card \(2\) 1', but .* has no such image"):
        open_dataset(tmp_path)


def test_voc_images_with_the_same_stem_are_rejected(tmp_path):
    write_image(write_voc_dataset(tmp_path) / "JPEGImages/a.png")
    with pytest.raises(UserError, match=r"a\.png: has the name of a\.jpg but another suffix.*; rename or remove it"):
        open_dataset(tmp_path)


@pytest.mark.parametrize(
    "make", [write_yolo_dataset, write_coco_dataset, write_voc_dataset, partial(write_voc_dataset, flat=True)]
)
def test_hidden_files_are_ignored(tmp_path, make):
    root = make(tmp_path / ".cache" / "set")  # a hidden parent folder is fine
    if make is write_coco_dataset:
        for split in ("train", "valid"):
            (root / split / "_annotations.coco.json").rename(root / split / "notes.json")
    files = [path for path in root.rglob("*") if path.is_file()]
    for path in files:
        (path.parent / ".ipynb_checkpoints").mkdir(exist_ok=True)
        for hidden in (path.with_name(f"._{path.name}"), path.parent / ".ipynb_checkpoints" / path.name):
            hidden.write_bytes(b"\0\5\x16\7")
    for split in ("train", "val"):
        assert read_objects(root, split) == expected_objects(split)


def test_hidden_yaml_is_ignored(tmp_path):
    (write_yolo_dataset(tmp_path) / "data.yaml").rename(tmp_path / "cards.yaml")
    (tmp_path / "._cards.yaml").write_bytes(b"\0")
    assert read_objects(tmp_path, "train") == expected_objects("train")


def test_coco_json_takes_precedence(tmp_path):
    write_yolo_dataset(write_coco_dataset(tmp_path))
    assert find_source(tmp_path, "train", DataConfig()).format == "coco"
    for json_file in tmp_path.rglob("*.coco.json"):
        json_file.unlink()
    (tmp_path / "train/classes.json").write_text("{}")
    assert find_source(tmp_path, "train", DataConfig()).format == "yolo", "an unrelated JSON file is ignored"
    (tmp_path / "data.yaml").unlink()
    with pytest.raises(UserError, match=r"looks like YOLO rows without class names; add a data\.yaml or classes\.txt"):
        find_source(tmp_path, "train", DataConfig())
    for labels in tmp_path.rglob("*.txt"):
        labels.unlink()
    with pytest.raises(
        UserError,
        match=r"no 'train' split; classes\.json has no list 'images'; add .* \(the folder has images/, ",
    ):
        find_source(tmp_path, "train", DataConfig())


@pytest.mark.parametrize("reference", ["list", "path"])
def test_yolo_dataset_behind_a_symbolic_link(tmp_path, reference):
    root = write_yolo_dataset(tmp_path / "deep" / "down" / "set")
    text = (root / "data.yaml").read_text()
    if reference == "list":
        files = sorted((root / "images" / "train").iterdir())
        (root / "train.txt").write_text("".join(f"{file}\n" for file in files))
        text = text.replace("train: images/train", "train: train.txt")
    else:
        text += f"path: {root}\n"
    (root / "data.yaml").write_text(text)
    (tmp_path / "link").symlink_to(root)
    dataset = open_dataset(tmp_path / "link")
    assert [os.path.samefile(dataset.path(index), root / "images" / "train" / f"{stem}.png")
            for index, stem in enumerate(("a", "b", "empty"))] == [True] * 3  # fmt: skip
    assert [len(target.labels) for _, target in dataset] == [2, 1, 0]


def test_unreadable_yolo_folder_is_reported(tmp_path, monkeypatch):
    root = write_yolo_dataset(tmp_path)
    access, lstat, scandir, read_text = os.access, os.lstat, os.scandir, Path.read_text

    def forbid(folder):
        """Simulate a folder without permissions, which root could still read."""

        def raise_if_forbidden(path, include_folder=False):
            if folder in Path(path).parents or (include_folder and folder == Path(path)):
                raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder and access(path, mode))
        monkeypatch.setattr(os, "scandir", lambda path: raise_if_forbidden(path, include_folder=True) or scandir(path))
        monkeypatch.setattr(os, "lstat", lambda path, **options: raise_if_forbidden(path) or lstat(path, **options))
        monkeypatch.setattr(
            Path, "read_text", lambda self, **options: raise_if_forbidden(self) or read_text(self, **options)
        )

    assert len(open_dataset(root)) == 3
    forbid(root / "images" / "train")
    with pytest.raises(UserError, match=r"images/train: Permission denied; make the folder readable"):
        open_dataset(root)
    forbid(root / "labels" / "train")
    with pytest.raises(UserError, match=r"labels/train: Permission denied; make the folder readable"):
        open_dataset(root)
    forbid(root / "labels")
    with pytest.raises(UserError, match=r"labels: Permission denied; make the folder readable"):
        open_dataset(root)


@pytest.mark.parametrize("folder", ["", "JPEGImages", "Annotations"])
def test_unreadable_voc_folder_is_reported(tmp_path, monkeypatch, folder):
    root = write_voc_dataset(tmp_path / "set")
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != root / folder and access(path, mode))
    with pytest.raises(UserError, match=r"Permission denied; make the folder readable"):
        open_dataset(root)


@pytest.mark.parametrize("write", [write_coco_dataset, write_yolo_dataset, write_voc_dataset])
def test_dataset_in_one_more_folder(tmp_path, write):
    write(tmp_path / "export-2024" / "dataset")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "notes.txt").write_text("exported")
    for split in ("train", "val"):
        assert read_objects(tmp_path, split) == expected_objects(split)
    write(tmp_path / "other")
    with pytest.raises(UserError, match=r"has several datasets, such as .*dataset and .*other; give one"):
        open_dataset(tmp_path)
