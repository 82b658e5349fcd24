"""The repaired copy of a dataset; the original never changes."""

import json

import numpy as np
import pytest
from PIL import Image

from deformable_detr.data.dataset import open_dataset
from deformable_detr.data.validate.repair import _rotate
from deformable_detr.utils.errors import UserError
from tests.support.data_problems import (
    TRAIN,
    VAL,
    issue_codes,
    load_for_training,
    run_check,
    snapshot,
    write_faulty_dataset,
)
from tests.support.datasets import OBJECTS, SIZE, write_coco_dataset, write_image, write_voc_dataset, write_yolo_dataset


def test_repaired_copy(tmp_path, capsys):
    root, out = write_faulty_dataset(tmp_path / "set"), tmp_path / "copy"
    before = snapshot(root)
    code, out_text, _ = run_check(capsys, root, "--fix", out, "--set", "model.image_size=64")
    assert snapshot(root) == before, "the original is unchanged"
    assert code == 0, out_text
    assert "remaining: error" not in out_text

    content = json.loads((out / TRAIN).read_text())
    assert content["info"] == {"year": 2024}
    images = {record["file_name"]: record for record in content["images"]}
    assert images.keys() == {"a.png", "b.png", "empty.png", "turned.png", "large.png", "good.png"}
    assert (images["turned.png"]["width"], images["turned.png"]["height"]) == SIZE[::-1]
    assert (images["large.png"]["width"], images["large.png"]["height"]) == (80, 40)
    assert all((out / "train" / name).is_file() for name in images)
    boxes = {}
    for record in content["annotations"]:
        boxes.setdefault(record["image_id"], []).append(record["bbox"])
    assert boxes[13] == [[8, 4, 10, 16]], "rotated with its image: 20 - 2 - 10 from the left"
    assert boxes[14] == [[8, 4, 32, 20]], "scaled with its image"
    assert boxes[16] == [[4, 2, 16, 10], [20, 10, 20, 10], [8, 8, 8, 8], [0, 0, 0, 0]]
    ids = [record["id"] for record in content["annotations"]]
    assert len(set(ids)) == len(ids)
    cut = next(record for record in content["annotations"] if record["bbox"] == [20, 10, 20, 10])
    assert cut["segmentation"] == [[20, 10, 30, 10, 30, 20]], "masks are kept"
    assert cut["area"] == 200

    changes = [json.loads(line) for line in (out / "changes.jsonl").read_text().splitlines()]
    assert f"lists {len(changes)} changes" in out_text
    assert {change["code"] for change in changes} == {
        "image-missing", "image-unreadable", "image-size", "leak", "box-duplicate", "box-outside", "box-overhang",
        "annotation-id-duplicate", "annotation-record", "category-unknown", "image-unknown",
    }  # fmt: skip
    load_for_training(out)
    # Changing the copy must not change the original.
    (out / TRAIN).write_text("")
    (out / "train/a.png").unlink()
    assert snapshot(root) == before


def write_resized(root, box):
    """Write a dataset whose a.png is twice its recorded size, with one object that has a box and a polygon."""
    write_coco_dataset(root)
    path = root / TRAIN
    content = json.loads(path.read_text())
    write_image(root / "train/a.png", (SIZE[0] * 2, SIZE[1] * 2))
    image_id = next(record["id"] for record in content["images"] if record["file_name"] == "a.png")
    x, y, w, h = box
    polygon = [x, y, x + w, y, x + w, y + h]
    others = [record for record in content["annotations"] if record["image_id"] != image_id]
    annotation = {"id": 99, "image_id": image_id, "category_id": 1, "bbox": box, "segmentation": [polygon]}
    path.write_text(json.dumps(content | {"annotations": [*others, annotation]}))
    return root


