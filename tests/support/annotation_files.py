"""Faulty annotation files of every format and the issues that each leads to."""

import json

from tests.support.datasets import voc_xml, write_image

TRAIN = "train/_annotations.coco.json"
VAL = "valid/_annotations.coco.json"


def edit(file=TRAIN):
    """Return a decorator that turns a change of the JSON content into a change of the annotation file."""

    def decorator(change):
        def apply(root):
            path = root / file
            content = json.loads(path.read_text())
            change(content)
            path.write_text(json.dumps(content))

        return apply

    return decorator


def patch(section, position, file=TRAIN, **values):
    """Change one record; a value of None removes the key."""

    @edit(file)
    def change(content):
        record = content[section][position]
        record.update(values)
        for key in [key for key, value in values.items() if value is None]:
            del record[key]

    return change


def append(section, record, file=TRAIN):
    return edit(file)(lambda content: content[section].append(record))


def write_file(content, file=TRAIN):
    return lambda root: (root / file).write_bytes(content)


def box(*values):
    return patch("annotations", 0, bbox=list(values))


@edit()
def normalize_boxes(content):
    for record in content["annotations"]:
        record["bbox"] = [value / (40, 20, 40, 20)[place] for place, value in enumerate(record["bbox"])]


@edit()
def list_image_twice(content):
    content["images"].append({**content["images"][0], "id": 8})
    content["annotations"] += [
        {**record, "id": 90 + record["id"], "image_id": 8}
        for record in content["annotations"] if record["image_id"] == 1
    ]  # fmt: skip


def move_image_to_second_file(root):
    """Leave the objects of the first image to another file, as exports in parts do."""
    path = root / TRAIN
    (path.parent / "part_2.json").write_text(path.read_text())
    content = json.loads(path.read_text())
    content["images"] = [image for image in content["images"] if image["id"] != 1]
    content["annotations"] = [record for record in content["annotations"] if record["image_id"] != 1]
    path.write_text(json.dumps(content))


@edit()
def boxes_as_corners(content):
    boxes = [[14, 4, 35, 19], [4, 2, 20, 12], [10, 5, 30, 15]]
    for record, values in zip(content["annotations"], boxes, strict=True):
        record["bbox"] = values


@edit()
def zero_based_annotations(content):
    for record in content["annotations"]:
        record["category_id"] -= 1


@edit()
def zero_based_categories(content):
    for record in content["categories"]:
        record["id"] -= 1


@edit(VAL)
def zero_based_val(content):
    for key, records in (("id", content["categories"]), ("category_id", content["annotations"])):
        for record in records:
            record[key] -= 1


@edit(VAL)
def swap_val_categories(content):
    for key, records in (("id", content["categories"]), ("category_id", content["annotations"])):
        for record in records:
            record[key] = 3 - record[key]


@edit(VAL)
def add_val_class(content):
    content["categories"].append({"id": 7, "name": "bird"})
    content["annotations"][0]["category_id"] = 7


