"""Bad annotation files of every format, with the issues that they lead to."""

import json

from tests.support.datasets import voc_xml

TRAIN = "train/_annotations.coco.json"
VAL = "valid/_annotations.coco.json"


def edited(file=TRAIN):
    """A change of one annotation file's content."""

    def wrap(change):
        def apply(root):
            path = root / file
            content = json.loads(path.read_text())
            change(content)
            path.write_text(json.dumps(content))

        return apply

    return wrap


def put(section, position, file=TRAIN, **values):
    """A change of one record; a value of None removes the key."""

    @edited(file)
    def change(content):
        record = content[section][position]
        record.update(values)
        for key in [key for key, value in values.items() if value is None]:
            del record[key]

    return change


def add(section, record, file=TRAIN):
    return edited(file)(lambda content: content[section].append(record))


def text(content, file=TRAIN):
    return lambda root: (root / file).write_bytes(content)


def box(*values):
    return put("annotations", 0, bbox=list(values))


@edited()
def normalized(content):
    for record in content["annotations"]:
        record["bbox"] = [value / (40, 20, 40, 20)[place] for place, value in enumerate(record["bbox"])]


@edited()
def listed_again(content):
    content["images"].append({**content["images"][0], "id": 8})
    content["annotations"] += [
        {**record, "id": 90 + record["id"], "image_id": 8}
        for record in content["annotations"] if record["image_id"] == 1
    ]  # fmt: skip


@edited()
def corners(content):
    boxes = [[14, 4, 35, 19], [4, 2, 20, 12], [10, 5, 30, 15]]
    for record, values in zip(content["annotations"], boxes, strict=True):
        record["bbox"] = values


@edited()
def objects_from_zero(content):
    for record in content["annotations"]:
        record["category_id"] -= 1


@edited()
def categories_from_zero(content):
    for record in content["categories"]:
        record["id"] -= 1


@edited(VAL)
def val_from_zero(content):
    for key, records in (("id", content["categories"]), ("category_id", content["annotations"])):
        for record in records:
            record[key] -= 1


@edited(VAL)
def exchanged(content):
    for key, records in (("id", content["categories"]), ("category_id", content["annotations"])):
        for record in records:
            record[key] = 3 - record[key]


@edited(VAL)
def unknown_class(content):
    content["categories"].append({"id": 7, "name": "bird"})
    content["annotations"][0]["category_id"] = 7


