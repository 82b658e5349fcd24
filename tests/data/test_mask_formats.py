"""Masks of the formats of labeling tools: each gives the same pixels as the shape that it describes."""

import base64
import io
import json

import numpy as np
import pycocotools.mask as coco_mask
import pytest
from PIL import Image

from deformable_detr.data.dataset import open_dataset
from tests.support.datasets import write_image

WIDTH, HEIGHT = 160, 120
Y, X = np.mgrid[:HEIGHT, :WIDTH]
POLYGON = [[20.5, 30], [90, 25], [100, 80], [60, 50], [30, 90]]
MASK = (np.abs(X - 60) < 30) & (np.abs(Y - 50) < 20) & ~((np.abs(X - 55) < 8) & (np.abs(Y - 50) < 8))
ELLIPSE = ((X + 0.5 - 70) / 40) ** 2 + ((Y + 0.5 - 60) / 25) ** 2 <= 1
CIRCLE = np.hypot(X + 0.5 - 70, Y + 0.5 - 60) <= 30
WINDOW = MASK[31:70, 31:90]


def drawn(segmentation):
    rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, HEIGHT, WIDTH)) if isinstance(segmentation, list) else {
        **segmentation
    }  # fmt: skip
    return coco_mask.decode(rle).astype(bool)


POLYGON_PIXELS = drawn([np.array(POLYGON).reshape(-1).tolist()])


def labelme(folder, shapes):
    content = {"shapes": shapes, "imagePath": "a.png", "imageHeight": HEIGHT, "imageWidth": WIDTH}
    (folder / "a.json").write_text(json.dumps(content))


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8) * 255).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


LABELME = [
    ({"shape_type": "polygon", "points": POLYGON}, POLYGON_PIXELS),
    ({"points": POLYGON}, POLYGON_PIXELS),
    ({"shape_type": "circle", "points": [[70, 60], [70, 90]]}, CIRCLE),
    ({"shape_type": "mask", "points": [[31, 31], [89, 69]], "mask": png(WINDOW)}, MASK),
    ({"shape_type": "mask", "points": [[31, 31], [89, 69]], "mask": "nonsense"}, None),
    ({"shape_type": "rectangle", "points": [[31, 31], [89, 69]]}, None),
    ({"shape_type": "line", "points": [[31, 31], [89, 69]]}, None),
]


def runs(pixels):
    flat = np.concatenate([[False], pixels.reshape(-1), [False]])
    bounds = np.flatnonzero(flat[1:] != flat[:-1])
    ends = np.append(bounds, pixels.size) if bounds[-1] != pixels.size else bounds
    return ", ".join(map(str, np.diff(np.concatenate([[0], ends]))))


POINTS = ";".join(f"{x},{y}" for x, y in POLYGON)
CVAT = [
    (f'<polygon label="a" points="{POINTS}"/>', POLYGON_PIXELS),
    ('<ellipse label="a" cx="70" cy="60" rx="40" ry="25"/>', ELLIPSE),
    ('<ellipse label="a" cx="70" cy="60" rx="25" ry="40" rotation="90"/>', ELLIPSE),
    (f'<mask label="a" left="31" top="31" width="59" height="39" rle="{runs(WINDOW)}"/>', MASK),
    ('<mask label="a" left="31" top="31" width="59" height="39" rle="1, 2"/>', None),
    ('<box label="a" xtl="31" ytl="31" xbr="90" ybr="70" rotation="30"/>', None),
    (f'<polyline label="a" points="{POINTS}"/>', None),
]


def cvat(folder, shapes):
    image = f'<image id="0" name="a.png" width="{WIDTH}" height="{HEIGHT}">{"".join(shapes)}</image>'
    (folder / "annotations.xml").write_text(f"<annotations><version>1.1</version>{image}</annotations>")


def yolo(folder, rows):
    (folder / "classes.txt").write_text("a\n")
    (folder / "a.txt").write_text("\n".join(rows))


YOLO = [
    ("0 " + " ".join(f"{x / WIDTH} {y / HEIGHT}" for x, y in POLYGON), POLYGON_PIXELS),
    ("0 0.5 0.5 0.25 0.5", None),
]


@pytest.mark.parametrize(
    ("write", "cases"), [(labelme, LABELME), (cvat, CVAT), (yolo, YOLO)], ids=["labelme", "cvat", "yolo"]
)
def test_masks_of_a_format(tmp_path, write, cases):
    write_image(tmp_path / "a.png", (WIDTH, HEIGHT))
    write(tmp_path, [shape | {"label": "a"} if isinstance(shape, dict) else shape for shape, _ in cases])
    dataset, boxes_only = open_dataset(tmp_path, masks=True), open_dataset(tmp_path)
    records = dataset.ground_truth["annotations"]
    assert len(records) == len(cases)
    for record, (shape, pixels) in zip(records, cases, strict=True):
        if pixels is None:
            assert "segmentation" not in record, shape
            continue
        found = drawn(record["segmentation"])
        assert (found & pixels).sum() / (found | pixels).sum() > 0.98, shape
    assert dataset[0][1].has_mask.tolist() == [pixels is not None for _, pixels in cases]
    plain = boxes_only.ground_truth["annotations"]
    without = [{key: value for key, value in record.items() if key != "segmentation"} for record in records]
    assert without == plain, "boxes are the same without masks"
    assert boxes_only[0][1].boxes.tolist() == dataset[0][1].boxes.tolist()