NEW = {"id": 9, "image_id": 1, "category_id": 1, "bbox": [1, 2, 8, 8]}
BAD, RECORD, FILE = "annotation-record", "annotations[0] (id 1)", "_annotations.coco.json"
# fault → (change to a valid COCO dataset, expected issue codes, text that the error of training contains)
COCO = {
    "empty file": (write_file(b""), {"file-unreadable"}, FILE),
    "truncated": (write_file(b'{"images": ['), {"file-unreadable"}, FILE),
    "HTML page": (write_file(b"<html>"), {"file-unreadable"}, FILE),
    "binary": (write_file(b"\xff\xfe\xfa\x00\x99"), {"file-unreadable"}, FILE),
    "list": (write_file(b"[]"), {"file-unreadable"}, FILE),
    "deeply nested": (write_file(b"[" * 100_000), {"file-unreadable"}, FILE),
    "images missing": (edit()(lambda c: c.pop("images")), {"file-unreadable"}, "'images'"),
    "images not a list": (edit()(lambda c: c.update(images={})), {"file-unreadable"}, "'images'"),
    "no images": (
        edit()(lambda c: c.update(images=[], annotations=[])),
        {"image-record", "no-training-objects", "class-only-in-val", "images-unlisted"}, "no images",
    ),
    "no categories": (
        edit()(lambda c: c.update(categories=[], annotations=[])),
        {"category-record", "no-training-objects", "class-not-in-train"}, "'categories' is empty",
    ),
    "no annotations": (
        edit()(lambda c: c.update(annotations=[])), {"no-training-objects", "class-only-in-val"},
        f"{FILE}: has no objects to train on; label its images",
    ),
    "only crowds": (
        edit()(lambda c: [record.update(iscrowd=1) for record in c["annotations"]]),
        {"no-training-objects", "class-only-in-val"}, "no objects to train on",
    ),
    "no annotations in val": (
        edit(VAL)(lambda c: c.update(annotations=[])), {"no-objects", "class-not-in-val"}, "",
    ),
    "image not an object": (append("images", 5), {"image-record"}, "images[3]"),
    "image without id": (patch("images", 2, id=None), {"image-record", "images-unlisted"}, "images[2]"),
    "image id a text": (patch("images", 2, id="c"), set(), ""),
    "duplicate image id, a text": (
        lambda root: [patch("images", number, id="9f2c-1")(root) for number in (1, 2)],
        {"image-id-duplicate", "images-unlisted", "image-unknown"},
        "has the id '9f2c-1' of images[1]",
    ),
    "rotated box of CVAT": (patch("annotations", 0, attributes={"rotation": 30.0}), {"box-rotated"}, ""),
    "rotated by half a turn": (patch("annotations", 0, attributes={"rotation": 180.0}), set(), ""),
    "no file name": (patch("images", 2, file_name=None), {"image-record", "images-unlisted"}, "images[2] (id 3)"),
    "duplicate image id": (
        patch("images", 2, id=1), {"image-id-duplicate", "images-unlisted"}, "images[2] ('empty.png') has the id 1",
    ),
    "one file in two records": (
        append("images", {"id": 8, "file_name": "a.png"}), {"image-in-parts"},
        "images[3] (id 8) names the file 'a.png' of images[0], and their objects differ",
    ),
    "objects in a second file": (
        move_image_to_second_file, {"annotations-unread", "images-unlisted", "class-only-in-val"}, "part_2.json",
    ),
    "one file in two records with equal objects": (list_image_twice, {"image-twice"}, ""),
    "only zero-area boxes": (
        edit()(lambda c: [record.update(bbox=[9, 9, 0, 0]) for record in c["annotations"]]),
        {"no-training-objects", "box-degenerate"}, "has no box with an area inside its image",
    ),
    "zero-area box with a mask": (
        patch("annotations", 0, bbox=[0, 0, 0, 0], segmentation=[[4, 2, 20, 2, 20, 12]]), {"box-from-mask"}, "",
    ),
    "image missing": (patch("images", 0, file_name="x/y.png"), {"image-missing", "images-unlisted"}, "x/y.png"),
    "NUL in file name": (patch("images", 0, file_name="a\0.png"), {"image-missing", "images-unlisted"}, "images[0]"),
    "recorded size wrong": (patch("images", 0, width=50), {"image-size"}, ""),
    "recorded size missing": (patch("images", 0, width=None, height=None), set(), ""),
    "category not an object": (append("categories", "bird"), {"category-record"}, "categories[2]"),
    "category without name": (
        patch("categories", 1, name=None), {"category-record", "category-unknown", "class-not-in-train"},
        "categories[1]",
    ),
    "duplicate category id": (
        append("categories", {"id": 2, "name": "bird"}), {"category-id-duplicate"},
        "categories[2] ('bird') has the id 2",
    ),
    "duplicate category name": (
        append("categories", {"id": 5, "name": "dog"}), {"category-name-duplicate", "class-unused"}, "",
    ),
    "category without objects": (append("categories", {"id": 5, "name": "bird"}), {"class-unused"}, ""),
    "annotation not an object": (append("annotations", None), {BAD}, "annotations[3]"),
    "unknown category": (patch("annotations", 0, category_id=9), {"category-unknown", "class-only-in-val"}, RECORD),
    "text category id": (patch("annotations", 0, category_id="one"), {"category-unknown", "class-only-in-val"}, RECORD),
    "unknown image": (patch("annotations", 0, image_id=77), {"image-unknown", "class-only-in-val"}, RECORD),
    "no box": (patch("annotations", 0, bbox=None), {BAD, "class-only-in-val"}, RECORD),
    "box of three numbers": (box(1, 2, 3), {BAD, "class-only-in-val"}, RECORD),
    "string in box": (box(1, 2, 3, "four"), {BAD, "class-only-in-val"}, RECORD),
    "NaN in box": (box(1, 2, float("nan"), 4), {BAD, "class-only-in-val"}, RECORD),
    "infinity in box": (box(float("inf"), 2, 3, 4), {BAD, "class-only-in-val"}, RECORD),
    "huge number in box": (box(10**400, 2, 3, 4), {BAD, "class-only-in-val"}, RECORD),
    "iscrowd a numeric string": (patch("annotations", 0, iscrowd="0"), set(), ""),
    "iscrowd a word": (patch("annotations", 0, iscrowd="no"), {BAD, "class-only-in-val"}, RECORD),
    "duplicate annotation id": (patch("annotations", 1, id=1), {"annotation-id-duplicate"}, ""),
    "annotation id missing": (patch("annotations", 1, id=None), set(), ""),
    "zero width": (box(4, 2, 0, 10), {"box-degenerate"}, ""),
    "negative height": (box(4, 12, 16, -10), {"box-swapped"}, "the box between its corners is used"),
    "outside the image": (box(41, 2, 5, 5), {"box-outside"}, ""),
    "far outside the image": (box(1e300, 2, 1e300, 5), {"box-outside"}, ""),
    "crosses the border": (box(30, 2, 16, 10), {"box-overhang"}, ""),
    "crosses the border by one pixel": (box(30, 2, 11, 10), set(), ""),
    "duplicate box": (append("annotations", {**NEW, "bbox": [4, 2, 16, 10]}), {"box-duplicate"}, ""),
    "duplicate box, other class": (append("annotations", {**NEW, "category_id": 2, "bbox": [4, 2, 16, 10]}), set(), ""),
    "tiny": (append("annotations", {**NEW, "bbox": [4, 2, 1, 10]}), {"tiny-objects"}, ""),
    "barely not tiny": (append("annotations", {**NEW, "bbox": [4, 2, 1.5, 10]}), set(), ""),
    "normalized boxes": (normalize_boxes, {"boxes-normalized"}, "all boxes in 0..1"),
    "boxes as corners": (boxes_as_corners, {"boxes-corners"}, "only as x0, y0, x1, y1"),
    "zero-based annotations": (zero_based_annotations, {"category-off-by-one"}, "add 1 to"),
    "zero-based categories": (zero_based_categories, {"category-off-by-one", "category-renumbered"}, "subtract 1"),
    "zero-based val": (zero_based_val, {"category-renumbered"}, "'cat' 0 instead of 1"),
    "categories swapped in val": (swap_val_categories, {"category-renumbered"}, "'cat' 2 instead of 1"),
    "categories swapped in val, unused extra class": (
        lambda root: (swap_val_categories(root), append("categories", {"id": 3, "name": "lion"}, VAL)(root)),
        {"category-renumbered"}, "'cat' 2 instead of 1",
    ),
    "categories swapped in val, extra class with objects": (
        lambda root: (
            swap_val_categories(root), append("categories", {"id": 3, "name": "lion"}, VAL)(root),
            append("annotations", {**NEW, "category_id": 3}, VAL)(root),
        ),
        {"category-renamed", "class-not-in-train"}, "",
    ),
    "class only in val": (
        add_val_class, {"class-not-in-train", "class-not-in-val"}, "'bird' (id 7)",
    ),
    "category renamed in val": (patch("categories", 0, VAL, name="lion"), {"category-renamed"}, ""),
    "class without training objects": (
        edit()(lambda c: c["annotations"].pop(0)), {"class-only-in-val"}, "",
    ),
    "class imbalance": (
        edit()(lambda c: c["annotations"].extend(
            {**NEW, "id": 100 + n, "image_id": 1 + n % 2, "category_id": 2, "bbox": [n / 10, 2, 8, 8]}
            for n in range(100)
        )), {"class-imbalance"}, "",
    ),
    "many objects": (
        edit()(lambda c: c["annotations"].extend(
            {**NEW, "id": 100 + n, "category_id": 1 + n % 2, "bbox": [n / 10, 2, 8, 8]} for n in range(100)
        )), {"crowded-images"}, "",
    ),
    "crowds": (append("annotations", {**NEW, "iscrowd": 1}), set(), ""),
    "byte order mark": (
        lambda root: (root / TRAIN).write_text((root / TRAIN).read_text(), "utf-8-sig"), set(), "",
    ),
    "val missing": (lambda root: (root / VAL).unlink(), {"split-missing"}, "'val'"),
}  # fmt: skip