NEW = {"id": 9, "image_id": 1, "category_id": 1, "bbox": [1, 2, 8, 8]}
BAD, RECORD, FILE = "annotation-record", "annotations[0] (id 1)", "_annotations.coco.json"
# fault → (what is done to a good COCO set, the kinds that are found, what the line of training names)
COCO = {
    "empty file": (text(b""), {"file-unreadable"}, FILE),
    "cut off": (text(b'{"images": ['), {"file-unreadable"}, FILE),
    "a web page": (text(b"<html>"), {"file-unreadable"}, FILE),
    "no text": (text(b"\xff\xfe\xfa\x00\x99"), {"file-unreadable"}, FILE),
    "a list": (text(b"[]"), {"file-unreadable"}, FILE),
    "nested without end": (text(b"[" * 100_000), {"file-unreadable"}, FILE),
    "no list of images": (edited()(lambda c: c.pop("images")), {"file-unreadable"}, "'images'"),
    "images no list": (edited()(lambda c: c.update(images={})), {"file-unreadable"}, "'images'"),
    "no images": (
        edited()(lambda c: c.update(images=[], annotations=[])),
        {"image-record", "no-training-objects", "class-only-in-val", "images-unlisted"}, "no images",
    ),
    "no categories": (
        edited()(lambda c: c.update(categories=[], annotations=[])),
        {"category-record", "no-training-objects", "class-not-in-train"}, "'categories' is empty",
    ),
    "no annotations": (
        edited()(lambda c: c.update(annotations=[])), {"no-training-objects", "class-only-in-val"},
        f"{FILE}: has no objects to train on; label its images",
    ),
    "crowds alone": (
        edited()(lambda c: [record.update(iscrowd=1) for record in c["annotations"]]),
        {"no-training-objects", "class-only-in-val"}, "no objects to train on",
    ),
    "no annotations in the validation": (
        edited(VAL)(lambda c: c.update(annotations=[])), {"no-objects", "class-not-in-val"}, "",
    ),
    "image no object": (add("images", 5), {"image-record"}, "images[3]"),
    "image without id": (put("images", 2, id=None), {"image-record", "images-unlisted"}, "images[2]"),
    "image id a text": (put("images", 2, id="c"), {"image-record", "images-unlisted"}, "images[2]"),
    "image without name": (put("images", 2, file_name=None), {"image-record", "images-unlisted"}, "images[2] (id 3)"),
    "two images of one id": (
        put("images", 2, id=1), {"image-id-duplicate", "images-unlisted"}, "images[2] ('empty.png') has the id 1",
    ),
    "two records of one file": (
        add("images", {"id": 8, "file_name": "a.png"}), {"image-in-parts"},
        "images[3] (id 8) names the file 'a.png' of images[0], and their objects differ",
    ),
    "two records of one file, objects too": (listed_again, {"image-twice"}, ""),
    "boxes without an area alone": (
        edited()(lambda c: [record.update(bbox=[9, 9, 0, 0]) for record in c["annotations"]]),
        {"no-training-objects", "box-degenerate"}, "has no box with an area inside its image",
    ),
    "boxes of nothing beside a mask": (
        put("annotations", 0, bbox=[0, 0, 0, 0], segmentation=[[4, 2, 20, 2, 20, 12]]), {"box-from-mask"}, "",
    ),
    "image in no folder": (put("images", 0, file_name="x/y.png"), {"image-missing", "images-unlisted"}, "x/y.png"),
    "name with a zero byte": (put("images", 0, file_name="a\0.png"), {"image-missing", "images-unlisted"}, "images[0]"),
    "size of the record wrong": (put("images", 0, width=50), {"image-size"}, ""),
    "size of the record missing": (put("images", 0, width=None, height=None), set(), ""),
    "category no object": (add("categories", "bird"), {"category-record"}, "categories[2]"),
    "category without name": (
        put("categories", 1, name=None), {"category-record", "category-unknown", "class-not-in-train"},
        "categories[1]",
    ),
    "two categories of one id": (
        add("categories", {"id": 2, "name": "bird"}), {"category-id-duplicate"}, "categories[2] ('bird') has the id 2",
    ),
    "two categories of one name": (
        add("categories", {"id": 5, "name": "dog"}), {"category-name-duplicate", "class-unused"}, "",
    ),
    "category without objects": (add("categories", {"id": 5, "name": "bird"}), {"class-unused"}, ""),
    "object no object": (add("annotations", None), {BAD}, "annotations[3]"),
    "unknown category": (put("annotations", 0, category_id=9), {"category-unknown", "class-only-in-val"}, RECORD),
    "category a text": (put("annotations", 0, category_id="one"), {"category-unknown", "class-only-in-val"}, RECORD),
    "unknown image": (put("annotations", 0, image_id=77), {"image-unknown", "class-only-in-val"}, RECORD),
    "no box": (put("annotations", 0, bbox=None), {BAD, "class-only-in-val"}, RECORD),
    "three numbers": (box(1, 2, 3), {BAD, "class-only-in-val"}, RECORD),
    "a text in the box": (box(1, 2, 3, "4"), {BAD, "class-only-in-val"}, RECORD),
    "NaN in the box": (box(1, 2, float("nan"), 4), {BAD, "class-only-in-val"}, RECORD),
    "infinity in the box": (box(float("inf"), 2, 3, 4), {BAD, "class-only-in-val"}, RECORD),
    "a number without end": (box(10**400, 2, 3, 4), {BAD, "class-only-in-val"}, RECORD),
    "iscrowd a number as text": (put("annotations", 0, iscrowd="0"), set(), ""),
    "iscrowd a text": (put("annotations", 0, iscrowd="no"), {BAD, "class-only-in-val"}, RECORD),
    "two objects of one id": (put("annotations", 1, id=1), {"annotation-id-duplicate"}, ""),
    "ids of objects missing": (put("annotations", 1, id=None), set(), ""),
    "no width": (box(4, 2, 0, 10), {"box-degenerate"}, ""),
    "negative height": (box(4, 12, 16, -10), {"box-degenerate"}, ""),
    "outside": (box(41, 2, 5, 5), {"box-outside"}, ""),
    "far outside": (box(1e300, 2, 1e300, 5), {"box-outside"}, ""),
    "over the border": (box(30, 2, 16, 10), {"box-overhang"}, ""),
    "a little over the border": (box(30, 2, 11, 10), set(), ""),
    "there twice": (add("annotations", {**NEW, "bbox": [4, 2, 16, 10]}), {"box-duplicate"}, ""),
    "twice with other classes": (add("annotations", {**NEW, "category_id": 2, "bbox": [4, 2, 16, 10]}), set(), ""),
    "tiny": (add("annotations", {**NEW, "bbox": [4, 2, 1, 10]}), {"tiny-objects"}, ""),
    "just not tiny": (add("annotations", {**NEW, "bbox": [4, 2, 1.5, 10]}), set(), ""),
    "boxes in 0..1": (normalized, {"boxes-normalized"}, "all boxes in 0..1"),
    "boxes as corners": (corners, {"boxes-corners"}, "only as x0, y0, x1, y1"),
    "objects count from 0": (objects_from_zero, {"category-off-by-one"}, "add 1 to"),
    "categories count from 0": (categories_from_zero, {"category-off-by-one", "category-renumbered"}, "subtract 1"),
    "validation counts from 0": (val_from_zero, {"category-renumbered"}, "'cat' 0 instead of 1"),
    "exchanged in the validation": (exchanged, {"category-renumbered"}, "'cat' 2 instead of 1"),
    "exchanged, and one more class": (
        lambda root: (exchanged(root), add("categories", {"id": 3, "name": "lion"}, VAL)(root)),
        {"category-renumbered"}, "'cat' 2 instead of 1",
    ),
    "exchanged, and one more class with objects": (
        lambda root: (
            exchanged(root), add("categories", {"id": 3, "name": "lion"}, VAL)(root),
            add("annotations", {**NEW, "category_id": 3}, VAL)(root),
        ),
        {"category-renamed", "class-not-in-train"}, "",
    ),
    "a class of the validation only": (
        unknown_class, {"class-not-in-train", "class-not-in-val"}, "'bird' (id 7)",
    ),
    "another name in the validation": (put("categories", 0, VAL, name="lion"), {"category-renamed"}, ""),
    "no objects to train one class": (
        edited()(lambda c: c["annotations"].pop(0)), {"class-only-in-val"}, "",
    ),
    "one class a hundred times": (
        edited()(lambda c: c["annotations"].extend(
            {**NEW, "id": 100 + n, "category_id": 2, "bbox": [n / 10, 2, 8, 8]} for n in range(100)
        )), {"class-imbalance"}, "",
    ),
    "crowds": (add("annotations", {**NEW, "iscrowd": 1}), set(), ""),
    "with a byte order mark": (
        lambda root: (root / TRAIN).write_text((root / TRAIN).read_text(), "utf-8-sig"), set(), "",
    ),
    "no validation": (lambda root: (root / VAL).unlink(), {"split-missing"}, "'val'"),
}  # fmt: skip


