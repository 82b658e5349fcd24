"""Metrics of masks: equal to pycocotools' and, for the error types, to tidecv's; models with and without masks."""

import contextlib
import copy
import io
import json
import re
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from PIL import Image

from deformable_detr import evaluate
from deformable_detr.cli.evaluate import metrics_table
from deformable_detr.config.schema import TrainConfig
from deformable_detr.evaluation import coco_metrics, evaluate_dataset, evaluate_models
from deformable_detr.evaluation.analysis import analyze, match
from deformable_detr.evaluation.evaluator import (
    compare_metrics,
    detect_images,
    evaluate_distributed,
    open_eval_dataset,
)
from deformable_detr.evaluation.metrics import run_coco_eval
from deformable_detr.evaluation.report import render_report
from deformable_detr.training.logger import TrainingLogger, TrainState
from deformable_detr.utils.errors import UserError
from tests.support.detections import page_data
from tests.support.mask_scenes import compressed, decoded, masked_scene, uncompressed
from tests.support.red_box import RedBoxFinder
from tests.support.tide import tide_reference

METRICS = [
    "AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
    "AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large",
]  # fmt: skip
SIZE = (40, 60)


def pycocotools_metrics(ground_truth, results):
    """Return the 12 metrics of masks and AP per class; results without boxes, as detectron2 passes them."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    without_boxes = [{key: value for key, value in result.items() if key != "bbox"} for result in results]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(ground_truth)
        truth.createIndex()
        evaluator = COCOeval(truth, truth.loadRes(copy.deepcopy(without_boxes)), "segm")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    precision = evaluator.eval["precision"][:, :, :, 0, 2]
    per_class = [precision[:, :, k][precision[:, :, k] > -1] for k in range(precision.shape[2])]
    stats = [None if value == -1 else value for value in evaluator.stats]
    return stats, [float(values.mean()) if values.size else None for values in per_class]


def close(values):
    return [None if value is None else pytest.approx(value, rel=0, abs=1e-9) for value in values]


def rectangle(x, y, width, height, size=SIZE):
    mask = np.zeros(size, bool)
    mask[y : y + height, x : x + width] = True
    return mask


def scene(*segmentations, **fields):
    """Return a scene of one image whose objects have these masks, and a perfect detection of each that has one."""
    boxes = [[5 + 18 * k, 5, 12, 20] for k in range(len(segmentations))]
    annotations = [
        {"id": k + 1, "image_id": 1, "category_id": 1, "bbox": box, "area": 240, "iscrowd": 0, "segmentation": shape}
        for k, (box, shape) in enumerate(zip(boxes, segmentations, strict=True))
    ]
    results = [
        {"image_id": 1, "category_id": 1, "bbox": box, "score": 0.9, "segmentation": compressed(rectangle(*box))}
        for box in boxes
    ]
    image = {"id": 1, "height": SIZE[0], "width": SIZE[1], **fields}
    return {"images": [image], "categories": [{"id": 1, "name": "cat"}], "annotations": annotations}, results


@pytest.mark.parametrize("seed", range(20))
def test_masks_match_pycocotools(seed):
    ground_truth, results = masked_scene(seed)
    before = copy.deepcopy((ground_truth, results))
    metrics = coco_metrics(ground_truth, results, masks=True)
    assert (ground_truth, results) == before
    expected, per_class = pycocotools_metrics(ground_truth, results)
    masks = metrics.pop("segm")
    assert list(masks) == [*METRICS, "per_class"]
    assert [masks[name] for name in METRICS] == close(expected)
    assert list(masks["per_class"].values()) == close(per_class)
    assert 0 < masks["AP"] < 0.9
    assert metrics == coco_metrics(ground_truth, results)
    assert metrics["AP"] != masks["AP"]


def test_masks_match_pycocotools_on_coco(shared):
    ground_truth = json.loads((shared / "data" / "coco_mini" / "val" / "_annotations.coco.json").read_text())
    sizes = {image["id"]: (image["height"], image["width"]) for image in ground_truth["images"]}
    ground_truth["annotations"] = [row for row in ground_truth["annotations"] if row.get("segmentation")]
    rng = np.random.default_rng(0)
    results = []
    for row in ground_truth["annotations"][:400]:
        mask = decoded(row["segmentation"], sizes[row["image_id"]])
        moved = np.roll(mask, tuple(rng.integers(-4, 5, 2)), axis=(0, 1))
        results.append({**row, "segmentation": compressed(moved), "score": round(float(rng.random()), 2)})
    masks = coco_metrics(ground_truth, results, masks=True)["segm"]
    expected, per_class = pycocotools_metrics(ground_truth, results)
    assert [masks[name] for name in METRICS] == close(expected)
    assert list(masks["per_class"].values()) == close(per_class)
    assert masks["AP"] > 0.05


@pytest.mark.parametrize("missing", [None, [], [[]], [[1.0, 2.0]], {}])
def test_objects_without_a_mask_count_as_crowds_for_masks_only(missing):
    shape = compressed(rectangle(5, 5, 12, 20))
    ground_truth, results = scene(shape, missing)
    metrics = coco_metrics(ground_truth, results, masks=True)
    assert metrics["segm"]["AP"] == pytest.approx(1)  # the second detection is neither correct nor wrong
    assert metrics["AP"] == pytest.approx(1)
    assert metrics["AR1"] == pytest.approx(0.5)
    assert metrics["segm"]["AR1"] == pytest.approx(1)
    elsewhere = {**results[1], "segmentation": compressed(rectangle(20, 28, 12, 10)), "score": 0.95}
    assert coco_metrics(ground_truth, [results[0], elsewhere], masks=True)["segm"]["AP"] == pytest.approx(0.5)


def test_sizes_are_those_of_masks():
    """A thin diagonal object of a large box is small, and so is a wrong detection of that shape."""
    size = (200, 200)
    line = np.eye(200, dtype=bool)
    ground_truth = scene(compressed(line), height=200, width=200)[0]
    ground_truth["annotations"][0] |= {"bbox": [0, 0, 200, 200], "area": 200}
    results = [{"image_id": 1, "category_id": 1, "bbox": [0, 0, 200, 200], "score": score, "segmentation": rle}
               for score, rle in ((0.9, compressed(line)), (0.95, compressed(np.fliplr(line))))]  # fmt: skip
    masks = coco_metrics(ground_truth, results, masks=True)["segm"]
    assert size == tuple(results[0]["segmentation"]["size"])
    assert masks["AP_small"] == pytest.approx(0.5)  # 1 if the wrong one had the area of its box
    assert [masks[name] for name in METRICS] == close(pycocotools_metrics(ground_truth, results)[0])


@pytest.mark.parametrize("fields", [{"height": None, "width": None}, {"height": 20, "width": 30}])
def test_detected_masks_have_the_size_of_the_image(fields):
    polygons = ([[x, 5, x + 12, 5, x + 12, 25, x, 25]] for x in (5.0, 23.0))
    ground_truth, results = scene(*polygons, **fields)
    assert coco_metrics(ground_truth, results, masks=True)["segm"]["AP"] == pytest.approx(1)
    assert coco_metrics(ground_truth, results[:1], masks=True)["segm"]["AR100"] == pytest.approx(0.5)


def test_no_detections_and_no_objects():
    ground_truth, results = scene(compressed(rectangle(5, 5, 12, 20)))
    assert coco_metrics(ground_truth, [], masks=True)["segm"]["AP"] == 0
    assert coco_metrics({**ground_truth, "annotations": []}, results, masks=True)["segm"]["AP"] is None
    assert coco_metrics({**ground_truth, "images": [], "annotations": []}, [], masks=True)["segm"]["AP"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda truth, results: results[0].pop("segmentation"), "detection number 0 has no mask"),
        (lambda truth, results: results[1]["segmentation"].update(size=[9, 8]), "detection number 1: its mask has"),
        (lambda truth, results: results[1]["segmentation"].update(counts="!"), "detection number 1: its mask is dam"),
        (lambda truth, results: truth["annotations"][1]["segmentation"].update(size=[9, 8]),
         "annotation 2: its mask has 9×8 pixels, but the image has 40×60"),
        (lambda truth, results: truth["annotations"][1]["segmentation"].update(counts=[9999]),
         "annotation 2: its mask is damaged: invalid RLE"),
    ],
)  # fmt: skip
def test_damaged_masks_are_reported(change, message):
    ground_truth, results = scene([[5.0, 5, 17, 5, 17, 25, 5, 25]], uncompressed(rectangle(23, 5, 12, 20)))
    change(ground_truth, results)
    coco_metrics(ground_truth, results)  # boxes alone are complete
    with pytest.raises(UserError, match=re.escape(message)):
        coco_metrics(ground_truth, results, masks=True)


def tide_scene(seed):
    """Return a scene without ties of scores, whose order is tidecv's own, without empty masks and without crowds."""
    truth, results = masked_scene(seed, objects=40, spurious=30)
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    for row in truth["annotations"]:
        row["iscrowd"] = 0
    truth["annotations"] = [
        row for row in truth["annotations"] if decoded(row["segmentation"], sizes[row["image_id"]]).any()
    ]
    rng = np.random.default_rng(seed)
    return truth, [{**row, "score": float(rng.random())} for row in results]


