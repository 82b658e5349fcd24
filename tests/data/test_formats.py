"""YOLO and Pascal VOC sets give the same images, boxes and classes as the COCO JSON of the same objects."""

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
from deformable_detr.data.yolo import label_folder, read_row
from deformable_detr.structures import Category
from deformable_detr.utils.errors import UserError
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


def test_ground_truth_of_yolo_is_plain_coco(tmp_path):
    truth = open_dataset(write_yolo_dataset(tmp_path), "train").ground_truth
    assert [record["id"] for record in truth["images"]] == [1, 2, 3]
    assert {tuple(record) for record in truth["annotations"]} == {
        ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
    }
    assert truth["annotations"][2]["bbox"] == pytest.approx([10, 5, 20, 10])
    json.dumps(truth)


@pytest.mark.parametrize(
    "head",
    [
        "path: {root}\ntrain: images/train\nval: images/val\nnc: 2\nnames: [cat, dog]\n",
        "path: nowhere\ntrain: ../images/train\nval: ../images/val\nnames: {{0: cat, 1: dog}}\n",
        "train: [images/train]\nvalid: images/val\nnames:\n  0: cat\n  1: dog\n",
        "train: lists/train.txt\nval: lists/val.txt\nnames: [cat, dog]\n",
        "path: .\ntrain: images\\train\nval: ..\\images\\val\nnc: '2'\nnames: {{'0': cat, \"1\": dog}}\n",
    ],
)
def test_ways_to_write_data_yaml(tmp_path, head):
    write_yolo_dataset(tmp_path, head=head.format(root=tmp_path))
    (tmp_path / "lists").mkdir()
    lines = ["./../images/train/a.png", "images/train/b.png", "", f"{tmp_path}/images/train/empty.png", ""]
    (tmp_path / "lists/train.txt").write_text("\n".join(lines))
    (tmp_path / "lists/val.txt").write_text("..\\images\\val\\c.png\r\n")
    for split in ("train", "val"):
        assert read_objects(tmp_path, split) == expected_objects(split)


