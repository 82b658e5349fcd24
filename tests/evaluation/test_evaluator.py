"""Evaluation of a model on a dataset: known detections give known metrics for any batch size and workers."""

import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from deformable_detr import evaluate
from deformable_detr.config.image_size import ShortestEdge
from deformable_detr.config.schema import DataConfig, ModelConfig
from deformable_detr.evaluation import coco_metrics, evaluate_dataset, evaluator
from deformable_detr.utils.errors import UserError
from tests.support.red_box import RedBoxFinder

BOXES = {11: [40, 20, 100, 80], 5: [10, 30, 90, 100], 300: [60, 0, 160, 120], 42: [0, 0, 50, 50], 8: None}


def write_red_boxes(root, split="val", category=17, categories=((17, "red"), (3, "green"))):
    """Write images with at most one red rectangle each; ids have gaps and are out of order."""
    folder = root / split
    folder.mkdir(parents=True)
    images, annotations = [], []
    for number, box in BOXES.items():
        pixels = np.full((120, 160, 3), 230, np.uint8)
        if box:
            x1, y1, x2, y2 = box
            pixels[y1:y2, x1:x2] = (200, 10, 20)
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": number,
                    "category_id": category,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                }
            )
        Image.fromarray(pixels).save(folder / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": 160, "height": 120})
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": category_id, "name": name} for category_id, name in categories],
    }
    (folder / "_annotations.coco.json").write_text(json.dumps(content))
    return root


def red_box_finder():
    return RedBoxFinder(image_size=120)  # the original size, so that boxes match exactly


def test_known_detections_give_known_metrics(tmp_path):
    model = red_box_finder().train()
    metrics = evaluate(model, write_red_boxes(tmp_path), workers=0, progress=False)
    assert metrics["AP"] == pytest.approx(1.0)
    assert metrics["AR1"] == pytest.approx(1.0)
    assert metrics["AP_small"] is None
    assert metrics["per_class"] == {"green": None, "red": pytest.approx(1.0)}
    assert metrics["images"] == 5
    assert metrics["images_per_second"] > 0
    assert json.loads(json.dumps(metrics)) == metrics
    assert model.training
    assert model.moving.training


def test_categories_are_matched_by_name_if_ids_differ(tmp_path, caplog):
    root = write_red_boxes(tmp_path, category=3, categories=((3, "red"), (0, "green")))
    metrics = evaluate(red_box_finder(), root, workers=0, progress=False)
    assert metrics["per_class"] == {"green": None, "red": pytest.approx(1.0)}
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "classes have other ids than in the model, such as 'green' 0 instead of 3; names decide"
    ]


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (3, 0), (8, 1)])
def test_batch_size_and_workers_do_not_change_metrics(tmp_path, batch_size, workers):
    model = RedBoxFinder(image_size=50)  # boxes are slightly off, so AP is below 1
    root = write_red_boxes(tmp_path)
    metrics = evaluate(model, root, batch_size=batch_size, workers=workers, progress=False)
    baseline = evaluate(model, root, batch_size=2, workers=0, progress=False)
    assert 0.3 < metrics["AP"] < 1
    assert {**metrics, "images_per_second": 0} == {**baseline, "images_per_second": 0}
    assert sum(shape[0] for shape in model.input_shapes) == 10


def test_wrong_class_lowers_ap(tmp_path):
    metrics = evaluate(red_box_finder(), write_red_boxes(tmp_path, category=3), workers=0, progress=False)
    assert metrics["per_class"]["red"] is None
    assert metrics["per_class"]["green"] < 0.5


def test_limit_evaluates_only_some_images(tmp_path):
    model = red_box_finder()
    metrics = evaluate(model, write_red_boxes(tmp_path), limit=2, batch_size=2, workers=0, progress=False)
    assert metrics["images"] == 2
    assert metrics["AR100"] == pytest.approx(1.0)
    assert sum(shape[0] for shape in model.input_shapes) == 2
    unlimited = evaluate(model, tmp_path, limit=99, workers=0, progress=False)
    assert unlimited["images"] == 5


def test_split_and_data_config_are_used(tmp_path):
    write_red_boxes(tmp_path, split="elsewhere")
    data_config = DataConfig(val_images="elsewhere", val_annotations="elsewhere/_annotations.coco.json")
    assert evaluate(red_box_finder(), tmp_path, data_config=data_config, workers=0, progress=False)["images"] == 5
    write_red_boxes(tmp_path, split="test")
    assert evaluate(red_box_finder(), tmp_path, split="test", workers=0, progress=False)["images"] == 5
    with pytest.raises(UserError):
        evaluate(red_box_finder(), tmp_path, workers=0, progress=False)