@pytest.mark.parametrize("seed", [3, 4, 8])  # tidecv rounds recalls such as 0.29 differently, so 20 objects differ
def test_tide_matches_the_package_of_its_authors(seed, monkeypatch):
    truth, results = tide_scene(seed)
    ap, gains, special = tide_reference(truth, results, monkeypatch, masks=True)
    errors = analyze(run_coco_eval(truth, results, "segm"))["errors"]
    assert 100 * errors["AP50"] == pytest.approx(ap, abs=1e-9)
    for error in errors["types"]:
        assert 100 * error["gain"] == pytest.approx(gains[error["type"]], abs=1e-9), error["type"]
    assert 100 * errors["false_positives"] == pytest.approx(special["FalsePos"], abs=1e-9)
    assert 100 * errors["false_negatives"] == pytest.approx(special["FalseNeg"], abs=1e-9)


def test_matches_are_those_of_masks():
    """Two detections have the box of an object; only the mask of one is like the object's."""
    ground_truth, results = scene(compressed(np.triu(np.ones(SIZE, bool), 5)))
    lower = {**results[0], "segmentation": compressed(~np.triu(np.ones(SIZE, bool), 5)), "score": 0.95}
    upper = {**results[0], "segmentation": ground_truth["annotations"][0]["segmentation"]}
    assert match(run_coco_eval(ground_truth, [lower, upper])).hits.tolist() == [True, False]
    assert match(run_coco_eval(ground_truth, [lower, upper], "segm")).hits.tolist() == [False, True]