def row(text):
    return lambda root: (root / "labels/train/a.txt").write_text(text)


TWO = "1 0.75 0.6 0.5 0.75\n"
ROW = "labels/train/a.txt: line 2"
YOLO = {
    "too few values": (row(TWO + "0 0.5 0.5\n"), {"label-row", "class-only-in-val"}, ROW),
    "class name instead of number": (row(TWO + "cat 0.5 0.5 0.1 0.1\n"), {"label-row", "class-only-in-val"}, ROW),
    "unknown class": (row(TWO + "2 0.5 0.5 0.1 0.1\n"), {"label-row", "class-only-in-val"}, ROW),
    "boxes in pixels": (row(TWO + "0 20 10 8 8\n"), {"label-row", "class-only-in-val"}, ROW),
    "NaN": (row(TWO + "0 nan 0.5 0.5 0.5\n"), {"label-row", "class-only-in-val"}, ROW),
    "binary": (
        lambda root: (root / "labels/train/a.txt").write_bytes(b"\xff\xfe\x00"),
        {"label-unreadable", "class-only-in-val"}, "labels/train/a.txt",
    ),
    "zero width": (row(TWO + "0 0.3 0.4 0.4 0.5\n0 0.5 0.5 0 0.1\n"), {"box-degenerate"}, ""),
    "duplicate box": (row(TWO + "0 0.3 0.4 0.4 0.5\n" * 2), {"box-duplicate"}, ""),
    "crosses the border": (row("0 0.9 0.4 0.4 0.5\n"), {"box-overhang"}, ""),
    "polygon": (row("0 0.1 0.1 0.5 0.2 0.3 0.6\n"), set(), ""),
    "no label files": (
        lambda root: [path.unlink() for path in (root / "labels/train").iterdir()],
        {"no-training-objects", "class-only-in-val"}, "labels/…/NAME.txt",
    ),
    "label file with a hash": (
        lambda root: (root / "labels/train/b.txt").rename(root / "labels/train/3fa81c02-b.txt"), {"label-name"},
        "its objects are read for 'b.png'",
    ),
    "image of a format that is not read": (
        lambda root: (root / "images/train/b.png").rename(root / "images/train/b.heic"), {"image-format"}, "b.heic",
    ),
    "other classes beside the labels": (
        lambda root: (root / "labels/train/classes.txt").write_text("dog\ncat\n"), {"classes-differ"},
        "labels/train/classes.txt: line 1 names class 0 'dog', but",
    ),
    "keypoints without kpt_shape": (
        row("1 0.75 0.6 0.2 0.2 0.7 0.6 0.8 0.65\n"), {"label-keypoints", "class-only-in-val"},
        "set kpt_shape: [2, 2] in data.yaml",
    ),
    "labeled image beside the splits": (
        lambda root: (write_image(root / "images/x.png"), (root / "labels/x.txt").write_text(TWO)),
        {"outside-splits"}, "images: has a labeled image with 2 objects in no split: x.png (labels/x.txt)",
    ),
    "path of another machine": (
        lambda root: (root / "data.yaml").write_text(
            "train: H:\\set\\images\\train\nval: images/val\nnames: [cat, dog]\n"
        ),
        {"path-moved"}, "images/train is read instead",
    ),
    "no label file": (lambda root: (root / "labels/train/b.txt").unlink(), set(), ""),
    "bad image": (
        lambda root: (root / "images/train/a.png").write_bytes(b"x"), {"image-unreadable", "class-only-in-val"},
        "images/train/a.png",
    ),
    "names missing": (
        lambda root: (root / "data.yaml").write_text("train: images/train\nval: images/val\n"), {"split-missing"},
        "'names' is not a list",
    ),
    "folder missing": (
        lambda root: (root / "data.yaml").write_text("train: images/train\nval: images/v\nnames: [cat, dog]\n"),
        {"split-missing"}, "'val' is images/v",
    ),
    "same folder for both splits": (
        lambda root: (root / "data.yaml").write_text("train: images/train\nval: images/train\nnames: [cat, dog]\n"),
        {"splits-same"}, "images/train",
    ),
    "no images": (
        lambda root: [path.unlink() for path in (root / "images/train").iterdir()],
        {"image-record", "label-unmatched", "no-training-objects", "class-only-in-val"}, "a.txt: belongs to no image",
    ),
}  # fmt: skip


