"""The page of a run with curves and gallery, written during training."""

import json
import re

import pytest

from deformable_detr.data.dataset import open_dataset
from deformable_detr.evaluation.gallery import add_to_gallery, read_gallery
from deformable_detr.evaluation.training_page import MAX_POINTS, write_training_page
from deformable_detr.training import train_model
from deformable_detr.utils.rle import encode_masks
from tests.support.masks import same_shape, write_triangles
from tests.support.training import tiny_config, write_dataset


def content(page):
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=\"?(https?:)?//", text)
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_training_writes_and_resumes_the_page(tmp_path):
    data, run = write_dataset(tmp_path / "data"), tmp_path / "run"
    train_model(data, run, tiny_config(epochs=2))
    page, records = content(run / "training.html"), lines(run)
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    assert page["evaluation"]["AP"] == [[record["step"], record["AP"]] for record in evaluations]
    train = [record for record in records if record["kind"] == "train" and record["step"] <= evaluations[-1]["step"]]
    for name in ("loss", "loss_class", "lr"):
        assert [step for step, _ in page["train"][name]] == [record["step"] for record in train]
        assert [value for _, value in page["train"][name]] == pytest.approx([row[name] for row in train], rel=1e-4)
    gallery = page["gallery"]
    assert [evaluation["step"] for evaluation in gallery["evaluations"]] == [record["step"] for record in evaluations]
    assert [image["name"] for image in gallery["images"]] == ["0.png", "1.png", "2.png", "3.png"]
    assert all(image["image"].startswith("data:image/jpeg;base64,") for image in gallery["images"])
    assert gallery["names"] == ["red", "green", "blue"]

    train_model(data, run, tiny_config(epochs=3), resume=True)
    assert len(content(run / "training.html")["evaluation"]["AP"]) == 3
    assert not list(run.rglob("*.tmp"))


@pytest.mark.parametrize("scale", [1, 8])
def test_gallery_has_masks(tmp_path, scale):
    """At the size of its images, which have at most 480 pixels per side."""
    masks = write_triangles(tmp_path / "data", (120 * scale, 160 * scale))
    result = {"image_id": 5, "category_id": 7, "bbox": [1, 2, 3, 4]}
    results = [{**result, "score": 0.5}, {**result, "score": 0.75, "segmentation": encode_masks(masks[:1])[0]}]
    pages = []
    for with_masks in (True, False):
        dataset = open_dataset(tmp_path / "data", split="val", masks=with_masks)
        shown = results if with_masks else [{**result, "score": row["score"]} for row in results]
        add_to_gallery(tmp_path / f"{with_masks}", 1, 0, dataset, shown)
        pages.append(read_gallery(tmp_path / f"{with_masks}", [1]))
    masked, plain = pages
    objects, detections = masked["images"][0]["objects"], masked["evaluations"][0]["images"][0]
    rles = [objects[0].pop(), objects[1].pop(), detections[0].pop()]
    assert masked == plain
    assert all(max(rle["size"]) == min(160 * scale, 480) for rle in rles)
    assert all(map(same_shape, rles, [masks[0], masks[1], masks[0]]))
    assert not same_shape(rles[0], masks[1])


class MinimalDataset:
    """The dataset attributes that a gallery needs."""

    categories = ()

    def __init__(self, count):
        import numpy as np

        self.image_ids = np.arange(count) * 3


def test_reevaluated_step_replaces_the_earlier_one(tmp_path, monkeypatch):
    from deformable_detr.evaluation import gallery
    from deformable_detr.structures import Category

    monkeypatch.setattr(
        gallery, "_describe_images", lambda _, __, ids: {"ids": list(ids), "names": ["a"], "images": []}
    )
    dataset = MinimalDataset(10)
    dataset.categories = (Category(7, "a"),)
    dataset.__class__.__len__ = lambda self: len(self.image_ids)  # pyright: ignore[reportAttributeAccessIssue]
    box = {"image_id": 27, "category_id": 7, "bbox": [1, 2, 3, 4]}
    for step, score in ((5, 0.9), (10, 0.8), (10, 0.7), (15, 0.01)):
        add_to_gallery(tmp_path, step, 1, dataset, [{**box, "score": score}])  # pyright: ignore[reportArgumentType]
    with open(tmp_path / "gallery" / "predictions.jsonl", "a") as file:
        file.write('{"step": 20, "ima')  # killed while writing
    gallery_data = read_gallery(tmp_path, [10, 15, 20])
    assert gallery_data is not None
    assert gallery_data["ids"] == [0, 6, 12, 15, 21, 27]
    assert [evaluation["step"] for evaluation in gallery_data["evaluations"]] == [10, 15]
    assert gallery_data["evaluations"][0]["images"][-1] == [[1, 2, 3, 4, 0, 0.7]]
    assert gallery_data["evaluations"][1]["images"][-1] == []


def test_long_runs_are_subsampled_and_invalid_records_skipped(tmp_path):
    with open(tmp_path / "metrics.jsonl", "w") as file:
        for step in range(1, 5001):
            loss = float("nan") if step == 3 else 5000.0 - step
            file.write(json.dumps({"kind": "train", "step": step, "epoch": 0, "loss": loss, "lr": 1e-4}) + "\n")
        file.write(json.dumps({"kind": "evaluation", "step": 5000, "AP": None, "AP50": 0.5}) + "\n")
        file.write('{"kind": "train", "step": 50')
    page = content(write_training_page(tmp_path))
    loss = page["train"]["loss"]
    assert MAX_POINTS * 0.9 < len(loss) <= MAX_POINTS
    assert loss[-1][0] == 5000
    assert loss == sorted(loss, key=lambda point: -point[1])
    assert page["evaluation"]["AP"] == [[5000, None]]
    assert page["gallery"] is None


def test_page_of_an_empty_run(tmp_path):
    assert content(write_training_page(tmp_path))["train"]["loss"] == []


def test_unwritable_page_does_not_stop_training(tmp_path, caplog):
    data, run = write_dataset(tmp_path / "data"), tmp_path / "run"
    (run / "training.html").mkdir(parents=True)
    (run / "gallery").write_text("not a folder")
    assert "AP" in train_model(data, run, tiny_config(epochs=1))
    assert "training.html was not written" in caplog.text
    assert "gallery cannot be written" in caplog.text
