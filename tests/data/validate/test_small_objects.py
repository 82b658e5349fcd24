"""The suggestion of tiles for small objects."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from deformable_detr.config.image_size import FixedSize, ShortestEdge
from deformable_detr.config.schema import DataConfig
from deformable_detr.data.validate import check_dataset, check_for_training

RULE = ShortestEdge(480, 800)


def write_scene(root, size, sides):
    """Write one image of `size` (height, width) per split, with square objects of these sides."""
    for split in ("train", "valid"):
        (root / split).mkdir(parents=True)
        Image.fromarray(np.full(size, len(split), dtype=np.uint8)).save(root / split / f"{split}.png")
        boxes = [[20 * n, 30, side, side] for n, side in enumerate(sides)]
        content = {
            "images": [{"id": 1, "file_name": f"{split}.png", "height": size[0], "width": size[1]}],
            "categories": [{"id": 1, "name": "cell"}],
            "annotations": [{"id": n, "image_id": 1, "category_id": 1, "bbox": box} for n, box in enumerate(boxes)],
        }
        (root / split / "_annotations.coco.json").write_text(json.dumps(content))
    return root


def suggestion(root, rule=RULE, **data):
    """Return the issue of small objects, None if there is none."""
    found = [issue for issue in check_dataset(root, DataConfig(**data), rule).issues if issue.code == "small-objects"]
    assert len(found) <= 1
    assert all(issue.split == "train" for issue in found)
    return found[0] if found else None


# side of the objects in pixels → tile, at an input of 480 pixels
@pytest.mark.parametrize(("side", "tile"), [(20, 480), (31, 480), (10, 288), (40, 576), (3, 64)])
def test_suggested_tile_shows_the_median_object_well(tmp_path, side, tile):
    issue = suggestion(write_scene(tmp_path, (1500, 2000), [2, side, side, 400]))
    assert issue.hint == f"train, evaluate and predict with --tile {tile}"
    assert f"has objects of {side * 480 / 1500:.1f} pixels at image size 480" in issue.message
    assert 16 <= side * 480 / tile <= 34, "16 to 32 pixels, but for the rounding of the tile"
    assert suggestion(tmp_path, tile=tile) is None, "objects are measured in the tiles"
    assert "with --tile" in suggestion(tmp_path, tile=1400).hint


def test_no_suggestion_without_need(tmp_path):
    assert suggestion(write_scene(tmp_path / "large", (1500, 2000), [60, 60, 60])) is None
    assert suggestion(write_scene(tmp_path / "mixed", (1500, 2000), [5, 60, 60])) is None
    assert suggestion(write_scene(tmp_path / "none", (1500, 2000), [])) is None


def test_images_hardly_larger_than_a_tile_need_a_larger_input(tmp_path):
    issue = suggestion(write_scene(tmp_path, (400, 500), [12, 12]))
    size = int(re.fullmatch(r"train with --image-size (\d+)", issue.hint)[1])
    assert size == 544
    assert suggestion(tmp_path, ShortestEdge(size, 2 * size)) is None


def test_fixed_sizes_and_training(tmp_path):
    root = write_scene(tmp_path, (1000, 4000), [20, 20])
    assert suggestion(root, FixedSize(640, 640)).hint.endswith("--tile 640")
    assert f"{20 * (640 / 1000 * 640 / 4000) ** 0.5:.1f} pixels" in suggestion(root, FixedSize(640, 640)).message
    lines = check_for_training(root, DataConfig(), RULE)
    assert any(line.startswith("warning small-objects: ") and line.endswith("--tile 480") for line in lines)
    assert not any("small-objects" in line for line in check_for_training(root, DataConfig(tile=480), RULE))


def test_queries_are_compared_with_the_objects_of_a_tile(tmp_path):
    root = write_scene(tmp_path, (1500, 2000), [19] * 60)  # every 20 pixels, 24 in a tile

    def crowded(queries, **data):
        report = check_dataset(root, DataConfig(**data), RULE, num_queries=queries)
        return [issue.message for issue in report.issues if issue.code == "too-many-objects"]

    assert len(crowded(50)) == 2, "training and validation"
    assert crowded(50, tile=480) == []
    assert "more objects than the model's 20 queries, at most 24 ('train.png' in a tile)" in crowded(20, tile=480)[0]