def row(text):
    return lambda root: (root / "labels/train/a.txt").write_text(text)


TWO = "1 0.75 0.6 0.5 0.75\n"
ROW = "labels/train/a.txt: line 2"
YOLO = {
    "too few values": (row(TWO + "0 0.5 0.5\n"), {"label-row", "class-only-in-val"}, ROW),
    "words": (row(TWO + "cat 0.5 0.5 0.1 0.1\n"), {"label-row", "class-only-in-val"}, ROW),
    "an unknown class": (row(TWO + "2 0.5 0.5 0.1 0.1\n"), {"label-row", "class-only-in-val"}, ROW),
    "pixels": (row(TWO + "0 20 10 8 8\n"), {"label-row", "class-only-in-val"}, ROW),
    "NaN": (row(TWO + "0 nan 0.5 0.5 0.5\n"), {"label-row", "class-only-in-val"}, ROW),
    "no text": (
        lambda root: (root / "labels/train/a.txt").write_bytes(b"\xff\xfe\x00"),
        {"label-unreadable", "class-only-in-val"}, "labels/train/a.txt",
    ),
    "no width": (row(TWO + "0 0.3 0.4 0.4 0.5\n0 0.5 0.5 0 0.1\n"), {"box-degenerate"}, ""),
    "there twice": (row(TWO + "0 0.3 0.4 0.4 0.5\n" * 2), {"box-duplicate"}, ""),
    "over the border": (row("0 0.9 0.4 0.4 0.5\n"), {"box-overhang"}, ""),
    "a polygon": (row("0 0.1 0.1 0.5 0.2 0.3 0.6\n"), set(), ""),
    "no label files": (
        lambda root: [path.unlink() for path in (root / "labels/train").iterdir()],
        {"no-training-objects", "class-only-in-val"}, "labels/…/NAME.txt",
    ),
    "no label file": (lambda root: (root / "labels/train/b.txt").unlink(), set(), ""),
    "bad image": (
        lambda root: (root / "images/train/a.png").write_bytes(b"x"), {"image-unreadable", "class-only-in-val"},
        "images/train/a.png",
    ),
    "names gone": (
        lambda root: (root / "data.yaml").write_text("train: images/train\nval: images/val\n"), {"split-missing"},
        "'names' is not a list",
    ),
    "no such folder": (
        lambda root: (root / "data.yaml").write_text("train: images/train\nval: images/v\nnames: [cat, dog]\n"),
        {"split-missing"}, "'val' is images/v",
    ),
    "one folder for both": (
        lambda root: (root / "data.yaml").write_text("train: images/train\nval: images/train\nnames: [cat, dog]\n"),
        {"splits-same"}, "images/train",
    ),
    "no images": (
        lambda root: [path.unlink() for path in (root / "images/train").iterdir()],
        {"image-record", "no-training-objects", "class-only-in-val"}, "images/train",
    ),
}  # fmt: skip


