"""Small datasets in every supported format."""

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


def write_image(path, size=SIZE, seed=None, **options):
    """Write an image of noise that depends on its name, so that no two are equal."""
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(
        sum(path.name.encode()) * 31 + sum(path.parent.name.encode()) if seed is None else seed
    )
    Image.fromarray(random.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(path, **options)
    return path


def write_coco_dataset(root, objects=None, folders=("train", "valid"), names=NAMES, first=1):
    """Write COCO JSON in Roboflow's folder layout."""
    for (_, images), folder in zip((objects or OBJECTS).items(), folders, strict=False):
        content = {"images": [], "annotations": [], "categories": []}
        content["categories"] = [{"id": number, "name": name} for number, name in enumerate(names, first)]
        for number, (stem, boxes) in enumerate(images.items(), start=1):
            write_image(root / folder / f"{stem}.png")
            content["images"].append({"id": number, "file_name": f"{stem}.png", "width": SIZE[0], "height": SIZE[1]})
            for label, (x, y, w, h) in boxes:
                content["annotations"].append({
                    "id": len(content["annotations"]) + 1, "image_id": number, "category_id": label + first,
                    "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0,
                })  # fmt: skip
        (root / folder / "_annotations.coco.json").write_text(json.dumps(content))
    return root


def write_yolo_dataset(root, layout="{kind}/{split}", yaml_text=None, names=NAMES):
    """Write a YOLO dataset; {kind} in the layout is images or labels, {split} is train or val."""
    for split, images in OBJECTS.items():
        for stem, boxes in images.items():
            write_image(root / layout.format(kind="images", split=split) / f"{stem}.png")
            labels = root / layout.format(kind="labels", split=split) / f"{stem}.txt"
            labels.parent.mkdir(parents=True, exist_ok=True)
            if boxes:
                labels.write_text("".join(yolo_row(label, box) for label, box in boxes))
    split_lines = "".join(f"{split}: {layout.format(kind='images', split=split)}\n" for split in OBJECTS)
    (root / "data.yaml").write_text(
        yaml_text if yaml_text is not None else split_lines + f"names: {json.dumps(list(names))}\n"
    )
    return root


def yolo_row(label, box):
    x, y, w, h = box
    width, height = SIZE
    return f"{label} {(x + w / 2) / width} {(y + h / 2) / height} {w / width} {h / height}\n"


def write_voc_dataset(root, flat=False, shift=1):
    """Write Pascal VOC in the published folder layout, or with all files of a split in one folder."""
    for split, images in OBJECTS.items():
        folder = root / {"train": "train", "val": "valid"}[split]
        image_folder, annotation_folder = (folder, folder) if flat else (root / "JPEGImages", root / "Annotations")
        for stem, boxes in images.items():
            write_image(image_folder / f"{stem}.jpg")
            annotation_folder.mkdir(parents=True, exist_ok=True)
            (annotation_folder / f"{stem}.xml").write_text(voc_xml(f"{stem}.jpg", boxes, 0 if flat else shift))
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


def read_objects(root, split, **options):
    """Return stem → [(class name, xywh in pixels)] of each image, as the model receives them."""
    dataset = open_dataset(root, split, **options)
    result = {}
    for number in range(len(dataset)):
        image, target = dataset[number]
        height, width = image.shape[-2:]
        cx, cy, w, h = (target.boxes * torch.tensor([width, height] * 2)).unbind(-1)
        boxes = torch.stack([cx - w / 2, cy - h / 2, w, h], -1)
        names = [dataset.categories[label].name for label in target.labels.tolist()]
        result[dataset.path(number).stem] = [
            (name, [round(v, 3) for v in box]) for name, box in zip(names, boxes.tolist(), strict=True)
        ]
    return result


def expected_objects(split):
    names = ("cat", "dog")
    return {
        stem: [(names[label], list(map(float, box))) for label, box in boxes] for stem, boxes in OBJECTS[split].items()
    }
