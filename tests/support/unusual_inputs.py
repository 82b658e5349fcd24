"""Unusual datasets: encodings, types, links, spellings of paths, rare image formats; with their issues."""

import gzip
import os
import shutil
import struct
import unicodedata
import zlib

import numpy as np
from PIL import Image, features

from tests.support.annotation_files import BAD, GOOD, LOST, RECORD, ROW, TRAIN, add, edited, put, row, xml
from tests.support.datasets import coco_set, picture, voc_set, yolo_set
from tests.support.image_files import BROKEN, IMAGE, JPEG, PNG, chunk, encoded

# --- images


def wide_png():
    """16 bits a color, which Pillow cannot write."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 40, 20, 16, 2, 0, 0, 0))
    rows = zlib.compress(b"".join(b"\0" + bytes(240) for _ in range(20)))
    return PNG[:8] + head + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def real_numbers(value):
    return encoded("TIFF", Image.fromarray(np.full((20, 40), value, np.float32)))


IMAGES = {
    "PostScript, which is a program": (encoded("EPS"), BROKEN),
    "HEIC": (b"\0\0\0\x18ftypheic\0\0\0\0heicmif1" + bytes(500), BROKEN),
    "a film of a camera": (b"\0\0\0\x20ftypisom" + bytes(300), BROKEN),
    "a PNG, compressed once more": (gzip.compress(PNG), BROKEN),
    "a PNG that went through text mode": (PNG.replace(b"\n", b"\r\n"), BROKEN),
    "a PNG with a text that swells": (PNG[:33] + chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(5_000_000))) + PNG[33:],
                                      BROKEN),
    "JPEG: the last byte missing": (JPEG[:-1], BROKEN),
    "PPM: sides beyond sense": (b"P6 99999999 99999999 255\n", BROKEN),
    "animated PNG": (encoded("PNG", save_all=True, append_images=[IMAGE.rotate(90)]), set()),
    "animated WebP": (encoded("WEBP", save_all=True, append_images=[IMAGE.rotate(90)]), set()),
    "two pictures of a telephone": (encoded("MPO", save_all=True, append_images=[IMAGE]), set()),
    "JPEG with a color profile that is none": (encoded("JPEG", icc_profile=b"junk" * 100), set()),
    "CMYK JPEG": (encoded("JPEG", IMAGE.convert("CMYK")), set()),
    "16 bits a color": (wide_png(), set()),
    "all NaN": (real_numbers(np.nan), set()),
    "all infinite": (real_numbers(np.inf), set()),
    "TGA": (encoded("TGA"), set()),
    "a row of pixels": (encoded("PNG", Image.new("RGB", (5000, 1))), {"image-size", "box-outside"}),
    "a column of pixels": (encoded("PNG", Image.new("RGB", (1, 5000))), {"image-size", "box-outside"}),
}  # fmt: skip
if features.check("avif"):
    IMAGES["AVIF"] = (encoded("AVIF"), set())
if features.check("jpg_2000"):
    IMAGES["JPEG 2000"] = (encoded("JPEG2000"), set())

# --- COCO JSON


def written(change):
    """The annotation file's text, changed to bytes."""
    return lambda root: (root / TRAIN).write_bytes(change((root / TRAIN).read_text()))


def renamed(real, named):
    """An image called `real` on the disk and `named` in its record."""

    def apply(root):
        (root / "train/a.png").rename(root / "train" / real)
        put("images", 0, file_name=named)(root)

    return apply


def replaced(place, make):
    """Something else in the place of a file."""

    def apply(root):
        (root / place).unlink(missing_ok=True)
        make(root / place)

    return apply


def loop(path):
    path.symlink_to(path.name)


