"""`check`, `--fix` and `split` with masks: every fault is named, repaired where possible, and no mask is lost."""

import json

import numpy as np
import pycocotools.mask as coco_mask
import pytest
from PIL import Image

from deformable_detr.config.schema import DataConfig
from deformable_detr.data.dataset import open_dataset
from deformable_detr.data.source import AnnotationCache
from deformable_detr.data.validate import check_dataset
from deformable_detr.data.validate.mask_repair import TURNS, clip_polygon
from deformable_detr.data.validate.masks import measure
from deformable_detr.utils.images import read_image
from tests.support.data_problems import RULE, TRAIN, check_report, run_check
from tests.support.datasets import write_coco_dataset, write_yolo_dataset

SIZE = (40, 20)  # width, height of the images
BOX = [4, 2, 16, 10]  # of annotations[0]
RING = np.zeros((20, 40), np.uint8, order="F")
RING[2:12, 4:20] = 1
RING[5:8, 8:12] = 0
RLE = {"size": [20, 40], "counts": coco_mask.encode(RING)["counts"].decode()}
SQUARE = [4, 2, 20, 2, 20, 12, 4, 12]


def write(root, segmentation, **changes):
    """Write a dataset whose first object has the box `BOX` and a segmentation."""
    write_coco_dataset(root)
    content = json.loads((root / TRAIN).read_text())
    content["annotations"][0] |= {"bbox": BOX, "segmentation": segmentation, **changes}
    (root / TRAIN).write_text(json.dumps(content))
    return root


def mask_issues(root, masks=True):
    report = check_dataset(root, DataConfig(), RULE, cache=AnnotationCache(masks))
    return {issue.code: issue for issue in report.issues if issue.code.startswith("mask-")}


