"""One task, written in every format that is read: classes, boxes with fractions, and an image without objects."""

import csv
import json
from xml.sax.saxutils import quoteattr

from tests.support.datasets import write_image

SIZE = (160, 120)  # width, height
CLASSES = ("disc", "square")
# split → image → (class, x0, y0, x1, y1)
TASK = {
    "train": {
        "p0": [("square", 53.5, 5.25, 89.5, 33.25), ("disc", 0.0, 38.25, 40.0, 78.25)],
        "p1": [("disc", 16.0, 32.0, 160.0, 56.5)],
        "p2": [],
    },
    "val": {"q0": [("square", 44.0, 90.0, 72.0, 118.0), ("disc", 64.25, 14.0, 111.0, 61.0)]},
}
OBJECTS = sum(len(boxes) for images in TASK.values() for boxes in images.values())
FOLDERS = {"train": "train", "val": "valid"}


def expected(split):
    """Return image → sorted (class, xywh)."""
    return {
        name: sorted((label, x0, y0, x1 - x0, y1 - y0) for label, x0, y0, x1, y1 in boxes)
        for name, boxes in TASK[split].items()
    }


def write_task(root, write):
    """Write both splits: `write(folder, images)` writes the annotation files of one."""
    for split, images in TASK.items():
        folder = root / FOLDERS[split]
        for name in images:
            write_image(folder / f"{name}.jpg", SIZE)
        write(folder, images)
    return root


def coco(folder, images):
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "disc"}, {"id": 2, "name": "square"}]}
    for number, (name, boxes) in enumerate(images.items(), start=1):
        content["images"].append({"id": number, "file_name": f"{name}.jpg", "width": 160, "height": 120})
        for label, x0, y0, x1, y1 in boxes:
            record = {"id": len(content["annotations"]), "image_id": number, "bbox": [x0, y0, x1 - x0, y1 - y0]}
            content["annotations"].append(record | {"category_id": CLASSES.index(label) + 1})
    (folder / "_annotations.coco.json").write_text(json.dumps(content))


def yolo(folder, images):
    (folder.parent / "classes.txt").write_text("\n".join(CLASSES))
    for name, boxes in images.items():
        rows = [
            (CLASSES.index(label), (x0 + x1) / 320, (y0 + y1) / 240, (x1 - x0) / 160, (y1 - y0) / 120)
            for label, x0, y0, x1, y1 in boxes
        ]
        (folder / f"{name}.txt").write_text("".join(" ".join(map(str, row)) + "\n" for row in rows))


def voc(folder, images):
    for name, boxes in images.items():
        objects = "".join(
            f"<object><name>{label}</name><bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax>"
            "</bndbox></object>"
            for label, x0, y0, x1, y1 in boxes
        )
        source = "<source><database>Unknown</database></source>"
        text = f"<annotation><filename>{name}.jpg</filename>{source}{objects}</annotation>"
        (folder / f"{name}.xml").write_text(text)


def cvat_xml(images, subset=None):
    """Return the text of a file of CVAT for images 1.1."""
    attribute = f' subset="{subset}"' if subset else ""
    text = "".join(
        f'<image id="{number}" name={quoteattr(name + ".jpg")}{attribute} width="160" height="120">'
        + "".join(
            f'<box label={quoteattr(label)} occluded="0" xtl="{x0}" ytl="{y0}" xbr="{x1}" ybr="{y1}" z_order="0"/>'
            for label, x0, y0, x1, y1 in boxes
        )
        + "</image>"
        for number, (name, boxes) in enumerate(images.items())
    )
    return f"<?xml version='1.0'?><annotations><version>1.1</version>{text}</annotations>"


def cvat(folder, images):
    (folder / "annotations.xml").write_text(cvat_xml(images))


def labelme(folder, images):
    for name, boxes in images.items():
        shapes = [
            {"label": label, "shape_type": "rectangle", "points": [[x1, y0], [x0, y1]]}  # corners in any order
            for label, x0, y0, x1, y1 in boxes
        ]
        content = {"version": "5.4.1", "shapes": shapes, "imagePath": f"..\\x\\{name}.jpg", "imageData": None}
        (folder / f"{name}.json").write_text(json.dumps(content))


def createml(folder, images):
    content = [
        {"image": f"{name}.jpg", "annotations": [
            {"label": label, "coordinates": {
                "x": (x0 + x1) / 2, "y": (y0 + y1) / 2, "width": x1 - x0, "height": y1 - y0,
            }} for label, x0, y0, x1, y1 in boxes
        ]} for name, boxes in images.items()
    ]  # fmt: skip
    (folder / "_annotations.createml.json").write_text(json.dumps(content))


def csv_table(folder, images):
    with open(folder / "_annotations.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["filename", "width", "height", "class", "xmin", "ymin", "xmax", "ymax"])
        table.writerows([f"{name}.jpg", *SIZE, *box] for name, boxes in images.items() for box in boxes or [[""] * 5])


def imagefolder(folder, images):
    records = [
        {"file_name": f"{name}.jpg", "objects": {
            "bbox": [[x0, y0, x1 - x0, y1 - y0] for _, x0, y0, x1, y1 in boxes],
            "categories": [label for label, *_ in boxes],
        }} for name, boxes in images.items()
    ]  # fmt: skip
    (folder / "metadata.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


WRITERS = {writer.__name__: writer for writer in (coco, yolo, voc, cvat, labelme, createml, csv_table, imagefolder)}
