"""Scenes with masks of every form that COCO files have, and detections near them."""

import numpy as np


def compressed(mask):
    """Return a mask (H, W) as compressed RLE with text counts."""
    from pycocotools import mask as coco_mask

    rle = coco_mask.encode(np.asfortranarray(np.asarray(mask, dtype=np.uint8)))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def uncompressed(mask):
    """Return a mask (H, W) as RLE with a list of counts."""
    values = np.asarray(mask, dtype=np.uint8).flatten(order="F")
    edges = np.flatnonzero(np.diff(values, prepend=0)) if len(values) else []
    return {"size": list(np.shape(mask)), "counts": np.diff([0, *edges, len(values)]).tolist()}


def decoded(segmentation, size):
    """Return polygons or an RLE as a mask (H, W), rasterized by pycocotools."""
    from pycocotools import mask as coco_mask

    if isinstance(segmentation, dict) and isinstance(segmentation["counts"], str):
        rle = {**segmentation, "counts": segmentation["counts"].encode()}
    else:
        rle = coco_mask.frPyObjects(segmentation, *size)
    return coco_mask.decode(coco_mask.merge(rle) if isinstance(rle, list) else rle).astype(bool)


def ellipse(rng, size):
    y, x = np.mgrid[: size[0], : size[1]]
    center, radii = rng.uniform(0, size), rng.uniform(1, np.array(size) / 3)
    inside = ((y - center[0]) / radii[0]) ** 2 + ((x - center[1]) / radii[1]) ** 2 <= 1
    hole = ((y - center[0]) / radii[0]) ** 2 + ((x - center[1]) / radii[1]) ** 2 <= 0.2
    return inside & ~hole if rng.random() < 0.3 else inside


def polygons(rng, size):
    """Return one to three polygons, which may overlap and reach out of the image."""
    parts = []
    for _ in range(int(rng.integers(1, 4))):
        count = int(rng.integers(3, 9))
        angles, radii = np.sort(rng.uniform(0, 2 * np.pi, count)), rng.uniform(0.5, 30, count)
        points = rng.uniform(0, size[::-1]) + np.stack([np.cos(angles), np.sin(angles)], axis=1) * radii[:, None]
        parts.append(points.round(2).flatten().tolist())
    return parts


def masked_scene(seed, objects=24, spurious=120):
    """Return ground truth and results: crowds, holes, several parts, both RLEs, empty masks, equal scores.

    Image 4 has no detections, and one class more than 100 of them in an image. Image 5 has neither.
    """
    from pycocotools import mask as coco_mask

    rng = np.random.default_rng(seed)
    size = (50 + 7 * (seed % 3), 64)
    images = [{"id": number, "height": size[0], "width": size[1]} for number in range(1, 6)]
    annotations, results = [], []
    for number in range(1, objects + 1):
        shape = [compressed, uncompressed, None, None][int(rng.integers(4))]
        segmentation = polygons(rng, size) if shape is None else shape(ellipse(rng, size))
        if rng.random() < 0.05:
            segmentation = compressed(np.zeros(size))
        mask = decoded(segmentation, size)
        box = coco_mask.toBbox(coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))).tolist()
        annotations.append({
            "id": number, "image_id": int(rng.integers(1, 5)), "category_id": int(rng.integers(1, 3)), "bbox": box,
            "segmentation": segmentation, "area": float(mask.sum()), "iscrowd": int(rng.random() < 0.2),
        })  # fmt: skip
        for _ in range(int(rng.integers(0, 4))):
            found = np.roll(mask, int(rng.integers(-3, 4)), axis=1) & (rng.random() > 0.1)
            category = annotations[-1]["category_id"] if rng.random() < 0.9 else 1
            results.append(_result(annotations[-1]["image_id"], category, box, found, round(float(rng.random()), 1)))
    for number in range(spurious):
        image, category = (1, 1) if number < 105 else (int(rng.integers(1, 4)), int(rng.integers(1, 3)))
        box = rng.uniform(1, 40, 4).tolist()
        results.append(_result(image, category, box, ellipse(rng, size), round(float(rng.random()), 1)))
    results = [result for result in results if result["image_id"] != 4]
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    return {"images": images, "categories": categories, "annotations": annotations}, results


def _result(image, category, box, mask, score):
    return {
        "image_id": image, "category_id": category, "bbox": box, "segmentation": compressed(mask), "score": score,
    }  # fmt: skip