ONE, UNREADABLE = {BAD, "class-only-in-val"}, {"file-unreadable"}
IMAGE_RECORD, UNNAMED = {"image-record", "images-unlisted"}, {"image-missing", "images-unlisted"}
NFC, NFD = (unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD"))
COCO = {
    "UTF-16": (written(lambda text: text.encode("utf-16")), set(), ""),
    "Latin 1": (written(lambda text: text.replace("cat", "é").encode("latin-1")), UNREADABLE, "not valid JSON"),
    "gzip": (written(lambda text: gzip.compress(text.encode())), UNREADABLE, "not valid JSON"),
    "a comma too many": (written(lambda text: text[:-1].encode() + b",}"), UNREADABLE, "not valid JSON"),
    "two documents": (written(lambda text: (text + text).encode()), UNREADABLE, "Extra data"),
    "a number": (written(lambda text: b"5"), UNREADABLE, "no list 'images'"),
    "a key that is there twice": (written(lambda text: text.replace('"images":', '"images": 5, "images":').encode()),
                                  set(), ""),
    "infinity beside the records": (edited()(lambda c: c.update(info={"x": float("inf")})), set(), ""),
    "a number of 5000 digits": (written(lambda text: text.replace('"id": 3,', f'"id": {"9" * 5000},').encode()),
                                UNREADABLE, "not valid JSON"),
    "a folder": (replaced(TRAIN, os.mkdir), UNREADABLE, "directory"),
    "a link to itself": (replaced(TRAIN, loop), UNREADABLE, "symbolic links"),
    "annotations null": (edited()(lambda c: c.update(annotations=None)), UNREADABLE, "'annotations'"),
    "image id NaN": (put("images", 2, id=float("nan")), IMAGE_RECORD, "images[2]"),
    "image id 3.0": (put("images", 2, id=3.0), set(), ""),
    "image id 3.5": (put("images", 2, id=3.5), IMAGE_RECORD, "images[2]"),
    "image id true": (put("images", 2, id=True), IMAGE_RECORD, "images[2]"),
    "image id of 70 bits": (put("images", 2, id=2**70), IMAGE_RECORD, "images[2]"),
    "image name a list": (put("images", 2, file_name=["empty.png"]), IMAGE_RECORD, "images[2] (id 3)"),
    "negative size of the record": (put("images", 0, width=-40, height=-20), set(), ""),
    "size of the record a text": (put("images", 0, width="40"), set(), ""),
    "category id a list": (put("annotations", 0, category_id=[1]), {"category-unknown", "class-only-in-val"}, RECORD),
    "category id true": (put("annotations", 0, category_id=True), {"category-unknown", "class-only-in-val"}, RECORD),
    "image id of an object a list": (put("annotations", 0, image_id=[1]), {"image-unknown", "class-only-in-val"},
                                     RECORD),
    "a box of words": (put("annotations", 0, bbox={"x": 1, "y": 2, "w": 3, "h": 4}), ONE, RECORD),
    "a box in a list": (put("annotations", 0, bbox=[[1, 2, 3, 4]]), ONE, RECORD),
    "true in the box": (put("annotations", 0, bbox=[True, 2, 3, 4]), ONE, RECORD),
    "polygons and no box": (put("annotations", 0, bbox=None, segmentation=[[1, 1, 9, 1, 9, 9]]),
                            {"box-from-mask"}, "1 object with a mask but no bbox"),
    "run lengths and no box": (
        put("annotations", 0, bbox=None, segmentation={"size": [20, 40], "counts": [82, *[10, 10] * 16, 398]}),
        {"box-from-mask"}, "1 object with a mask but no bbox",
    ),
    "packed run lengths and no box": (
        put("annotations", 0, bbox=None,
            segmentation={"size": [20, 40], "counts": "b2::00000000000000000000000000000^<"}),
        {"box-from-mask"}, "1 object with a mask but no bbox",
    ),
    "broken run lengths and no box": (
        put("annotations", 0, bbox=None, segmentation={"size": [20, 40], "counts": "?!"}), ONE, RECORD,
    ),
    "a polygon of two points and no box": (put("annotations", 0, bbox=None, segmentation=[[1, 1, 9, 9]]), ONE, RECORD),
    "a polygon of words and no box": (put("annotations", 0, bbox=None, segmentation=[["a"] * 6]), ONE, RECORD),
    "a run-length mask and no box": (put("annotations", 0, bbox=None, segmentation={"counts": [0, 800]}), ONE, RECORD),
    "iscrowd a list": (put("annotations", 0, iscrowd=[]), ONE, RECORD),
    "iscrowd missing": (put("annotations", 0, iscrowd=None), set(), ""),
    "area NaN": (put("annotations", 0, area=float("nan")), set(), ""),
    "area without end": (put("annotations", 0, area=10**400), set(), ""),
    "an object of nothing": (add("annotations", {}), {"image-unknown"}, "annotations[3]"),
    "a record with a deep nest": (
        written(lambda text: text.replace('"iscrowd": 0', f'"x": {"[" * 900}{"]" * 900}, "iscrowd": 0').encode()),
        set(), "",
    ),
    "category name no text": (
        put("categories", 0, name=[5]), {"category-record", "category-unknown", "class-not-in-train"}, "categories[0]",
    ),
    "category name empty": (put("categories", 0, name=""), {"category-renamed"}, ""),
    "category name of two lines": (put("categories", 0, name="ca\nt"), {"category-renamed"}, ""),
    "category name without end": (put("categories", 0, name="x" * 100_000), {"category-renamed"}, ""),
    "image name without end": (put("images", 0, file_name="x" * 5000), UNNAMED, "images[0]"),
    "image name half a character": (put("images", 0, file_name="\ud800.png"), UNNAMED, "images[0]"),
    "image name a folder": (put("images", 0, file_name="/"), UNNAMED, "images[0]"),
    "image name a URL": (put("images", 0, file_name="https://x.org/a.png"), {"image-name"},
                         "https://x.org/a.png"),
    "image name with backslashes": (put("images", 0, file_name="train\\a.png"), {"image-name"}, "where 'a.png' is"),
    "image name with backslashes, in another case": (put("images", 0, file_name="train\\A.png"), {"image-name"},
                                                     "where 'a.png' is"),
    "image name encoded as in a URL": (renamed("a 1.png", "a%201.png"), {"image-name"}, "where 'a 1.png' is"),
    "image name of another computer": (put("images", 0, file_name="/home/me/set/a.png"), {"image-name"}, "'a.png' is"),
    "image name with a percent sign": (renamed("a%20.png", "a%20.png"), set(), ""),
    "image name with a path, of another's file": (put("images", 0, file_name="x/b.png"), UNNAMED, "x/b.png"),
    "image name decomposed on the disk": (renamed(NFD, NFC), {"image-name"}, "where"),
    "image name decomposed in the file": (renamed(NFC, NFD), {"image-name"}, "where"),
    "image name without its ending": (put("images", 0, file_name="a"), {"image-name"}, "where 'a.png' is"),
    "image name without its ending, of two": (
        lambda root: (picture(root / "train/a.jpg"), put("images", 0, file_name="a")(root)), UNNAMED, "'a'",
    ),
    "image name out of the folder and back": (put("images", 0, file_name="../train/a.png"), set(), ""),
    "image name from the root": (
        lambda root: put("images", 0, file_name=str((root / "train/a.png").absolute()))(root), set(), "",
    ),
    "image name of two lines": (renamed("a\nb.png", "a\nb.png"), set(), ""),
    "image name without ending": (renamed("a", "a"), set(), ""),
    "the annotation file as image": (put("images", 0, file_name="_annotations.coco.json"),
                                     {"image-unreadable", "images-unlisted"}, "_annotations.coco.json"),
    "an image that links to itself": (replaced("train/a.png", loop), {"image-unreadable"}, "train/a.png"),
    "a folder that holds itself": (lambda root: (root / "train/loop").symlink_to(root / "train"), set(), ""),
    "a file for the folder": (lambda root: (shutil.rmtree(root / "train"), (root / "train").write_text("")),
                              {"split-missing"}, "'train'"),
}  # fmt: skip

# --- YOLO and Pascal VOC

SPLITS = "train: images/train\nval: images/val\n"
LABELS = "labels/train/a.txt"


def head(text):
    return lambda root: (root / "data.yaml").write_text(text)


MISSING = {"split-missing"}
YOLO = {
    "a class of 1.0": (row("0 0.3 0.4 0.4 0.5\n1.0 0.75 0.6 0.5 0.75\n"), set(), ""),
    "a class of 0.5": (row("1 0.75 0.6 0.5 0.75\n0.5 0.3 0.4 0.4 0.5\n"), {"label-row", "class-only-in-val"}, ROW),
    "a confidence behind": (row("1 0.75 0.6 0.5 0.75\n0 0.3 0.4 0.4 0.5 0.9\n"), {"label-row", "class-only-in-val"},
                            ROW),
    "commas": (row("1 0.75 0.6 0.5 0.75\n0,0.3,0.4,0.4,0.5\n"), {"label-row", "class-only-in-val"}, ROW),
    "lines of Windows": (row("0 0.3 0.4 0.4 0.5\r\n1 0.75 0.6 0.5 0.75\r\n"), set(), ""),
    "labels in UTF-16": (replaced(LABELS, lambda path: path.write_text("0 0.3 0.4 0.4 0.5\n", "utf-16")),
                         {"label-unreadable", "class-only-in-val"}, LABELS),
    "labels a folder": (replaced(LABELS, os.mkdir), {"label-unreadable", "class-only-in-val"}, LABELS),
    "labels a link to nowhere": (replaced(LABELS, lambda path: path.symlink_to("gone")),
                                 {"label-unreadable", "class-only-in-val"}, LABELS),
    "an empty label file": (replaced(LABELS, lambda path: path.write_text("")), {"class-only-in-val"}, ""),
    "names as a dict": (head(SPLITS + "names: {0: cat, 1: dog}"), set(), ""),
    "names with a gap": (head(SPLITS + "names: {0: cat, 2: dog}"), MISSING, "'names'"),
    "names a text": (head(SPLITS + "names: cat"), MISSING, "'names'"),
    "more classes than names": (head(SPLITS + "nc: 3\nnames: [cat, dog]"), MISSING, "nc is 3"),
    "an empty data.yaml": (head(""), MISSING, "data.yaml"),
    "a program in data.yaml": (head(SPLITS + "names: !!python/object/apply:os.system ['true']"), MISSING,
                               "not valid YAML"),
    "a list that holds itself": (head(SPLITS + "names: &a [*a]"), MISSING, "'names'"),
    "brackets without end": (head("names: " + "[" * 300), MISSING, "not valid YAML"),
    "a split that is a number": (head("train: 5\nval: images/val\nnames: [cat, dog]"), MISSING, "'train'"),
    "a split that is a URL": (head("train: https://x/y\nval: images/val\nnames: [cat, dog]"), MISSING, "'train'"),
    "a split of a name without end": (head(f"train: {'x' * 6000}\nval: images/val\nnames: [cat, dog]"), MISSING,
                                      "'train'"),
    "a list with a name without end": (
        lambda root: ((root / "list.txt").write_text("x" * 6000),
                      head("train: list.txt\nval: images/val\nnames: [cat, dog]")(root)),
        {"image-missing", "image-record", "no-training-objects", "class-only-in-val"}, "list.txt",
    ),
    "a folder with an image's name": (lambda root: (root / "images/train/d.jpg").mkdir(), {"image-missing"},
                                      "d.jpg"),
}  # fmt: skip
VOC = {
    "coordinates with a point": (xml(GOOD.replace("<xmin>5<", "<xmin>5.5<")), set(), ""),
    "NaN": (xml(GOOD.replace("<xmin>5<", "<xmin>nan<")), {"label-row"} | LOST, "object[0] ('cat')"),
    "a web page": (xml("<html><body/></html>"), {"label-unreadable"} | LOST, "<html>"),
    "an empty file": (xml(""), {"label-unreadable"} | LOST, "Annotations/a.xml"),
    "an encoding that nobody knows": (xml('<?xml version="1.0" encoding="klingon"?>' + GOOD),
                                      {"label-unreadable"} | LOST, "Annotations/a.xml"),
    "a deep nest": (xml("<annotation>" + "<a>" * 5_000 + "</a>" * 5_000 + "</annotation>"), LOST, "'cat'"),
    "a width without end": (xml(GOOD.replace("<width>40<", "<width>1e300<")), set(), ""),
    "a link to nowhere": (replaced("Annotations/a.xml", lambda path: path.symlink_to("gone")),
                          {"label-unreadable"} | LOST, "Annotations/a.xml"),
    "a list that is no text": (lambda root: (root / "ImageSets/Main/train.txt").write_bytes(b"\xff\xfe\0"),
                               UNREADABLE, "train.txt"),
    "a list of paths out of the set": (lambda root: (root / "ImageSets/Main/train.txt").write_text("../../a\n"),
                                       LOST | {"image-missing", "image-record", "no-training-objects"},
                                       "train.txt"),
}  # fmt: skip

SETS = {
    **{f"image: {name}": (coco_set, content, expected, "a.png") for name, (content, expected) in IMAGES.items()},
    **{f"coco: {name}": (coco_set, *case) for name, case in COCO.items()},
    **{f"yolo: {name}": (yolo_set, *case) for name, case in YOLO.items()},
    **{f"voc: {name}": (voc_set, *case) for name, case in VOC.items()},
}
