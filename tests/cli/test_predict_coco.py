"""`predict --coco` and `predict --top-k`."""

import json
import logging
import shutil
from pathlib import Path

import pytest

from deformable_detr import evaluate
from deformable_detr.utils.rle import decode_masks
from tests.support.commands import is_one_line_error, run_command
from tests.support.datasets import write_image
from tests.support.label_formats import WRITERS, write_task
from tests.support.masks import with_masks
from tests.support.models import NAMES, tiny
from tests.support.red_box import RedBoxFinder
from tests.support.training import write_dataset


def save(folder, **changes):
    tiny(**changes).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Red, green and blue boxes; image ids from 100, category ids 10, 20 and 30."""
    return write_dataset(tmp_path_factory.mktemp("coco") / "set", val=6)


def pycocotools_ap(annotations, results):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = COCO(str(annotations))
    evaluation = COCOeval(truth, truth.loadRes(str(results)), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats


@pytest.mark.parametrize("source", ["", "valid/_annotations.coco.json"])
def test_dataset(data, tmp_path, capsys, monkeypatch, source):
    model = RedBoxFinder(num_classes=3, class_names=("green", "red", "blue"), category_ids=(20, 10, 30))
    monkeypatch.setattr("deformable_detr.detector.load_detector", lambda *_: model)
    annotations, results = data / "valid" / "_annotations.coco.json", tmp_path / "results.json"
    code, out, errors = run_command(capsys, "predict", "model", data / source, "--coco", results)
    assert (code, errors) == (0, "")
    assert f"in 6 images of {annotations}" in out
    stats, metrics = pycocotools_ap(annotations, results), evaluate(model, data)
    names = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
    assert metrics["AP"] > 0.02
    assert [max(stat, 0) for stat in stats[:6]] == pytest.approx([metrics[name] or 0 for name in names], abs=1e-9)
    rows = json.loads(results.read_text())
    assert {row["image_id"] for row in rows} == set(range(100, 106))
    assert {row["category_id"] for row in rows} == {10, 20, 30}
    split = [] if source else ["--split", "train"]
    command = ["predict", "model", data / source, "--coco", results, "--top-k", 3, "--threshold", 0.2, *split]
    assert run_command(capsys, *command)[0] == 0
    rows = json.loads(results.read_text())
    assert len(rows) <= 3 * 8
    assert all(row["score"] >= 0.2 for row in rows)


def test_masks_of_images(data, tmp_path, capsys, monkeypatch):
    """In --json and --coco; without masks, both have the same values otherwise."""
    config = {"num_classes": 3, "class_names": ("green", "red", "blue"), "category_ids": (20, 10, 30)}
    contents = {}
    for name, model in {"masks": with_masks(RedBoxFinder(**config)), "boxes": RedBoxFinder(**config)}.items():
        monkeypatch.setattr("deformable_detr.detector.load_detector", lambda *_, model=model: model)
        table, coco, out = (tmp_path / f"{name}{suffix}" for suffix in (".json", "-coco.json", "-drawn"))
        command = ["predict", "model", *sorted((data / "valid").glob("*.png"))]
        assert run_command(capsys, *command, "--json", table, "--coco", coco, "--out", out)[0] == 0
        drawn = b"".join(path.read_bytes() for path in sorted(out.iterdir()))
        contents[name] = json.loads(table.read_text()), json.loads(coco.read_text()), drawn
    (table, coco, drawn), (plain_table, plain_coco, plain_drawn) = contents["masks"], contents["boxes"]
    masks = [detection.pop("mask") for record in table for detection in record["detections"]]
    assert [result.pop("segmentation") for result in coco] == masks
    assert (table, coco) == (plain_table, plain_coco)
    assert drawn != plain_drawn
    sizes = [[record["height"], record["width"]] for record in table for _ in record["detections"]]
    assert [mask["size"] for mask in masks] == sizes
    assert decode_masks(masks[:1], tuple(sizes[0])).any()


@pytest.mark.parametrize("ids", ["texts", "digits", "renumbered"])
def test_ids_are_those_of_the_file(data, tmp_path, capsys, monkeypatch, ids):
    shutil.copytree(data, root := tmp_path / "set")
    annotations = root / "valid" / "_annotations.coco.json"
    content = json.loads(annotations.read_text())
    image_id = {"texts": "uuid-{}", "digits": "0{}"}.get(ids, "{}").format
    category_id = {"texts": "class {}", "digits": "0{}"}.get(ids, "{}").format
    number = int if ids == "renumbered" else str
    for record in content["images"]:
        record["id"] = number(image_id(record["id"]))
    for record in content["categories"]:
        record["id"] = number(category_id(record["id"] + 1))
    for record in content["annotations"]:
        record["image_id"] = number(image_id(record["image_id"]))
        record["category_id"] = number(category_id(record["category_id"] + 1))
    annotations.write_text(json.dumps(content))
    model = RedBoxFinder(num_classes=4, class_names=("green", "red", "blue", "x"), category_ids=(20, 10, 30, 40))
    monkeypatch.setattr("deformable_detr.detector.load_detector", lambda *_: model)
    code, out, _ = run_command(capsys, "predict", "model", root, "--coco", tmp_path / "r.json")
    assert code == 0
    assert "of classes that it does not list are left out" in out
    stats = pycocotools_ap(annotations, tmp_path / "r.json")
    assert stats[0] == pytest.approx(evaluate(model, root)["AP"], abs=1e-9)
    assert stats[0] > 0.02
    names = {record["id"] for record in content["categories"]}
    assert {row["category_id"] for row in json.loads((tmp_path / "r.json").read_text())} == names


@pytest.mark.parametrize("name", WRITERS)
def test_every_format(tmp_path, capsys, name):
    model = tiny(num_classes=2, class_names=("disc", "square"), category_ids=(1, 2))
    model.save_pretrained(tmp_path / "model")
    root = write_task(tmp_path / "set", WRITERS[name])
    code, _, errors = run_command(capsys, "predict", tmp_path / "model", root, "--coco", tmp_path / "r.json")
    assert (code, errors) == (0, "")
    rows = json.loads((tmp_path / "r.json").read_text())
    assert {row["category_id"] for row in rows} == {1, 2}
    names = {Path(row["file_name"]).name for row in rows if "file_name" in row}
    assert names == (set() if name == "coco" else {"q0.jpg"})
    code, out, errors = run_command(capsys, "evaluate", tmp_path / "model", root, "--workers", 0)
    assert (code, errors) == (0, "")
    assert "AP50" in out


def test_split_is_for_datasets(model, data, tmp_path, capsys):
    image = write_image(tmp_path / "images" / "a.png", (100, 60))
    for arguments in (
        [data, "--split", "train"],
        [image, "--coco", tmp_path / "r.json", "--split", "val"],
        [data, image, "--coco", tmp_path / "r.json", "--split", "val"],
        [image.parent, "--coco", tmp_path / "r.json", "--split", "val"],
        [data, "--coco", tmp_path / "r.json", "--split", "test"],
    ):
        code, _, errors = run_command(capsys, "predict", model, *arguments)
        assert code == 2
        assert is_one_line_error(errors)
        assert not (tmp_path / "r.json").exists()


def test_images_are_numbered_and_named(model, tmp_path, capsys):
    names = [str(write_image(tmp_path / "images" / f"{name}.png", (100, 60))) for name in "ba"]
    results = tmp_path / "results.json"
    code, out, _ = run_command(capsys, "predict", model, tmp_path / "images", "--coco", results)
    assert code == 0
    assert "numbered from 1" in out
    rows = json.loads(results.read_text())
    assert {(row["image_id"], row["file_name"]) for row in rows} == set(enumerate(sorted(names), 1))
    assert {row["category_id"] for row in rows} <= {7, 3, 90}
    assert all(len(row["bbox"]) == 4 and row["bbox"][2] >= 0 for row in rows)
    assert len(rows) == 2 * 12 * len(NAMES)  # all scores
    run_command(capsys, "predict", model, tmp_path / "images", "--coco", results, "--threshold", 0.5)
    assert {row["score"] >= 0.5 for row in json.loads(results.read_text())} <= {True}


def test_errors(model, data, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.json").write_text("{}")
    cases = {
        "--out": [data, "--coco", tmp_path / "r.json", "--out", tmp_path / "drawn"],
        "x.json": [tmp_path / "x.json", "--coco", tmp_path / "r.json"],
        "empty": [tmp_path / "empty", "--coco", tmp_path / "r.json"],
        "missing": [data, "--coco", tmp_path / "missing" / "file" / "r.json", "--split", "missing"],
    }
    for word, arguments in cases.items():
        code, _, errors = run_command(capsys, "predict", model, *arguments)
        assert code == 2, word
        assert is_one_line_error(errors)
        assert word in errors
        assert not (tmp_path / "r.json").exists()


def test_top_k(model, tmp_path, capsys, caplog):
    images = [write_image(tmp_path / f"{name}.png", (100, 60)) for name in "ab"]
    for options, count in ((["--top-k", 5], 5), ([], 36)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            command = ["predict", model, *images, "--threshold", 0, "--json", tmp_path / "out.json", *options]
            assert run_command(capsys, *command)[0] == 0
        assert [len(entry["detections"]) for entry in json.loads((tmp_path / "out.json").read_text())] == [count] * 2
        limit = f"{images[0]} and 1 more: 5 detections, the maximum; allow more with --top-k"
        assert caplog.messages == ([limit] if options else [])  # 36 is all that the model has


def test_default_top_k_follows_the_queries(tmp_path, capsys):
    model = save(tmp_path / "few", num_queries=60, image_size=480)
    more = save(tmp_path / "many", num_queries=130, image_size=480)
    image = write_image(tmp_path / "a.png", (200, 200))
    for source, count in ((model, 100), (more, 130)):
        run_command(capsys, "predict", source, image, "--threshold", 0, "--json", tmp_path / "out.json")
        assert len(json.loads((tmp_path / "out.json").read_text())[0]["detections"]) == count
