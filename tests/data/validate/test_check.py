"""The `check` command and the check before training: exit codes, output, JSON and depth."""

import json

import pytest

from deformable_detr.config.schema import DataConfig
from deformable_detr.data.validate import check_dataset, check_for_training, images
from deformable_detr.utils.errors import UserError
from tests.support.data_problems import RULE, TRAIN, check_report, run_check
from tests.support.datasets import OBJECTS, write_coco_dataset


def test_exit_codes_and_lines(tmp_path, capsys):
    root = write_coco_dataset(tmp_path / "set")
    code, out, err = run_check(capsys, root)
    assert (code, err) == (0, "")
    assert out.splitlines()[-1].startswith("train 3 images, 3 objects; val 1 images, 2 objects: 0 errors, 2 warnings")
    content = json.loads((root / TRAIN).read_text())
    content["annotations"] += [
        {"id": 100 + n, "image_id": 99, "category_id": 1, "bbox": [1, 1, 9, 9]} for n in range(9)
    ]
    (root / TRAIN).write_text(json.dumps(content))
    code, out, err = run_check(capsys, root, "--json", tmp_path / "new" / "report.json", "--image-size", 100)
    assert (code, err) == (2, "")
    lines = out.splitlines()
    assert [line.startswith("error image-unknown: ") for line in lines[:6]] == [True] * 6
    assert lines[0] == (
        f"error image-unknown: {root / TRAIN}: annotations[3] (id 100) has image_id 99, which is not among the images; "
        "add the image or remove the object"
    )
    assert lines[5] == "error image-unknown: 4 more"
    document = json.loads((tmp_path / "new/report.json").read_text())
    assert document["image_size"] == 100
    assert document["counts"]["error"] == document["types"]["image-unknown"] == 9
    unknown_image_issues = [finding for finding in document["issues"] if finding["code"] == "image-unknown"]
    assert [finding["position"] for finding in unknown_image_issues] == list(range(3, 12))
    assert document["splits"]["train"]["classes"] == {"cat": 1, "dog": 2}


@pytest.mark.parametrize("option", ["--report", "--json"])
def test_unwritable_outputs_are_reported(tmp_path, capsys, option):
    root = write_coco_dataset(tmp_path / "set")
    (tmp_path / "file").touch()
    for path in (root, tmp_path / "file" / "x"):
        code, out, err = run_check(capsys, root, option, path)
        assert (code, out) == (2, "")
        assert err.startswith(f"error: {option} {path}: ")


def test_warnings_before_training_are_summarized(tmp_path):
    root = write_coco_dataset(tmp_path)
    content = json.loads((root / TRAIN).read_text())
    content["annotations"] += [{"id": 9 + n, "image_id": 1, "category_id": 1, "bbox": [n, 2, 0, 5]} for n in range(7)]
    (root / TRAIN).write_text(json.dumps(content))
    lines = check_for_training(root, DataConfig(), RULE)
    assert [line.split(":")[0] for line in lines] == [
        "warning class-rare", "warning class-rare", "warning box-degenerate", "warning box-degenerate",
        "to list all issues",
    ]  # fmt: skip
    assert lines[3].endswith("6 more")
    assert check_for_training(root, DataConfig(check="off"), RULE) == ()


def test_first_error_stops_training(tmp_path):
    root = write_coco_dataset(tmp_path)
    (root / "train/a.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"train/a\.png: cannot be read as an image .*; replace or remove it$"):
        check_for_training(root, DataConfig(), RULE)
    (root / "train/b.png").unlink()
    with pytest.raises(UserError, match=rf"'b\.png'.*\(the first of 2 errors; to list all: .* check {root}\)$"):
        check_for_training(root, DataConfig(), RULE)
    check_for_training(root, DataConfig(check="off"), RULE)


def test_auto_checks_a_sample_and_full_checks_all_images(tmp_path, monkeypatch):
    root = write_coco_dataset(
        tmp_path, {"train": {f"{n:02}": [(n % 2, (4, 2, 16, 10))] for n in range(40)}, **{"val": OBJECTS["val"]}}
    )
    assert vars(check_report(root, "auto").coverage) == {"images": 41, "headers": 41, "decoded": 41}
    monkeypatch.setattr(images, "AUTO_IMAGES", 10)
    assert vars(check_report(root, "auto").coverage) == {"images": 41, "headers": 41, "decoded": 9}
    path = root / "train/03.png"
    path.write_bytes(path.read_bytes()[:1000])  # the header is intact
    assert not check_report(root, "auto").errors
    assert [finding.code for finding in check_report(root, "full").errors] == ["image-unreadable"]
    monkeypatch.setattr(images, "AUTO_SECONDS", -1.0)
    monkeypatch.setattr(images, "CHUNK", 4)
    assert vars(check_report(root, "auto").coverage) == {"images": 41, "headers": 4, "decoded": 4}


def test_more_objects_than_queries(tmp_path):
    boxes = [(0, (x, y, 4, 4)) for x in range(0, 36, 3) for y in range(0, 16, 2)]
    root = write_coco_dataset(tmp_path, {"train": {"a": boxes, "b": boxes[:2]}, "val": {"c": boxes[:50]}})
    report = check_dataset(root, DataConfig(), RULE, num_queries=50)
    [issue] = [issue for issue in report.issues if issue.code == "too-many-objects"]
    assert (
        f"has 1 images with more objects than the model's 50 queries, at most {len(boxes)} ('a.png')" in issue.message
    )
    assert issue.hint == "train with --set model.num_queries=200"
    lines = check_for_training(root, DataConfig(), RULE, num_queries=50)
    assert any(line.startswith("warning too-many-objects") for line in lines)
    assert not any("too-many" in line for line in check_for_training(root, DataConfig(), RULE, num_queries=96))


def imbalance_hint(root, ratio, common=30):
    """Return the hint for one image with a dog among images with `ratio` cats in total, `common` of them with cats."""
    cats = {f"{n:03}": [(0, (4, 2, 16, 10))] * (ratio // common) for n in range(common)}
    write_coco_dataset(root, {"train": {**cats, "dog": [(1, (4, 2, 16, 10))]}, "val": OBJECTS["val"]})
    [issue] = [issue for issue in check_report(root).issues if issue.code == "class-imbalance"]
    return issue.hint


def test_imbalance_suggests_a_repeat_threshold(tmp_path):
    # √(30 · 1) / 31 of the images: the dog's image is shown √(0.18 / 0.032) = 2.4 times
    hint = imbalance_hint(tmp_path / "rare", 60)
    assert hint == ("label more of the rare class, or show its images more often: train with --repeat-threshold 0.2")
    # Repetition does not help where cats are many, but in few images.
    assert imbalance_hint(tmp_path / "crowded", 60, common=3) == "label more of the rare class"
