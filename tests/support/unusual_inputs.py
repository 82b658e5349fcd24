"""Unusual datasets: encodings, types, links, path spellings and rare image formats, with their issues."""

import gzip
import os
import shutil
import unicodedata
import zlib

import numpy as np
from PIL import Image, features

from tests.support.annotation_files import (
    BAD,
    LOST,
    RECORD,
    ROW,
    TRAIN,
    XML,
    append,
    edit,
    patch,
    row,
    xml,
)
from tests.support.datasets import write_coco_dataset, write_image, write_voc_dataset, write_yolo_dataset
from tests.support.image_files import BROKEN, IMAGE, JPEG, PNG, chunk, encode, rgb_png_16bit

# --- images


def real_numbers(value):
    return encode("TIFF", Image.fromarray(np.full((20, 40), value, np.float32)))


IMAGES = {
    "PostScript": (encode("EPS"), BROKEN),
    "HEIC": (b"\0\0\0\x18ftypheic\0\0\0\0heicmif1" + bytes(500), BROKEN),
    "MP4 video": (b"\0\0\0\x20ftypisom" + bytes(300), BROKEN),
    "gzipped PNG": (gzip.compress(PNG), BROKEN),
    "PNG with converted line ends": (PNG.replace(b"\n", b"\r\n"), BROKEN),
    "PNG with a zTXt bomb": (PNG[:33] + chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(5_000_000))) + PNG[33:], set()),
    "JPEG: last byte missing": (JPEG[:-1], BROKEN),
    "PPM: absurd size": (b"P6 99999999 99999999 255\n", BROKEN),
    "animated PNG": (encode("PNG", save_all=True, append_images=[IMAGE.rotate(90)]), set()),
    "animated WebP": (encode("WEBP", save_all=True, append_images=[IMAGE.rotate(90)]), set()),
    "MPO": (encode("MPO", save_all=True, append_images=[IMAGE]), set()),
    "JPEG with a malformed color profile": (encode("JPEG", icc_profile=b"junk" * 100), set()),
    "CMYK JPEG": (encode("JPEG", IMAGE.convert("CMYK")), set()),
    "16 bits per channel": (rgb_png_16bit(65535), set()),
    "all NaN": (real_numbers(np.nan), set()),
    "all infinite": (real_numbers(np.inf), set()),
    "TGA": (encode("TGA"), set()),
    "one row of pixels": (encode("PNG", Image.new("RGB", (5000, 1))), {"image-size", "box-outside"}),
    "one column of pixels": (encode("PNG", Image.new("RGB", (1, 5000))), {"image-size", "box-outside"}),
}  # fmt: skip
if features.check("avif"):
    IMAGES["AVIF"] = (encode("AVIF"), set())
if features.check("jpg_2000"):
    IMAGES["JPEG 2000"] = (encode("JPEG2000"), set())

# --- COCO JSON


def written(change):
    """The annotation file's text, changed to bytes."""
    return lambda root: (root / TRAIN).write_bytes(change((root / TRAIN).read_text()))