def repair(root, out, capsys):
    """Return the repaired box and polygon of the object."""
    run_check(capsys, root, "--fix", out)
    record = next(record for record in json.loads((out / TRAIN).read_text())["annotations"] if record["id"] == 99)
    return record["bbox"], record["segmentation"]


def test_masks_are_scaled_with_their_boxes(tmp_path, capsys):
    root = write_resized(tmp_path / "set", [4, 2, 16, 10])
    assert repair(root, tmp_path / "copy", capsys) == ([8, 4, 32, 20], [[8, 4, 40, 4, 40, 24]])


def test_boxes_that_fit_only_the_image_are_kept(tmp_path, capsys):
    root = write_resized(tmp_path / "set", [50, 20, 20, 15])  # recorded size 40 × 20, image size 80 × 40
    assert repair(root, tmp_path / "copy", capsys) == ([50, 20, 20, 15], [[50, 20, 70, 20, 70, 35]])
    content = json.loads((tmp_path / "copy" / TRAIN).read_text())
    assert {(record["width"], record["height"]) for record in content["images"] if record["file_name"] == "a.png"} == {
        (SIZE[0] * 2, SIZE[1] * 2)
    }


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_boxes_rotate_with_their_image(tmp_path, orientation):
    pixels = np.zeros((20, 40), np.uint8)
    pixels[2:12, 4:20] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    from deformable_detr.utils.images import read_image

    rows, columns = np.nonzero(read_image(tmp_path / "a.png")[0].numpy())
    ((x, y, w, h),) = _rotate(np.array([[4, 2, 16, 10.0]]), 20, 40, orientation)
    assert (x, y, x + w, y + h) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


@pytest.mark.parametrize(
    ("code_name", "change"),
    [
        ("boxes-normalized", lambda box: [box[0] / 40, box[1] / 20, box[2] / 40, box[3] / 20]),
        ("boxes-corners", lambda box: [box[0], box[1], box[0] + box[2], box[1] + box[3]]),
    ],
)
def test_boxes_in_another_format_are_converted(tmp_path, capsys, code_name, change):
    objects = {"train": {"a": [(0, (14, 6, 20, 12)), (1, (16, 8, 10, 10))]}, "val": {"c": [(0, (1, 2, 30, 10))]}}
    root = write_coco_dataset(tmp_path / "set", objects)
    content = json.loads((root / TRAIN).read_text())
    before = [record["bbox"] for record in content["annotations"]]
    for record in content["annotations"]:
        record["bbox"] = change(record["bbox"])
    (root / TRAIN).write_text(json.dumps(content))
    assert code_name in issue_codes(root)
    code, _, _ = run_check(capsys, root, "--fix", tmp_path / "copy")
    after = [record["bbox"] for record in json.loads((tmp_path / "copy" / TRAIN).read_text())["annotations"]]
    assert after == pytest.approx(np.array(before))
    assert code == 0


def test_missing_boxes_are_computed_from_polygons(tmp_path, capsys):
    root = write_coco_dataset(tmp_path / "set")
    content = json.loads((root / TRAIN).read_text())
    masks = [[[4, 2, 12, 2, 12, 9], [9, 8, 20, 8, 20, 12.5]], [[20, 5, 39, 5, 39, 19]], [[10, 5, 30, 5, 30, 15]]]
    for record, mask, box in zip(content["annotations"], masks, [None, [], ...], strict=True):
        record.pop("bbox")
        record |= {"segmentation": mask} | ({} if box is ... else {"bbox": box})
    (root / TRAIN).write_text(json.dumps(content))
    before = open_dataset(root)
    code, out_text, _ = run_check(capsys, root, "--fix", tmp_path / "copy")
    assert code == 0
    assert "warning box-from-mask: " in out_text
    assert "has 3 objects with a mask but no bbox" in out_text
    objects = json.loads((tmp_path / "copy" / TRAIN).read_text())["annotations"]
    assert [record["bbox"] for record in objects] == [[4, 2, 16, 10.5], [20, 5, 19, 14], [10, 5, 20, 10]]
    assert [record["segmentation"] for record in objects] == masks
    for (_, old), (_, new) in zip(before, open_dataset(tmp_path / "copy"), strict=True):
        assert old.boxes.tolist() == new.boxes.tolist()
    changes = [json.loads(line) for line in (tmp_path / "copy/changes.jsonl").read_text().splitlines()]
    assert [change["code"] for change in changes] == ["box-from-mask"] * 3