class RedMaskFinder(RedBoxFinder):
    """Finds the red object and, as its mask, the red cells at stride 4; other queries have empty masks."""

    def __init__(self, **config):
        super().__init__(**{"masks": True, "image_size": 120, **config})

    def forward(self, pixels, padding_mask=None, return_attention=False):
        outputs = super().forward(pixels, padding_mask)
        colors = pixels * self.pixel_std[:, None, None] + self.pixel_mean[:, None, None]
        red = (colors[:, 0] > 0.5) & (colors[:, 1] < 0.5) & ~padding_mask
        masks = torch.full((len(pixels), self.config.num_queries, pixels.shape[2] // 4, pixels.shape[3] // 4), -1.0)
        masks[:, 0] = torch.nn.functional.avg_pool2d(red[:, None].float(), 4)[:, 0] - 0.5
        return {**outputs, "pred_masks": masks}


def write_red_ellipses(root, masks=True):
    """Write five images with a red ellipse each, as polygon or RLE if `masks`."""
    folder = root / "val"
    folder.mkdir(parents=True)
    images, annotations = [], []
    for number in range(5):
        size = (120, 160) if number % 2 else (160, 120)
        y, x = np.mgrid[: size[0], : size[1]]
        mask = ((y - 60) / 30) ** 2 + ((x - 50) / (20 + 5 * number)) ** 2 <= 1
        Image.fromarray(np.where(mask[:, :, None], (200, 10, 20), 230).astype(np.uint8)).save(folder / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": size[1], "height": size[0]})
        rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
        box = [columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]]
        angles = np.linspace(0, 2 * np.pi, 60)
        points = np.stack([50.5 + (20 + 5 * number) * np.cos(angles), 60.5 + 30 * np.sin(angles)], axis=1)
        segmentation = uncompressed(mask) if number % 2 else [points.flatten().tolist()]
        annotations.append(
            {"id": number, "image_id": number, "category_id": 17, "bbox": [int(v) for v in box],
             "area": int(mask.sum()), "iscrowd": 0, **({"segmentation": segmentation} if masks else {})}
        )  # fmt: skip
    categories = [{"id": 17, "name": "red"}, {"id": 3, "name": "green"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "_annotations.coco.json").write_text(json.dumps(content))
    return root


def test_known_masks_give_known_metrics(tmp_path):
    (result,) = evaluate_models([RedMaskFinder()], write_red_ellipses(tmp_path), workers=0, batch_size=2)
    assert result.metrics["AP50"] == pytest.approx(1)
    assert 0.8 < result.metrics["segm"]["AP"] <= 1
    assert result.metrics["segm"]["per_class"]["green"] is None
    assert list(result.metrics)[-3:] == ["segm", "images", "images_per_second"]
    assert all(row["segmentation"]["size"] in ([120, 160], [160, 120]) for row in result.results)
    assert analyze(result.coco_masks)["metrics"]["AP50"] == pytest.approx(1)

    inverted = RedMaskFinder()
    forward = inverted.forward
    inverted.forward = lambda *a, **k: {**(out := forward(*a, **k)), "pred_masks": -out["pred_masks"]}
    metrics = evaluate(inverted, tmp_path, workers=0)
    assert metrics["AP50"] == pytest.approx(1)
    assert metrics["segm"]["AP50"] == 0


def test_boxes_alone_are_evaluated_without_masks_of_the_model_or_the_dataset(tmp_path, caplog):
    root = write_red_ellipses(tmp_path / "masks")
    (result,) = evaluate_models([RedMaskFinder(masks=False)], root, workers=0)
    assert "segm" not in result.metrics
    assert result.coco_masks is None
    assert not caplog.records
    boxes = write_red_ellipses(tmp_path / "boxes", masks=False)
    (result,) = evaluate_models([RedMaskFinder()], boxes, workers=0)
    assert "segm" not in result.metrics
    assert [record.getMessage().partition(" ")[2] for record in caplog.records] == [
        "has no masks: only boxes are evaluated"
    ]


def test_processes_evaluate_as_one(tmp_path, monkeypatch):
    """Rank 0 gets the results of all processes, also their masks."""
    model, root = RedMaskFinder(), write_red_ellipses(tmp_path)
    dataset = open_eval_dataset(model, root)
    expected = evaluate_dataset(model, dataset, workers=0).metrics
    parts = [detect_images(model, dataset, 5, 2, 0, False, shard=(rank, 2))[0] for rank in range(2)]
    context = MagicMock(rank=0, world_size=2)
    context.all_gather_object = lambda part: parts[::-1]
    context.on_rank_zero = lambda function: function()
    metrics = evaluate_distributed(model, dataset, 2, 0, context)
    assert {**metrics, "images_per_second": 0} == {**expected, "images_per_second": 0}


def test_report_and_table_show_boxes_and_masks(tmp_path):
    root = write_red_ellipses(tmp_path)
    masked, boxed = RedMaskFinder(image_size=60), RedMaskFinder(masks=False)
    results = evaluate_models([masked, boxed], root, workers=0)
    page = page_data(render_report(results, "set", "val"))
    assert [model["metrics"]["AP"] for model in page["models"]] == [result.metrics["AP"] for result in results]
    (model,) = page["masks"]["models"]
    assert model["metrics"]["AP"] == results[0].metrics["segm"]["AP"]
    assert model["errors"]["AP50"] == pytest.approx(model["metrics"]["AP50"])
    assert page_data(render_report(results[1:], "set", "val"))["masks"] is None

    table = " ".join(metrics_table(results[0].metrics).split())
    assert f"mask AP50 {results[0].metrics['segm']['AP50']:.3f} " in table
    assert f"mask AP of red {results[0].metrics['segm']['per_class']['red']:.3f}" in table
    again = compare_metrics([results[0], results[0]])
    assert again["difference"]["segm"]["AP"] == 0
    assert again["difference"]["segm"]["per_class"]["red"] == 0
    assert "segm" not in compare_metrics(results)["difference"]
    assert "mask AP" in metrics_table(*(result.metrics for result in results))


def test_mask_ap_selects_the_best_model():
    state = TrainState()
    assert state.record_evaluation({"AP": 0.5, "segm": {"AP": 0.2}})
    assert not state.record_evaluation({"AP": 0.9, "segm": {"AP": 0.1}})
    assert state.record_evaluation({"AP": 0.4, "segm": {"AP": 0.3}})
    assert state.best_ap == 0.3
    boxes = TrainState()
    assert boxes.record_evaluation({"AP": 0.5})
    assert not boxes.record_evaluation({"AP": 0.4})


def test_training_logs_mask_ap(tmp_path, capsys):
    logger = TrainingLogger(TrainConfig(), tmp_path)
    state = TrainState(step=3, seconds=1.0)
    state.record_evaluation({"AP": 0.5, "AP50": 0.6, "segm": {"AP": 0.25, "AP50": 0.7, "per_class": {"red": 0.25}}})
    with logger.open(state):
        logger.log_evaluation(state)
        logger.print_epoch(state, 0.5)
    assert "AP 0.500, AP50 0.600, mask AP 0.250, best mask AP 0.250," in capsys.readouterr().err
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["segm"]["AP50"] == 0.7
    assert page_data((tmp_path / "training.html").read_text())["evaluation"]["mask_AP"] == [[3, 0.25]]