def test_classes_missing_in_the_model_are_reported(tmp_path):
    root = write_red_boxes(tmp_path, category=8, categories=((17, "red"), (8, "blue")))
    with pytest.raises(UserError, match="8"):
        evaluate(red_box_finder(), root, workers=0, progress=False)
    unnamed = RedBoxFinder(image_size=120, num_classes=1, class_names=(), category_ids=())
    with pytest.raises(UserError, match="the dataset has 2 classes, but the model 1"):
        evaluate(unnamed, root, workers=0, progress=False)


def test_model_without_category_ids_uses_the_order_of_the_dataset(tmp_path):
    """Label 1 is the second id; extra class logits are ignored."""
    model = RedBoxFinder(image_size=120, num_classes=6, class_names=(), category_ids=())
    assert evaluate(model, write_red_boxes(tmp_path), workers=0, progress=False)["per_class"]["red"] == pytest.approx(
        1.0
    )


@pytest.mark.parametrize("option", ["limit", "batch_size"])
def test_invalid_options_are_reported(tmp_path, option):
    with pytest.raises(UserError, match=f"{option} 0: must be at least 1"):
        evaluate(red_box_finder(), write_red_boxes(tmp_path), workers=0, progress=False, **{option: 0})


def test_broken_image_is_reported(tmp_path):
    root = write_red_boxes(tmp_path)
    (root / "val" / "300.png").write_bytes(b"no png")
    model = red_box_finder().train()
    with pytest.raises(UserError, match=r"300\.png"):
        evaluate(model, root, workers=1, progress=False)
    assert model.moving.training


def test_metrics_equal_those_of_predict(tmp_path, caplog):
    """`predict` and `evaluate` preprocess equally."""
    from deformable_detr import DeformableDETR
    from deformable_detr.data.dataset import open_dataset

    torch.manual_seed(0)
    caplog.set_level(logging.ERROR)
    config = ModelConfig(
        backbone="resnet10t", backbone_weights="none", hidden_dim=32, num_heads=2, encoder_layers=1, decoder_layers=1,
        ffn_dim=64, num_queries=60, image_size=64, num_classes=2, class_names=("green", "red"), category_ids=(3, 17),
        refine=True, two_stage=True,
    )  # fmt: skip
    model = DeformableDETR(config)
    model.save_pretrained(tmp_path / "model")
    root = write_red_boxes(tmp_path / "data")

    metrics = evaluate(str(tmp_path / "model"), root, batch_size=1, workers=0, progress=False, device="cpu")

    dataset = open_dataset(root, split="val")
    results = []
    for index, number in enumerate(BOXES):
        results += model.predict(dataset.path(index), threshold=0.0).to_coco(number)
    assert len(results) == 5 * 100
    expected = coco_metrics(dataset.ground_truth, results)
    assert 0 < metrics["AR100"] < 1  # a random model detects something by chance
    assert {name: metrics[name] for name in expected} == expected


def test_progress_bar_counts_images(tmp_path, monkeypatch, capsys):
    from deformable_detr.data.dataset import open_dataset
    from deformable_detr.data.transforms import EvalTransform

    dataset = open_dataset(write_red_boxes(tmp_path), split="val", transform=EvalTransform(ShortestEdge(120, 200)))
    evaluate_dataset(red_box_finder(), dataset, workers=0, progress=True)
    assert capsys.readouterr().err == ""  # no bar without a terminal
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    evaluate_dataset(red_box_finder(), dataset, workers=0, progress=True)
    assert "5/5" in capsys.readouterr().err
    evaluate_dataset(red_box_finder(), dataset, workers=0, progress=False)
    assert capsys.readouterr().err == ""


def test_killed_loader_process_is_reported_in_one_line(tmp_path, monkeypatch):
    from deformable_detr.evaluation import evaluate

    def killed(*_):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    monkeypatch.setattr(evaluator, "detect_images", killed)
    with pytest.raises(
        UserError, match=r"was killed \(SIGKILL\), .* fewer --workers \(now 3;.*--batch-size \(now 2\)$"
    ):
        evaluate(red_box_finder(), write_red_boxes(tmp_path), batch_size=2, workers=3)