def test_off_by_one_category_ids_are_fixed(tmp_path, capsys):
    root = write_coco_dataset(tmp_path / "set")
    content = json.loads((root / TRAIN).read_text())
    for record in content["annotations"]:
        record["category_id"] -= 1
    (root / TRAIN).write_text(json.dumps(content))
    code, _, _ = run_check(capsys, root, "--fix", tmp_path / "copy")
    assert code == 0
    assert [r["category_id"] for r in json.loads((tmp_path / "copy" / TRAIN).read_text())["annotations"]] == [1, 2, 2]


def test_file_names_of_other_systems_are_fixed(tmp_path, capsys):
    """Windows paths and URL-encoded names."""
    root = tmp_path / "set"
    for split, images in OBJECTS.items():
        content = json.loads((write_coco_dataset(tmp_path / "plain") / {"train": TRAIN}.get(split, VAL)).read_text())
        for stem, record in zip(images, content["images"], strict=True):
            write_image(root / "images" / split / f"my {stem}.png")
            record["file_name"] = f"images\\{split}\\my {stem}.png" if split == "val" else f"my%20{stem}.png"
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"{split}.json").write_text(json.dumps(content))
    assert issue_codes(root) == {"image-name"}
    assert len(list(open_dataset(root))) == len(OBJECTS["train"])
    code, out_text, _ = run_check(capsys, root, "--fix", tmp_path / "copy")
    assert code == 0
    assert "remaining: error" not in out_text
    for split, images in OBJECTS.items():
        copied = open_dataset(tmp_path / "copy", split)
        names = [copied.path(index).name for index in range(len(copied))]
        assert names == [f"my {stem}.png" for stem in images]
        assert [len(target.boxes) for _, target in copied] == [len(boxes) for boxes in images.values()]
    changes = [json.loads(line) for line in (tmp_path / "copy/changes.jsonl").read_text().splitlines()]
    assert [change["code"] for change in changes] == ["image-name"] * 4


def test_records_of_one_file_are_merged(tmp_path, capsys):
    root, out = write_coco_dataset(tmp_path / "set"), tmp_path / "copy"
    content = json.loads((root / TRAIN).read_text())
    first = content["annotations"][0]
    content["images"].append({**content["images"][0], "id": 50})  # one record per object, and one object in both
    content["annotations"][1]["image_id"] = 50
    content["annotations"].append({**first, "id": 60, "image_id": 50})
    (root / TRAIN).write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"images\[3\] .* the file 'a.png' of images\[0\], and their objects differ"):
        open_dataset(root)
    code, out_text, _ = run_check(capsys, root, "--fix", out)
    assert code == 0, out_text
    copy = json.loads((out / TRAIN).read_text())
    assert [record["file_name"] for record in copy["images"]] == ["a.png", "b.png", "empty.png"]
    assert [record["image_id"] for record in copy["annotations"]] == [1, 1, 2]
    assert ": repaired copy with 4 of 5 images and 5 of 6 objects; " in out_text
    changes = [json.loads(line) for line in (out / "changes.jsonl").read_text().splitlines()]
    assert [(change["code"], change["record"]) for change in changes] == [
        ("image-twice", "images[3]"), ("box-duplicate", "annotations[3] (id 60)"),
    ]  # fmt: skip
    assert not issue_codes(out) & {"image-in-parts", "image-twice", "image-copy"}


