"""Small data sets in the formats people have, for tests."""

import json

import numpy as np
import torch
from PIL import Image

from deformable_detr.data.dataset import open_dataset

NAMES = ("cat", "dog")
SIZE = (40, 20)  # width, height
# image → (class, xywh in pixels) of its objects
OBJECTS = {
    "train": {"a": [(0, (4, 2, 16, 10)), (1, (20, 5, 20, 15))], "b": [(1, (10, 5, 20, 10))], "empty": []},
    "val": {"c": [(0, (0, 0, 40, 20)), (1, (8, 4, 12, 12))]},
}


def picture(path, size=SIZE, seed=None, **options):
    """An image file with noise of its own, so that no two are equal."""
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(
        sum(path.name.encode()) * 31 + sum(path.parent.name.encode()) if seed is None else seed
    )
    Image.fromarray(random.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(path, **options)
    return path


def coco_set(root, objects=None, folders=("train", "valid"), names=NAMES, first=1):
    """Roboflow's layout of COCO JSON."""
    for (_, images), folder in zip((objects or OBJECTS).items(), folders, strict=False):
        content = {"images": [], "annotations": [], "categories": []}
        content["categories"] = [{"id": number, "name": name} for number, name in enumerate(names, first)]
        for number, (stem, boxes) in enumerate(images.items(), start=1):
            picture(root / folder / f"{stem}.png")
            content["images"].append({"id": number, "file_name": f"{stem}.png", "width": SIZE[0], "height": SIZE[1]})
            for label, (x, y, w, h) in boxes:
                content["annotations"].append({
                    "id": len(content["annotations"]) + 1, "image_id": number, "category_id": label + first,
                    "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0,
                })  # fmt: skip
        (root / folder / "_annotations.coco.json").write_text(json.dumps(content))
    return root


def yolo_set(root, layout="{kind}/{split}", head=None, names=NAMES):
    """YOLO: {kind} is images or labels, {split} train or val."""
    for split, images in OBJECTS.items():
        for stem, boxes in images.items():
            picture(root / layout.format(kind="images", split=split) / f"{stem}.png")
            labels = root / layout.format(kind="labels", split=split) / f"{stem}.txt"
            labels.parent.mkdir(parents=True, exist_ok=True)
            if boxes:
                labels.write_text("".join(yolo_row(label, box) for label, box in boxes))
    places = "".join(f"{split}: {layout.format(kind='images', split=split)}\n" for split in OBJECTS)
    (root / "data.yaml").write_text(head if head is not None else places + f"names: {json.dumps(list(names))}\n")
    return root


def yolo_row(label, box):
    x, y, w, h = box
    width, height = SIZE
    return f"{label} {(x + w / 2) / width} {(y + h / 2) / height} {w / width} {h / height}\n"


def voc_set(root, flat=False, shift=1):
    """Pascal VOC in the published layout, or with all of a split in one folder."""
    for split, images in OBJECTS.items():
        folder = root / {"train": "train", "val": "valid"}[split]
        pictures, notes = (folder, folder) if flat else (root / "JPEGImages", root / "Annotations")
        for stem, boxes in images.items():
            picture(pictures / f"{stem}.jpg")
            notes.mkdir(parents=True, exist_ok=True)
            (notes / f"{stem}.xml").write_text(voc_xml(f"{stem}.jpg", boxes, 0 if flat else shift))
        if not flat:
            lists = root / "ImageSets" / "Main"
            lists.mkdir(parents=True, exist_ok=True)
            (lists / f"{split}.txt").write_text("".join(f"{stem}\n" for stem in images))
    return root


def voc_xml(name, boxes, shift=0):
    objects = "".join(
        f"<object><name>{NAMES[label]}</name><difficult>0</difficult><bndbox><xmin>{x + shift}</xmin>"
        f"<ymin>{y + shift}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>"
        for label, (x, y, w, h) in boxes
    )
    size = f"<size><width>{SIZE[0]}</width><height>{SIZE[1]}</height><depth>3</depth></size>"
    return f"<annotation><filename>{name}</filename>{size}{objects}</annotation>"


def contents(root, split, **given):
    """Stem → rounded (class name, xywh in pixels) of each image, as the model would see them."""
    found = open_dataset(root, split, **given)
    result = {}
    for number in range(len(found)):
        image, target = found[number]
        height, width = image.shape[-2:]
        cx, cy, w, h = (target.boxes * torch.tensor([width, height] * 2)).unbind(-1)
        boxes = torch.stack([cx - w / 2, cy - h / 2, w, h], -1)
        names = [found.categories[label].name for label in target.labels.tolist()]
        result[found.path(number).stem] = [
            (name, [round(v, 3) for v in box]) for name, box in zip(names, boxes.tolist(), strict=True)
        ]
    return result


def expected(split):
    names = ("cat", "dog")
    return {
        stem: [(names[label], list(map(float, box))) for label, box in boxes] for stem, boxes in OBJECTS[split].items()
    }