@pytest.mark.parametrize(
    ("head", "message"),
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
def test_faults_of_data_yaml(tmp_path, head, message):
    write_yolo_dataset(tmp_path, head=head)
    with pytest.raises(UserError, match=message) as caught:
        open_dataset(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/data.yaml: ")
    assert "\n" not in str(caught.value)


def test_class_names_are_what_stands_there(tmp_path):
    names = ["yes", "no", "on", "off", "y", "null", "~", "007", "1e3", "1.0", "2020-01-01", "0x1f", "1_000", "="]
    head = "train: images/train\nval: images/val\nnc: 14\n"
    for text in (f"names: [{', '.join(names)}]\n", "names:\n" + "".join(f"  {n}: {t}\n" for n, t in enumerate(names))):
        write_yolo_dataset(tmp_path, head=head + text)
        assert [category.name for category in open_dataset(tmp_path).categories] == names
    write_yolo_dataset(
        tmp_path, head="a: &a {nc: 2, names: [cat, dog], test: }\n<<: *a\ntrain: images/train\nval: images/val\n"
    )
    assert read_objects(tmp_path, "train") == expected_objects("train")
    with pytest.raises(UserError, match="no 'test' split"):
        open_dataset(tmp_path, "test")


def test_yolo_rows():
    assert read_row("1 0.5 0.5 0.5 0.25", 2) == (1, (0.25, 0.375, 0.75, 0.625))
    assert read_row("0.0 0.1 0.2 0.9 0.2 0.5 0.8", 2) == (0, (0.1, 0.2, 0.9, 0.8)), "a polygon's box"
    assert read_row("0 0 0 0 0", 1)[1] == (0, 0, 0, 0)
    assert read_row("0 1.005 0.5 0.1 0.1", 1)[0] == 0, "rounding of the labeling tool"
    for row, message in {
        "0 0.5 0.5 0.5": "has 4 values", "0 0.1 0.1 0.2 0.2 0.3": "has 6 values", "0 a b c d": "instead of numbers",
        "2 0.5 0.5 0.1 0.1": "has class 2, but the classes are 0 to 1", "-1 0 0 0 0": "has class -1",
        "0.5 0 0 0 0": "has class 0.5", "0 20 10 5 5": "outside 0..1", "0 nan 0 0 0": "not a finite number",
        "0 -0.2 0.5 0.1 0.1": "outside 0..1",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=message):
            read_row(row, 2)


def test_yolo_rows_with_keypoints(tmp_path):
    box = (1, (0.25, 0.375, 0.75, 0.625))
    assert read_row("1 0.5 0.5 0.5 0.25 0.9 0.9 2 0 0 0", 2, keypoints=6) == box
    assert read_row("1 0.5 0.5 0.5 0.25 0.1 0.2 0.3 0.4", 2, keypoints=4) == box
    for row, keypoints in {"1 0.5 0.5 0.5 0.25": 4, "1 0.5 0.5 0.5 0.25 0.1 0.2 0.3 0.4": 6}.items():
        with pytest.raises(ValueError, match=f"instead of class cx cy w h and {keypoints} keypoint values"):
            read_row(row, 2, keypoints)
    write_yolo_dataset(tmp_path)
    head = (tmp_path / "data.yaml").read_text()
    (tmp_path / "data.yaml").write_text(head + "kpt_shape: [2, 3]\n")
    for labels in (tmp_path / "labels").rglob("*.txt"):
        rows = labels.read_text().splitlines()
        labels.write_text("".join(f"{row} 0.1 0.9 2 0.9 0.1 1\n" for row in rows))
    assert read_objects(tmp_path, "train") == expected_objects("train")
    for shape in ("17", "[17]", "[17, x]", "[0, 2]"):
        (tmp_path / "data.yaml").write_text(head + f"kpt_shape: {shape}\n")
        with pytest.raises(UserError, match=r"data\.yaml: 'kpt_shape' must be two integers"):
            open_dataset(tmp_path)


def test_a_bad_row_is_named(tmp_path):
    write_yolo_dataset(tmp_path)
    labels = tmp_path / "labels/train/a.txt"
    labels.write_text(labels.read_text() + "\n0 0.5 0.5\n")
    with pytest.raises(UserError, match=r"labels/train/a\.txt: line 4 has 3 values .*; correct or remove the row"):
        open_dataset(tmp_path)


def test_labels_lie_beside_or_in_labels(tmp_path):
    for folder in ("images/x/labels/train", "labels/x/images/train", "images/y", "capital/Labels", "images/z/LABELS"):
        (tmp_path / folder).mkdir(parents=True)
    for images, labels in {
        "images/x/images/train": "images/x/labels/train", "pictures": "pictures", "images/y": "images/y",
        "capital/Images": "capital/Labels", "images/z/images": "images/z/LABELS",
        "images/x/images/val": "images/x/images/val",
    }.items():  # fmt: skip
        assert label_folder(tmp_path / images) == tmp_path / labels


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
def test_a_yolo_set_may_lie_below_images(tmp_path, root, layout):
    write_yolo_dataset(tmp_path / root, layout)
    for split in ("train", "val"):
        assert read_objects(tmp_path / root, split) == expected_objects(split)


def test_dots_in_names_of_yolo_images(tmp_path):
    write_yolo_dataset(tmp_path)
    for path in (tmp_path / "images/train/a.png", tmp_path / "labels/train/a.txt"):
        path.rename(path.with_stem("a.b"))
    assert read_objects(tmp_path, "train")["a.b"] == expected_objects("train")["a"]


def test_folders_of_yolo_in_capitals(tmp_path):
    write_yolo_dataset(tmp_path, head="train: Images/train\nval: Images/val\nnames: [cat, dog]\n")
    for name in ("images", "labels"):
        (tmp_path / name).rename(tmp_path / name.title())
    for split in ("train", "val"):
        assert read_objects(tmp_path, split) == expected_objects(split)


@pytest.mark.parametrize(
    ("make", "ending"),
    [(write_yolo_dataset, ".txt"), (partial(write_voc_dataset, flat=True), ".xml"), (write_voc_dataset, ".xml")],
)
def test_labels_with_endings_in_capitals(tmp_path, make, ending):
    make(tmp_path)
    before = read_objects(tmp_path, "train")
    assert any(before.values())
    for path in [path for path in tmp_path.rglob(f"*{ending}") if path.parent.name != "Main"]:
        path.rename(path.with_suffix(ending.upper()))
    assert read_objects(tmp_path, "train") == before


def test_yolo_boxes_are_those_of_the_upright_picture(tmp_path):
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
def test_classes_of_voc_are_those_of_all_splits(tmp_path, flat, names):
    write_voc_dataset(tmp_path, flat)
    data = DataConfig(train_split=names[0], val_split=names[1])
    for old, new in zip(("train", "valid" if flat else "val"), names, strict=True):
        place = tmp_path if flat else tmp_path / "ImageSets/Main"
        (place / (old if flat else f"{old}.txt")).rename(place / (new if flat else f"{new}.txt"))
    notes = tmp_path / names[1] / "c.xml" if flat else tmp_path / "Annotations/c.xml"
    notes.write_text(notes.read_text().replace("dog", "ant"))
    train = open_dataset(tmp_path, names[0], data)
    assert train.categories == (Category(1, "ant"), Category(2, "cat"), Category(3, "dog"))
    val = open_dataset(tmp_path, names[1], data, categories=train.categories)
    assert val[0][1].labels.tolist() == [1, 0]
    assert open_dataset(tmp_path, names[0], data, categories=train.categories[1:]).categories == train.categories[1:]
    with pytest.raises(UserError, match="which the model does not know"):
        open_dataset(tmp_path, names[1], data, categories=train.categories[1:])
    notes.write_text("<broken")
    assert [category.name for category in open_dataset(tmp_path, names[0], data).categories] == ["cat", "dog"]


def test_classes_go_by_name_where_a_format_has_no_ids(tmp_path):
    model = (Category(5, "dog"), Category(9, "cat"), Category(11, "bird"))
    for make in (write_voc_dataset, write_yolo_dataset):
        root = make(tmp_path / make.__name__)
        found = open_dataset(root, "val", categories=model)
        assert found.categories == model
        assert found[0][1].labels.tolist() == [1, 0]
        assert {record["category_id"] for record in found.ground_truth["annotations"]} == {5, 9}
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
def test_faults_of_voc_files(tmp_path, text, message):
    write_voc_dataset(tmp_path)
    (tmp_path / "Annotations/a.xml").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        open_dataset(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/Annotations/a.xml: ")


def test_voc_without_any_object(tmp_path):
    write_voc_dataset(tmp_path)
    for path in (tmp_path / "Annotations").glob("*.xml"):
        path.write_text("<annotation/>")
    with pytest.raises(UserError, match="none of its XML files has an object, so there is no class"):
        open_dataset(tmp_path)


def test_missing_files_of_voc(tmp_path):
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
    ids=["spaces", "file names", "the same again"],
)
def test_lines_of_a_voc_list(tmp_path, lines, stems):
    for stem in ("card", "card 1", "card (1) train"):
        write_image(tmp_path / f"JPEGImages/{stem}.jpg")
        notes = tmp_path / f"Annotations/{stem}.xml"
        notes.parent.mkdir(exist_ok=True)
        notes.write_text(voc_xml(f"{stem}.jpg", [(0, (len(stem), 2, 16, 10))], 1))
    (tmp_path / "ImageSets/Main").mkdir(parents=True)
    (tmp_path / "ImageSets/Main/train.txt").write_text(lines)
    found = read_objects(tmp_path, "train")
    assert list(found) == stems
    assert all(boxes == [("cat", [len(stem), 2, 16, 10])] for stem, boxes in found.items())
    (tmp_path / "ImageSets/Main/train.txt").write_text(lines + "card (2) 1\n")
    with pytest.raises(UserError, match=r"line \d names 'card \(2\) 1', but .* has no such image"):
        open_dataset(tmp_path)


def test_voc_images_that_differ_only_in_their_suffixes_are_refused(tmp_path):
    write_image(write_voc_dataset(tmp_path) / "JPEGImages/a.png")
    with pytest.raises(UserError, match=r"a\.png: has the name of a\.jpg but another suffix.*; rename or remove it"):
        open_dataset(tmp_path)


@pytest.mark.parametrize(
    "make", [write_yolo_dataset, write_coco_dataset, write_voc_dataset, partial(write_voc_dataset, flat=True)]
)
def test_hidden_files_are_no_part_of_a_set(tmp_path, make):
    root = make(tmp_path / ".cache" / "set")  # the set's own place may be hidden
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


def test_a_hidden_yaml_is_no_second_one(tmp_path):
    (write_yolo_dataset(tmp_path) / "data.yaml").rename(tmp_path / "cards.yaml")
    (tmp_path / "._cards.yaml").write_bytes(b"\0")
    assert read_objects(tmp_path, "train") == expected_objects("train")


def test_coco_json_comes_first(tmp_path):
    write_yolo_dataset(write_coco_dataset(tmp_path))
    assert find_source(tmp_path, "train", DataConfig()).format == "coco"
    for json_file in tmp_path.rglob("*.coco.json"):
        json_file.unlink()
    (tmp_path / "train/classes.json").write_text("{}")
    assert find_source(tmp_path, "train", DataConfig()).format == "yolo", "not a folder's only JSON file"
    (tmp_path / "data.yaml").unlink()
    with pytest.raises(
        UserError, match=r"no 'train' split; classes\.json has no list 'images'; add COCO JSON, a data\.yaml, or"
    ):
        find_source(tmp_path, "train", DataConfig())


@pytest.mark.parametrize("reached", ["list", "path"])
def test_a_yolo_set_reached_through_a_link(tmp_path, reached):
    root = write_yolo_dataset(tmp_path / "deep" / "down" / "set")
    text = (root / "data.yaml").read_text()
    if reached == "list":
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


def test_yolo_folders_that_may_not_be_read_are_not_empty_ones(tmp_path, monkeypatch):
    root = write_yolo_dataset(tmp_path)
    access, lstat, scandir, read_text = os.access, os.lstat, os.scandir, Path.read_text

    def forbid(folder):
        """As the system does for a folder with the mode 000; root may read all."""

        def refused(path, itself=False):
            if folder in Path(path).parents or (itself and folder == Path(path)):
                raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder and access(path, mode))
        monkeypatch.setattr(os, "scandir", lambda path: refused(path, itself=True) or scandir(path))
        monkeypatch.setattr(os, "lstat", lambda path, **options: refused(path) or lstat(path, **options))
        monkeypatch.setattr(Path, "read_text", lambda self, **options: refused(self) or read_text(self, **options))

    assert len(open_dataset(root)) == 3
    forbid(root / "images" / "train")
    with pytest.raises(UserError, match=r"images/train: Permission denied; make the folder readable"):
        open_dataset(root)
    forbid(root / "labels" / "train")
    with pytest.raises(UserError, match=r"labels/train/a.txt: cannot be read as UTF-8 text \(Permission denied\)"):
        open_dataset(root)
    forbid(root / "labels")
    with pytest.raises(UserError, match=r"labels: Permission denied; make the folder readable"):
        open_dataset(root)


@pytest.mark.parametrize("folder", ["", "JPEGImages", "Annotations"])
def test_voc_folders_that_may_not_be_read_are_named(tmp_path, monkeypatch, folder):
    root = write_voc_dataset(tmp_path / "set")
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != root / folder and access(path, mode))
    with pytest.raises(UserError, match=r"Permission denied; make the folder readable"):
        open_dataset(root)