def test_copy_has_one_category_list(tmp_path, capsys):
    root = write_coco_dataset(tmp_path / "set")
    content = json.loads((root / "valid/_annotations.coco.json").read_text())
    content["categories"] = [  # Roboflow's group category comes first
        {"id": 0, "name": "pets", "supercategory": "none"},
        {"id": 2, "name": "cat", "supercategory": "pets"},
        {"id": 1, "name": "dog", "supercategory": "pets"},
    ]
    for record in content["annotations"]:
        record["category_id"] = 3 - record["category_id"]
    (root / "valid/_annotations.coco.json").write_text(json.dumps(content))
    assert issue_codes(root) == {"category-renumbered"}
    code, out_text, _ = run_check(capsys, root, "--fix", tmp_path / "copy")
    assert code == 0
    assert "remaining: warning category-renumbered" not in out_text
    fixed = json.loads((tmp_path / "copy/val/_annotations.coco.json").read_text())
    assert {record["id"]: record["name"] for record in fixed["categories"]} == {1: "cat", 2: "dog"}
    assert [record["category_id"] for record in fixed["annotations"]] == [1, 2]
    (change,) = [json.loads(line) for line in (tmp_path / "copy/changes.jsonl").read_text().splitlines()]
    assert (change["code"], change["change"]) == ("category-renumbered", "category ids 1 → 2, 2 → 1")


@pytest.mark.parametrize("make", [write_yolo_dataset, write_voc_dataset])
def test_other_formats_are_copied_as_coco(tmp_path, capsys, make):
    root = make(tmp_path / "set")
    code, _, _ = run_check(capsys, root, "--fix", tmp_path / "copy")
    assert code == 0
    for split in ("train", "val"):
        old, new = (open_dataset(place, split) for place in (root, tmp_path / "copy"))
        assert [new.path(k).stem for k in range(len(new))] == [old.path(k).stem for k in range(len(old))]
        assert len(new) == len(OBJECTS[split])
        for (_, before), (_, after) in zip(old, new, strict=True):
            np.testing.assert_allclose(after.boxes.numpy(), before.boxes.numpy(), atol=1e-5)
            assert after.labels.tolist() == before.labels.tolist()


def test_invalid_output_folders(tmp_path, capsys):
    root = write_coco_dataset(tmp_path / "set")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").touch()
    (tmp_path / "file").touch()
    before = snapshot(tmp_path)
    for out, message in [(root, "lies in the dataset"), (root / "copy", "lies in the dataset"),
                       (tmp_path / "full", "not empty"), (tmp_path / "file" / "x", "cannot be written")]:  # fmt: skip
        code, out_text, err = run_check(capsys, root, "--fix", out)
        assert (code, out_text) == (2, "")
        assert err.startswith(f"error: --fix {out}: ")
        assert message in err
        assert err.count("\n") == 1
    assert snapshot(tmp_path) == before


def test_pictures_with_one_name_are_not_merged(tmp_path, capsys):
    """Label Studio exports 'a/1.jpg' and 'b/1.jpg' as '1.jpg': the file may be either picture."""
    root, out = write_coco_dataset(tmp_path / "set"), tmp_path / "copy"
    content = json.loads((root / TRAIN).read_text())
    content["images"].append({**content["images"][0], "id": 50})
    content["annotations"].append({**content["annotations"][0], "id": 60, "image_id": 50, "bbox": [1, 1, 9, 9]})
    (root / TRAIN).write_text(json.dumps(content))
    message = r"images\[3\] .* the file 'a.png' of images\[0\], and .* two pictures with one name; export again"
    with pytest.raises(UserError, match=message):
        open_dataset(root)
    code, _, _ = run_check(capsys, root, "--fix", out)
    assert code == 0
    assert [record["file_name"] for record in json.loads((out / TRAIN).read_text())["images"]] == ["b.png", "empty.png"]
    assert "images[0] and images[3]" in (out / "changes.jsonl").read_text()