def xml(text):
    return lambda root: (root / "Annotations/a.xml").write_text(text)


XML = voc_xml("a.jpg", [(0, (4, 2, 16, 10))], 1)
LOST = {"class-only-in-val"}
VOC = {
    "truncated": (xml(XML[:60]), {"label-unreadable"} | LOST, "Annotations/a.xml"),
    "entity expansion": (
        xml('<!DOCTYPE a [<!ENTITY b "bbbb"><!ENTITY c "&b;&b;&b;">]><annotation>&c;</annotation>'),
        {"label-unreadable"} | LOST, "Annotations/a.xml",
    ),
    "external entity": (
        xml('<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><annotation>&b;</annotation>'),
        {"label-unreadable"} | LOST, "Annotations/a.xml",
    ),
    "no name": (xml(XML.replace("<name>cat</name>", "")), {"label-row"} | LOST, "object[0]"),
    "no box": (xml(XML.replace("<xmin>5</xmin>", "")), {"label-row"} | LOST, "object[0] ('cat')"),
    "word in box": (xml(XML.replace("<xmin>5<", "<xmin>five<")), {"label-row"} | LOST, "object[0] ('cat')"),
    "corners swapped": (xml(XML.replace("<xmin>5<", "<xmin>39<")), {"box-swapped"}, "corners in another order"),
    "no size": (xml(XML.replace("<width>40</width>", "<width>0</width>")), set(), ""),
    "wrong size": (xml(XML.replace("<width>40</width>", "<width>50</width>")), {"image-size"}, ""),
    "published dataset with a corner at 0": (
        xml(XML.replace("<size>", "<source><database>The VOC2007 Database</database></source><size>", 1)
            .replace("<xmin>5<", "<xmin>0<")),
        {"pixel-origin-unclear"}, "",
    ),
    "rotated box": (
        xml(XML.replace("</bndbox>", "</bndbox><attributes><attribute><name>rotation</name><value>10</value>"
                        "</attribute></attributes>")),
        {"box-rotated"}, "",
    ),
    "no XML": (lambda root: (root / "Annotations/a.xml").unlink(), {"label-unreadable"} | LOST, "Annotations/a.xml"),
    "no image": (
        lambda root: (root / "JPEGImages/a.jpg").unlink(), {"image-missing", "label-unmatched"} | LOST, "line 1",
    ),
    "no list": (lambda root: (root / "ImageSets/Main/val.txt").unlink(), {"split-missing"}, "val.txt"),
    "class only in val": (
        lambda root: (root / "Annotations/c.xml").write_text(XML.replace("cat", "bird").replace("a.jpg", "c.jpg")),
        {"class-only-in-val", "class-not-in-val"}, "'bird'",
    ),
}  # fmt: skip