GOOD = {
    "polygon": [SQUARE],
    "parts": [[4, 2, 12, 2, 4, 12], [20, 2, 20, 12, 12, 12]],
    "overlapping parts": [SQUARE, SQUARE],
    "run lengths": RLE,
    "concave": [[4, 2, 20, 2, 20, 12, 12, 4, 4, 12]],
    "a pixel outside": [[4, -1.5, 20, 2, 20, 12, 4, 12]],
    "none": [],
}
FAULTS = {
    "two points": ([[4, 2, 20, 12]], "mask-broken", "1 of 1", []),
    "one bad part": ([[4, 2, 20], SQUARE], "mask-broken", "1 of 2", [SQUARE]),
    "text": ("poly", "mask-broken", "neither", []),
    "bad run lengths": ({"size": [20, 40], "counts": [3]}, "mask-broken", "run-length", []),
    "line": ([[4, 2, 20, 2, 8, 2]], "mask-empty", "without an area", []),
    "there and back": ([[4, 2, 20, 12, 4, 2, 20, 12]], "mask-empty", "without an area", []),
    "empty run lengths": ({"size": [20, 40], "counts": [800]}, "mask-empty", "without an area", []),
    "outside": (
        [[4, 2, 60, 2, 60, 12, 4, 12]], "mask-outside", "by 20 pixels", [[4, 2, 40, 2, 40, 12, 4, 12]],
    ),
    "bow tie": ([[4, 2, 20, 12, 20, 2, 4, 12]], "mask-crossing", "crosses itself", None),
    "drawn twice": ([SQUARE + SQUARE], "mask-crossing", "crosses itself", None),
    "another place": ([[24, 2, 38, 2, 38, 12]], "mask-box", "bbox [4, 2, 16, 10]", None),
    "another size": ({"size": [40, 40], "counts": [0, 1600]}, "mask-size", "40 × 40", None),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_good_masks_have_no_issue(tmp_path, name):
    assert mask_issues(write(tmp_path, GOOD[name])) == {}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_named_and_fixed(tmp_path, capsys, name):
    segmentation, code, text, fixed = FAULTS[name]
    root = write(tmp_path / "set", segmentation)
    found = mask_issues(root)
    assert code in found
    assert text in found[code].message
    assert "annotations[0] (id 1) of image 'a.png'" in found[code].line
    assert found.keys() - {code} <= {"mask-box"}, "a mask at the wrong place or size also disagrees with its box"
    assert mask_issues(root, masks=False) == {}, "only where masks are read"
    exit_code, output, _ = run_check(capsys, root, "--fix", tmp_path / "copy")
    assert exit_code in (0, None)
    assert f"warning {code}: " in output
    record = json.loads((tmp_path / "copy" / TRAIN).read_text())["annotations"][0]
    assert record["segmentation"] == (segmentation if fixed is None else fixed)
    assert record["bbox"] == BOX
    changes = [json.loads(line) for line in (tmp_path / "copy/changes.jsonl").read_text().splitlines()]
    assert [change["code"] for change in changes] == ([] if fixed is None else [code])
    if fixed is not None:
        assert code not in mask_issues(tmp_path / "copy")


def test_share_of_objects_with_masks(tmp_path):
    report = check_dataset(write(tmp_path, [SQUARE]), DataConfig(), RULE, cache=AnnotationCache(masks=True))
    (issue,) = (issue for issue in report.issues if issue.code == "masks-missing")
    assert issue.message.startswith("has masks for 1 of 3 objects")
    assert report.to_dict()["splits"]["train"]["masks"] == 1
    assert "masks-missing" not in {issue.code for issue in check_report(write_coco_dataset(tmp_path / "boxes")).issues}


@pytest.mark.parametrize("segmentation", [[SQUARE], RLE], ids=["polygon", "run lengths"])
def test_split_and_fix_keep_masks(tmp_path, capsys, segmentation):
    from tests.support.commands import run_command

    root = write(tmp_path / "set", segmentation)
    train = json.loads((root / TRAIN).read_text())
    for record in train["annotations"]:
        record |= {"segmentation": segmentation, "bbox": BOX}
    (root / TRAIN).write_text(json.dumps(train))
    run_command(capsys, "split", root / "train", "--out", tmp_path / "new", "--val", "0.4")
    kept = []
    for name in ("train", "val"):
        content = json.loads((tmp_path / "new" / name / "_annotations.coco.json").read_text())
        kept += [record["segmentation"] for record in content["annotations"]]
    assert kept == [segmentation] * len(kept)
    assert len(kept) >= 2


def test_yolo_polygons_are_kept(tmp_path, capsys):
    root = write_yolo_dataset(tmp_path / "set")
    polygon = np.array(SQUARE).reshape(-1, 2) / SIZE
    label = next(path for path in sorted((root / "labels/train").glob("*.txt")) if path.read_text())
    label.write_text("0 " + " ".join(map(str, polygon.reshape(-1))) + "\n1 0.5 0.5 0.25 0.5\n")
    assert run_check(capsys, root, "--fix", tmp_path / "copy")[0] in (0, None)
    for folder in (root, tmp_path / "copy"):
        truth = open_dataset(folder, masks=True).ground_truth
        ids = [record["id"] for record in truth["images"] if record["file_name"].endswith(f"{label.stem}.png")]
        first, second = (record for record in truth["annotations"] if record["image_id"] in ids)
        assert first["segmentation"][0].tolist() == pytest.approx(SQUARE, abs=1e-3)
        assert first["bbox"] == pytest.approx(BOX, abs=1e-3)
        assert "segmentation" not in second
        assert not any("segmentation" in record for record in open_dataset(folder).ground_truth["annotations"])


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_run_lengths_turn_with_their_image(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.arange(800, dtype=np.uint8).reshape(20, 40)
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(TURNS[orientation](pixels), read_image(tmp_path / "a.png")[0].numpy())


def test_masks_of_a_resized_image_are_resized(tmp_path, capsys):
    root = write(tmp_path / "set", RLE)
    path = root / "train/a.png"
    Image.open(path).resize((80, 40)).save(path)
    run_check(capsys, root, "--fix", tmp_path / "copy")
    record = json.loads((tmp_path / "copy" / TRAIN).read_text())["annotations"][0]
    assert record["bbox"] == [8, 4, 32, 20]
    mask = coco_mask.decode(record["segmentation"])
    assert np.array_equal(mask, RING.repeat(2, axis=0).repeat(2, axis=1))


def test_clipped_polygons_cover_the_pixels_inside():
    random = np.random.default_rng(0)
    for _ in range(30):
        points = random.uniform(-40, 140, (9, 2))
        clipped = clip_polygon(points, np.array([100, 60]))
        assert (clipped >= 0).all()
        assert (clipped <= [100, 60]).all()
        inside = coco_mask.decode(coco_mask.frPyObjects([(points + 50).reshape(-1).tolist()], 200, 200))[50:110, 50:150]
        if len(clipped) < 3:
            assert inside.sum() < 20
            continue
        part = coco_mask.decode(coco_mask.frPyObjects([(clipped + 50).reshape(-1).tolist()], 200, 200))[50:110, 50:150]
        assert (part != inside).sum() <= 0.05 * inside.sum() + 40


def test_areas():
    triangle, ring = [np.array([0.0, 0, 30, 0, 0, 40])], {"size": [20, 40], "counts": RLE["counts"]}
    sizes = measure([triangle, ring, triangle * 2])
    assert sizes.areas == pytest.approx([600, int(RING.sum()), 1200], rel=0.02)
    assert sizes.extents.tolist() == [[0, 0, 30, 40], [4, 2, 20, 12], [0, 0, 30, 40]]
    assert not sizes.crossings.any()
