"""Expected outcome of a dataset fault, in `check` and before training alike."""

import json

import pytest
from PIL import Image

from deformable_detr.config.image_size import ShortestEdge
from deformable_detr.config.schema import DataConfig
from deformable_detr.data.dataset import ensure_distinct_splits, open_dataset
from deformable_detr.data.validate import ISSUE_TYPES, check_dataset, check_for_training
from deformable_detr.utils.errors import UserError
from tests.support.commands import run_command
from tests.support.datasets import SIZE, write_coco_dataset, write_image

RULE = ShortestEdge(64, 107)
TRAIN = "train/_annotations.coco.json"
VAL = "valid/_annotations.coco.json"
ALWAYS_REPORTED = {"class-rare", "image-empty", "pixel-origin"}  # every small test dataset has these


def check_report(root, depth="full", **data):
    return check_dataset(root, DataConfig(**data), RULE, depth=depth)


def issue_codes(root, **data):
    return {issue.code for issue in check_report(root, **data).issues} - ALWAYS_REPORTED


def load_for_training(root, check="full", **data):
    """Check and load the data as training does."""
    config = DataConfig(check=check, **data)
    lines = check_for_training(root, config, RULE)
    train = open_dataset(root, config.train_split, config)
    val = open_dataset(root, config.val_split, config, categories=train.categories)
    ensure_distinct_splits(train, val, root)
    for split in (train, val):
        assert len(list(split)) == len(split)
        assert split.ground_truth
    return lines


def assert_issues(root, expected, name="", **data):
    """Assert exactly these issue codes; if one is an error, training must fail in one line that contains `name`.

    Returns that line, or the warnings.
    """
    report = check_report(root, **data)
    found_codes = {issue.code for issue in report.issues} - ALWAYS_REPORTED
    assert found_codes == set(expected), f"{sorted(found_codes)} instead of {sorted(expected)}"
    for issue in report.issues:
        assert "\n" not in issue.line
        assert len(issue.line) < 1000
    errors = [code for code in expected if ISSUE_TYPES[code].severity == "error"]
    if not errors:
        lines = load_for_training(root, **data)
        text = " ".join(lines)
        assert all(code in text for code in expected if ISSUE_TYPES[code].severity == "warning"), text
        return text
    with pytest.raises(UserError) as caught:
        load_for_training(root, **data)
    message = str(caught.value)
    assert name in message, message
    assert "\n" not in message
    return message


def run_check(capsys, *arguments):
    return run_command(capsys, "check", *arguments)


def snapshot(root):
    """Return the content and modification time of every file."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(root.rglob("*")) if path.is_file()}


def write_faulty_dataset(root):
    """Write a dataset with most of the faults that --fix repairs."""
    write_coco_dataset(root)
    path = root / TRAIN
    content = json.loads(path.read_text())
    images, annotations = content["images"], content["annotations"]
    for number, name in enumerate(["gone", "broken", "turned", "large", "leaked", "good"], start=11):
        images.append({"id": number, "file_name": f"{name}.png", "width": SIZE[0], "height": SIZE[1]})
        annotations.append({"id": number, "image_id": number, "category_id": 1, "bbox": [4, 2, 16, 10]})
        write_image(root / "train" / f"{name}.png")
    (root / "train/gone.png").unlink()
    (root / "train/broken.png").write_bytes(b"no image")
    exif = Image.Exif()
    exif[0x0112] = 6
    write_image(root / "train/turned.png", exif=exif)
    write_image(root / "train/large.png", (80, 40))
    (root / "train/leaked.png").write_bytes((root / "valid/c.png").read_bytes())
    base = {"image_id": 16, "category_id": 1}
    annotations += [
        {**base, "id": 50, "bbox": [4, 2, 16, 10]},  # duplicate
        {**base, "id": 51, "bbox": [1, 1, 0, 5]},  # no width
        {**base, "id": 52, "bbox": [50, 1, 5, 5]},  # outside
        {
            **base,
            "id": 53,
            "bbox": [20, 10, 30, 30],
            "segmentation": [[20, 10, 30, 10, 30, 20]],
        },  # crosses the image border
        {**base, "id": 53, "bbox": [8, 8, 8, 8]},  # duplicate id
        {**base, "id": 54, "bbox": [8, 8, "x", 8]},
        {**base, "id": 55, "category_id": 77, "bbox": [8, 8, 9, 8]},
        {**base, "id": 56, "image_id": 77, "bbox": [8, 8, 9, 8]},
        {**base, "id": 57, "bbox": [0, 0, 0, 0], "iscrowd": 1},
    ]
    content["info"] = {"year": 2024}
    path.write_text(json.dumps(content))
    return root
