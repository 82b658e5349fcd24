"""The demo's data: held-out digits on held-out photographs, tight boxes, reproducible."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from deformable_detr import UserError, demo
from deformable_detr.data.dataset import open_dataset


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "data"
    demo.make_data(folder, train_images=12, val_images=6)
    return folder


def file_hashes(folder):
    return {path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*.*")}


def test_data_is_reproducible_from_the_seed(data, tmp_path):
    demo.make_data(tmp_path / "repeated", train_images=12, val_images=6)
    assert file_hashes(tmp_path / "repeated") == file_hashes(data)
    demo.make_data(tmp_path / "other", train_images=12, val_images=6, seed=1)
    assert file_hashes(tmp_path / "other") != file_hashes(data)


def test_data_is_a_readable_dataset(data):
    for split, count in (("train", 12), ("val", 6)):
        dataset = open_dataset(data, split=split)
        assert len(dataset) == count
        assert [category.name for category in dataset.categories] == list("0123456789")
        for image, target in (dataset[i] for i in range(count)):
            assert {image.shape[1], image.shape[2]} <= set(demo.SIDES)
            assert 1 <= len(target.labels) <= demo.MAX_DIGITS


def test_boxes_are_inside_disjoint_and_of_the_stated_size(data):
    for split in ("train", "valid"):
        truth = json.loads((data / split / "_annotations.coco.json").read_text())
        for image in truth["images"]:
            boxes = [a["bbox"] for a in truth["annotations"] if a["image_id"] == image["id"]]
            coverage = np.zeros((image["height"], image["width"]), int)
            for x, y, w, h in boxes:
                assert min(x, y) >= 0
                assert x + w <= image["width"]
                assert y + h <= image["height"]
                assert demo.DIGIT_HEIGHTS[0] * 0.8 <= h <= demo.DIGIT_HEIGHTS[1] * 1.25
                coverage[y : y + h, x : x + w] += 1
            assert coverage.max() == 1


def test_box_is_tight_around_its_ink():
    glyph = demo._glyph(np.pad(np.ones((6, 2)), ((1, 1), (3, 3))), np.random.default_rng(0))
    x1, y1, x2, y2 = glyph.box
    inked = glyph.ink > 0.5
    assert inked[y1:y2, x1:x2].sum() == inked.sum() > 0
    for edge in (inked[y1, x1:x2], inked[y2 - 1, x1:x2], inked[y1:y2, x1], inked[y1:y2, x2 - 1]):
        assert edge.any()


def test_validation_data_is_not_in_training(monkeypatch, tmp_path):
    splits = {}

    def record(folder, glyphs, values, photos, count, seed):
        splits[folder.name] = ({glyph.tobytes() for glyph in glyphs}, {photo.tobytes() for photo in photos})

    monkeypatch.setattr(demo, "_write_split", record)
    demo.make_data(tmp_path)
    for kind in (0, 1):
        assert splits["train"][kind]
        assert splits["valid"][kind]
        assert not splits["train"][kind] & splits["valid"][kind]


def test_folder_with_other_files_is_rejected(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious.txt").touch()
    with pytest.raises(UserError, match="another folder"):
        demo.run(tmp_path)
    assert (tmp_path / "run" / "precious.txt").exists()


def test_earlier_demo_is_replaced(tmp_path):
    out = tmp_path / "demo"
    demo._claim_folder(out)
    (out / "run").mkdir()
    (out / "run" / "config.yaml").touch()
    demo._claim_folder(out)
    assert not (out / "run").exists()


@pytest.mark.parametrize(("ap50", "code"), [(0.69, 1), (0.70, None), (float("nan"), 1)])
def test_low_ap_is_a_failure(monkeypatch, tmp_path, capsys, ap50, code):
    """Training is mocked; only the result of the evaluation matters."""
    import deformable_detr.evaluation
    import deformable_detr.training.trainer
    from deformable_detr import DeformableDETR
    from tests.support.red_box import RedBoxFinder

    make_data = demo.make_data
    monkeypatch.setattr(demo, "make_data", lambda folder: make_data(folder, train_images=2, val_images=3))
    monkeypatch.setattr(deformable_detr.training.trainer, "train_model", lambda data, out, config: {"AP50": 1.0})
    monkeypatch.setattr(deformable_detr.evaluation, "evaluate", lambda model, data: {"AP": ap50 / 2, "AP50": ap50})
    monkeypatch.setattr(DeformableDETR, "from_pretrained", lambda folder: Finder())

    class Finder(RedBoxFinder):
        def predict(self, source, threshold):
            from deformable_detr.predict.predictor import predict

            return predict(self, source, threshold)

    exit_code = None
    try:
        assert demo.run(tmp_path / "demo")["AP50"] == ap50
    except SystemExit as end:
        exit_code = end.code
    assert exit_code == code
    captured = capsys.readouterr()
    assert f"AP50 {ap50:.3f}" in captured.out
    assert "train DATA --out" in captured.out
    assert ("training did not converge" in captured.err) == (code == 1)
    assert len(list((tmp_path / "demo" / "pictures").glob("*.png"))) == 3
    assert Image.open(tmp_path / "demo" / "pictures.png").width > 320