def renamed(real, named):
    """An image called `real` on the disk and `named` in its record."""

    def apply(root):
        (root / "train/a.png").rename(root / "train" / real)
        patch("images", 0, file_name=named)(root)

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
    "trailing comma": (written(lambda text: text[:-1].encode() + b",}"), UNREADABLE, "not valid JSON"),
    "two documents": (written(lambda text: (text + text).encode()), UNREADABLE, "Extra data"),
    "number": (written(lambda text: b"5"), UNREADABLE, "no list 'images'"),
    "duplicate key": (written(lambda text: text.replace('"images":', '"images": 5, "images":').encode()),
                                  set(), ""),
    "infinity in info": (edit()(lambda c: c.update(info={"x": float("inf")})), set(), ""),
    "5000-digit number": (written(lambda text: text.replace('"id": 3,', f'"id": {"9" * 5000},').encode()),
                                UNREADABLE, "not valid JSON"),
    "folder": (replaced(TRAIN, os.mkdir), UNREADABLE, "directory"),
    "symbolic link loop": (replaced(TRAIN, loop), UNREADABLE, "symbolic links"),
    "annotations null": (edit()(lambda c: c.update(annotations=None)), UNREADABLE, "'annotations'"),
    "image id NaN": (patch("images", 2, id=float("nan")), IMAGE_RECORD, "images[2]"),
    "image id 3.0": (patch("images", 2, id=3.0), set(), ""),
    "image id 3.5": (patch("images", 2, id=3.5), IMAGE_RECORD, "images[2]"),
    "image id true": (patch("images", 2, id=True), IMAGE_RECORD, "images[2]"),
    "image id of 70 bits": (patch("images", 2, id=2**70), IMAGE_RECORD, "images[2]"),
    "file name a list": (patch("images", 2, file_name=["empty.png"]), IMAGE_RECORD, "images[2] (id 3)"),
    "negative recorded size": (patch("images", 0, width=-40, height=-20), set(), ""),
    "recorded size a string": (patch("images", 0, width="40"), set(), ""),
    "category id a list": (patch("annotations", 0, category_id=[1]), {"category-unknown", "class-only-in-val"}, RECORD),
    "category id true": (patch("annotations", 0, category_id=True), {"category-unknown", "class-only-in-val"}, RECORD),
    "image id of an annotation a list": (patch("annotations", 0, image_id=[1]), {"image-unknown", "class-only-in-val"},
                                     RECORD),
    "box an object": (patch("annotations", 0, bbox={"x": 1, "y": 2, "w": 3, "h": 4}), ONE, RECORD),
    "nested box": (patch("annotations", 0, bbox=[[1, 2, 3, 4]]), ONE, RECORD),
    "true in box": (patch("annotations", 0, bbox=[True, 2, 3, 4]), ONE, RECORD),
    "polygon without box": (patch("annotations", 0, bbox=None, segmentation=[[1, 1, 9, 1, 9, 9]]),
                            {"box-from-mask"}, "1 object with a mask but no bbox"),
    "RLE without box": (
        patch("annotations", 0, bbox=None, segmentation={"size": [20, 40], "counts": [82, *[10, 10] * 16, 398]}),
        {"box-from-mask"}, "1 object with a mask but no bbox",
    ),
    "compressed RLE without box": (
        patch("annotations", 0, bbox=None,
            segmentation={"size": [20, 40], "counts": "b2::00000000000000000000000000000^<"}),
        {"box-from-mask"}, "1 object with a mask but no bbox",
    ),
    "malformed RLE without box": (
        patch("annotations", 0, bbox=None, segmentation={"size": [20, 40], "counts": "?!"}), ONE, RECORD,
    ),
    "two-point polygon without box": (patch("annotations", 0, bbox=None, segmentation=[[1, 1, 9, 9]]), ONE, RECORD),
    "polygon of strings without box": (patch("annotations", 0, bbox=None, segmentation=[["a"] * 6]), ONE, RECORD),
    "RLE without size and box": (patch("annotations", 0, bbox=None, segmentation={"counts": [0, 800]}), ONE, RECORD),
    "iscrowd a list": (patch("annotations", 0, iscrowd=[]), ONE, RECORD),
    "iscrowd missing": (patch("annotations", 0, iscrowd=None), set(), ""),
    "area NaN": (patch("annotations", 0, area=float("nan")), set(), ""),
    "huge area": (patch("annotations", 0, area=10**400), set(), ""),
    "empty annotation": (append("annotations", {}), {"image-unknown"}, "annotations[3]"),
    "deeply nested record": (
        written(lambda text: text.replace('"iscrowd": 0', f'"x": {"[" * 900}{"]" * 900}, "iscrowd": 0').encode()),
        set(), "",
    ),
    "category name not a string": (
        patch("categories", 0, name=[5]), {"category-record", "category-unknown", "class-not-in-train"},
        "categories[0]",
    ),
    "category name empty": (patch("categories", 0, name=""), {"category-renamed"}, ""),
    "line break in category name": (patch("categories", 0, name="ca\nt"), {"category-renamed"}, ""),
    "very long category name": (patch("categories", 0, name="x" * 100_000), {"category-renamed"}, ""),
    "very long file name": (patch("images", 0, file_name="x" * 5000), UNNAMED, "images[0]"),
    "lone surrogate in file name": (patch("images", 0, file_name="\ud800.png"), UNNAMED, "images[0]"),
    "file name a folder": (patch("images", 0, file_name="/"), UNNAMED, "images[0]"),
    "file name a URL": (patch("images", 0, file_name="https://x.org/a.png"), {"image-name"},
                         "https://x.org/a.png"),
    "backslashes in file name": (patch("images", 0, file_name="train\\a.png"), {"image-name"},
                                         "'a.png' is read instead"),
    "backslashes in file name, other case": (patch("images", 0, file_name="train\\A.png"), {"image-name"},
                                                     "'a.png' is read instead"),
    "URL-encoded file name": (renamed("a 1.png", "a%201.png"), {"image-name"}, "'a 1.png' is read instead"),
    "path of another computer": (patch("images", 0, file_name="/home/me/set/a.png"), {"image-name"},
                                 "'a.png' is read instead"),
    "percent sign in file name": (renamed("a%20.png", "a%20.png"), set(), ""),
    "file name with a wrong folder": (patch("images", 0, file_name="x/b.png"), UNNAMED, "x/b.png"),
    "NFD on disk, NFC in record": (renamed(NFD, NFC), {"image-name"}, "is read instead"),
    "NFC on disk, NFD in record": (renamed(NFC, NFD), {"image-name"}, "is read instead"),
    "file name without extension": (patch("images", 0, file_name="a"), {"image-name"}, "'a.png' is read instead"),
    "ambiguous file name without extension": (
        lambda root: (write_image(root / "train/a.jpg"), patch("images", 0, file_name="a")(root)), UNNAMED, "'a'",
    ),
    "file name through the parent folder": (patch("images", 0, file_name="../train/a.png"), set(), ""),
    "absolute file name": (
        lambda root: patch("images", 0, file_name=str((root / "train/a.png").absolute()))(root), set(), "",
    ),
    "line break in file name": (renamed("a\nb.png", "a\nb.png"), set(), ""),
    "file without extension": (renamed("a", "a"), set(), ""),
    "annotation file as image": (patch("images", 0, file_name="_annotations.coco.json"),
                                     {"image-unreadable", "images-unlisted"}, "_annotations.coco.json"),
    "image is a symbolic link loop": (replaced("train/a.png", loop), {"image-unreadable"}, "train/a.png"),
    "folder is a symbolic link loop": (lambda root: (root / "train/loop").symlink_to(root / "train"), set(), ""),
    "file instead of a folder": (lambda root: (shutil.rmtree(root / "train"), (root / "train").write_text("")),
                              {"split-missing"}, "'train'"),
}  # fmt: skip