def xml(text):
    return lambda root: (root / "Annotations/a.xml").write_text(text)


GOOD = voc_xml("a.jpg", [(0, (4, 2, 16, 10))], 1)
LOST = {"class-only-in-val"}
VOC = {
    "cut off": (xml(GOOD[:60]), {"label-unreadable"} | LOST, "Annotations/a.xml"),
    "a bomb": (
        xml('<!DOCTYPE a [<!ENTITY b "bbbb"><!ENTITY c "&b;&b;&b;">]><annotation>&c;</annotation>'),
        {"label-unreadable"} | LOST, "Annotations/a.xml",
    ),
    "another file inside": (
        xml('<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><annotation>&b;</annotation>'),
        {"label-unreadable"} | LOST, "Annotations/a.xml",
    ),
    "no name": (xml(GOOD.replace("<name>cat</name>", "")), {"label-row"} | LOST, "object[0]"),
    "no box": (xml(GOOD.replace("<xmin>5</xmin>", "")), {"label-row"} | LOST, "object[0] ('cat')"),
    "words in the box": (xml(GOOD.replace("<xmin>5<", "<xmin>five<")), {"label-row"} | LOST, "object[0] ('cat')"),
    "corners exchanged": (xml(GOOD.replace("<xmin>5<", "<xmin>39<")), {"box-degenerate"}, ""),
    "no size": (xml(GOOD.replace("<width>40</width>", "<width>0</width>")), set(), ""),
    "size wrong": (xml(GOOD.replace("<width>40</width>", "<width>50</width>")), {"image-size"}, ""),
    "no XML": (lambda root: (root / "Annotations/a.xml").unlink(), {"label-unreadable"} | LOST, "Annotations/a.xml"),
    "no image": (lambda root: (root / "JPEGImages/a.jpg").unlink(), {"image-missing"} | LOST, "line 1"),
    "no list": (lambda root: (root / "ImageSets/Main/val.txt").unlink(), {"split-missing"}, "val.txt"),
    "a class of the validation only": (
        lambda root: (root / "Annotations/c.xml").write_text(GOOD.replace("cat", "bird").replace("a.jpg", "c.jpg")),
        {"class-only-in-val", "class-not-in-val"}, "'bird'",
    ),
}  # fmt: skip
