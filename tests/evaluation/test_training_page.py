"""A run's page of curves and gallery: written by the training itself, whole at any time, as its records say."""

import json
import re

import pytest

from deformable_detr.evaluation.gallery import Gallery, read_gallery
from deformable_detr.evaluation.training_page import MAX_POINTS, write_training_page
from deformable_detr.training import train_model
from tests.support.training import tiny_config, write_dataset


def content(page):
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=\"?(https?:)?//", text)
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_training_writes_its_page_and_goes_on_with_it(tmp_path):
    data, run = write_dataset(tmp_path / "data"), tmp_path / "run"
    train_model(data, run, tiny_config(epochs=2))
    shown, records = content(run / "training.html"), lines(run)
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    assert shown["evaluation"]["AP"] == [[record["step"], record["AP"]] for record in evaluations]
    train = [record for record in records if record["kind"] == "train" and record["step"] <= evaluations[-1]["step"]]
    for name in ("loss", "loss_class", "lr"):
        assert [step for step, _ in shown["train"][name]] == [record["step"] for record in train]
        assert [value for _, value in shown["train"][name]] == pytest.approx([row[name] for row in train], rel=1e-4)
    gallery = shown["gallery"]
    assert [one["step"] for one in gallery["evaluations"]] == [record["step"] for record in evaluations]
    assert [image["name"] for image in gallery["images"]] == ["0.png", "1.png", "2.png", "3.png"]
    assert all(image["image"].startswith("data:image/jpeg;base64,") for image in gallery["images"])
    assert gallery["names"] == ["red", "green", "blue"]

    train_model(data, run, tiny_config(epochs=3), resume=True)
    assert len(content(run / "training.html")["evaluation"]["AP"]) == 3
    assert not list(run.rglob("*.tmp"))


class Few:
    """As much of a data set as a gallery asks for."""

    categories = ()

    def __init__(self, count):
        import numpy as np

        self.image_ids = np.arange(count) * 3


def test_a_step_that_was_evaluated_twice_counts_once(tmp_path, monkeypatch):
    from deformable_detr.evaluation import gallery
    from deformable_detr.structures import Category

    monkeypatch.setattr(
        gallery, "_describe_images", lambda _, __, ids: {"ids": list(ids), "names": ["a"], "images": []}
    )
    dataset = Few(10)
    dataset.categories = (Category(7, "a"),)
    dataset.__class__.__len__ = lambda self: len(self.image_ids)  # pyright: ignore[reportAttributeAccessIssue]
    box = {"image_id": 27, "category_id": 7, "bbox": [1, 2, 3, 4]}
    for step, score in ((5, 0.9), (10, 0.8), (10, 0.7), (15, 0.01)):
        Gallery(tmp_path, step, 1)(dataset, [{**box, "score": score}])  # pyright: ignore[reportArgumentType]
    with open(tmp_path / "gallery" / "predictions.jsonl", "a") as file:
        file.write('{"step": 20, "ima')  # killed here
    found = read_gallery(tmp_path, [10, 15, 20])
    assert found is not None
    assert found["ids"] == [0, 6, 12, 15, 21, 27]
    assert [one["step"] for one in found["evaluations"]] == [10, 15]
    assert found["evaluations"][0]["images"][-1] == [[1, 2, 3, 4, 0, 0.7]]
    assert found["evaluations"][1]["images"][-1] == []


def test_long_runs_are_thinned_and_strange_records_left_out(tmp_path):
    with open(tmp_path / "metrics.jsonl", "w") as file:
        for step in range(1, 5001):
            loss = float("nan") if step == 3 else 5000.0 - step
            file.write(json.dumps({"kind": "train", "step": step, "epoch": 0, "loss": loss, "lr": 1e-4}) + "\n")
        file.write(json.dumps({"kind": "evaluation", "step": 5000, "AP": None, "AP50": 0.5}) + "\n")
        file.write('{"kind": "train", "step": 50')
    shown = content(write_training_page(tmp_path))
    loss = shown["train"]["loss"]
    assert MAX_POINTS * 0.9 < len(loss) <= MAX_POINTS
    assert loss[-1][0] == 5000
    assert loss == sorted(loss, key=lambda point: -point[1])
    assert shown["evaluation"]["AP"] == [[5000, None]]
    assert shown["gallery"] is None


def test_a_run_that_has_not_begun(tmp_path):
    assert content(write_training_page(tmp_path))["train"]["loss"] == []


def test_a_page_that_cannot_be_written_does_not_end_the_run(tmp_path, caplog):
    data, run = write_dataset(tmp_path / "data"), tmp_path / "run"
    (run / "training.html").mkdir(parents=True)
    (run / "gallery").write_text("not a folder")
    assert "AP" in train_model(data, run, tiny_config(epochs=1))
    assert "training.html was not written" in caplog.text
    assert "gallery cannot be written" in caplog.text