# --- YOLO and Pascal VOC

SPLITS = "train: images/train\nval: images/val\n"
LABELS = "labels/train/a.txt"


def head(text):
    return lambda root: (root / "data.yaml").write_text(text)


MISSING = {"split-missing"}
YOLO = {
    "class 1.0": (row("0 0.3 0.4 0.4 0.5\n1.0 0.75 0.6 0.5 0.75\n"), set(), ""),
    "class 0.5": (row("1 0.75 0.6 0.5 0.75\n0.5 0.3 0.4 0.4 0.5\n"), {"label-row", "class-only-in-val"}, ROW),
    "trailing confidence": (row("1 0.75 0.6 0.5 0.75\n0 0.3 0.4 0.4 0.5 0.9\n"), {"label-confidence"}, "line 2"),
    "comma-separated": (row("1 0.75 0.6 0.5 0.75\n0,0.3,0.4,0.4,0.5\n"), set(), ""),
    "CRLF": (row("0 0.3 0.4 0.4 0.5\r\n1 0.75 0.6 0.5 0.75\r\n"), set(), ""),
    "labels in UTF-16": (replaced(LABELS, lambda path: path.write_text("0 0.3 0.4 0.4 0.5\n", "utf-16")),
                         set(), ""),
    "labels a folder": (replaced(LABELS, os.mkdir), {"label-unreadable", "class-only-in-val"}, LABELS),
    "labels a broken link": (replaced(LABELS, lambda path: path.symlink_to("gone")),
                                 {"label-unreadable", "class-only-in-val"}, LABELS),
    "empty label file": (replaced(LABELS, lambda path: path.write_text("")), {"class-only-in-val"}, ""),
    "names as a dict": (head(SPLITS + "names: {0: cat, 1: dog}"), set(), ""),
    "names with a gap": (head(SPLITS + "names: {0: cat, 2: dog}"), MISSING, "'names'"),
    "names a string": (head(SPLITS + "names: cat"), MISSING, "'names'"),
    "more classes than names": (head(SPLITS + "nc: 3\nnames: [cat, dog]"), MISSING, "nc is 3"),
    "empty data.yaml": (head(""), MISSING, "data.yaml"),
    "code in data.yaml": (head(SPLITS + "names: !!python/object/apply:os.system ['true']"), MISSING,
                               "not valid YAML"),
    "recursive list": (head(SPLITS + "names: &a [*a]"), MISSING, "alias"),
    "deeply nested brackets": (head("names: " + "[" * 300), MISSING, "not valid YAML"),
    "split a number": (head("train: 5\nval: images/val\nnames: [cat, dog]"), MISSING, "'train'"),
    "split a URL": (head("train: https://x/y\nval: images/val\nnames: [cat, dog]"), MISSING, "'train'"),
    "very long split path": (head(f"train: {'x' * 6000}\nval: images/val\nnames: [cat, dog]"), MISSING,
                                      "'train'"),
    "list with a very long path": (
        lambda root: ((root / "list.txt").write_text("x" * 6000),
                      head("train: list.txt\nval: images/val\nnames: [cat, dog]")(root)),
        {"image-missing", "image-record", "no-training-objects", "class-only-in-val"}, "list.txt",
    ),
    "folder named like an image": (lambda root: (root / "images/train/d.jpg").mkdir(), set(), ""),
}  # fmt: skip
VOC = {
    "fractional coordinates": (xml(XML.replace("<xmin>5<", "<xmin>5.5<")), set(), ""),
    "NaN": (xml(XML.replace("<xmin>5<", "<xmin>nan<")), {"label-row"} | LOST, "object[0] ('cat')"),
    "HTML page": (xml("<html><body/></html>"), {"label-unreadable"} | LOST, "<html>"),
    "empty file": (xml(""), {"label-unreadable"} | LOST, "Annotations/a.xml"),
    "unknown encoding": (xml('<?xml version="1.0" encoding="klingon"?>' + XML),
                                      {"label-unreadable"} | LOST, "Annotations/a.xml"),
    "deeply nested": (xml("<annotation>" + "<a>" * 5_000 + "</a>" * 5_000 + "</annotation>"), LOST, "'cat'"),
    "huge width": (xml(XML.replace("<width>40<", "<width>1e300<")), set(), ""),
    "broken link": (replaced("Annotations/a.xml", lambda path: path.symlink_to("gone")),
                          {"label-unreadable"} | LOST, "Annotations/a.xml"),
    "binary list": (lambda root: (root / "ImageSets/Main/train.txt").write_bytes(b"\xff\xfe\0"),
                               UNREADABLE, "train.txt"),
    "list with paths outside the dataset": (lambda root: (root / "ImageSets/Main/train.txt").write_text("../../a\n"),
                                       {"image-name"}, "is read instead"),
}  # fmt: skip

DATASETS = {
    **{
        f"image: {name}": (write_coco_dataset, content, expected, "a.png")
        for name, (content, expected) in IMAGES.items()
    },
    **{f"coco: {name}": (write_coco_dataset, *case) for name, case in COCO.items()},
    **{f"yolo: {name}": (write_yolo_dataset, *case) for name, case in YOLO.items()},
    **{f"voc: {name}": (write_voc_dataset, *case) for name, case in VOC.items()},
}
