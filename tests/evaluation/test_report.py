"""The report shows the metrics of the evaluation and the images with the most errors."""

import html
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deformable_detr.cli import main
from deformable_detr.data.dataset import open_dataset
from deformable_detr.evaluation.evaluator import compare_metrics, evaluate_models
from deformable_detr.evaluation.report import MAX_IMAGES, render_report, write_report
from deformable_detr.runtimes.fused import OptimizedDetector
from deformable_detr.utils.errors import UserError
from deformable_detr.utils.rle import encode_masks
from tests.support.detections import evaluation_result, page_data, synthetic_detections
from tests.support.masks import same_shape, write_triangles
from tests.support.training import tiny_config, write_dataset


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models with random weights, and a dataset."""
    from deformable_detr.detector import DeformableDETR

    folder = tmp_path_factory.mktemp("models")
    data = write_dataset(folder / "data", val=6)
    classes = {"class_names": ("red", "green", "blue"), "category_ids": (10, 20, 30)}
    for name in ("one", "two"):
        DeformableDETR(tiny_config().updated({"model": classes}, "test").model).save_pretrained(folder / name)
    return folder / "one", folder / "two", data


def test_report_shows_the_metrics_of_the_evaluation(models, tmp_path, capsys):
    one, two, data = models
    page, table = tmp_path / "report.html", tmp_path / "metrics.json"
    options = ["--workers", "0", "--device", "cpu", "--report", str(page), "--json", str(table)]
    main(["evaluate", str(one), str(data), *options, "--compare", str(two)])
    out, table_data, page_json = capsys.readouterr().out, json.loads(table.read_text()), page_data(page.read_text())
    assert [model["name"] for model in page_json["models"]] == [str(one), str(two)]
    for model, metrics in zip(page_json["models"], (table_data, table_data["compare"]), strict=True):
        for name, value in model["metrics"].items():
            assert value == metrics[name]
        assert {row["name"]: row["AP"] for row in model["classes"]} == metrics["per_class"]
    for name in ("AP", "AR100"):
        assert table_data["difference"][name] == table_data["compare"][name] - table_data[name]
        assert re.search(rf"^{name} +{table_data[name]:.3f} +{table_data['compare'][name]:.3f}", out, re.MULTILINE)
    assert out.splitlines()[0] == f"A: {one}, B: {two}"
    assert out.splitlines()[1].split() == ["A", "B", "B", "−", "A"]
    assert set(table_data["difference"]["per_class"]) == {"red", "green", "blue"}

    main(["evaluate", str(one), str(data), "--workers", "0", "--device", "cpu", "--json", str(table)])
    single = json.loads(table.read_text())
    assert "compare" not in single
    assert {name: single[name] for name in page_json["models"][0]["metrics"]} == page_json["models"][0]["metrics"]

    with pytest.MonkeyPatch.context() as patch:
        precisions = []
        original = OptimizedDetector.__init__
        patch.setattr(OptimizedDetector, "__init__", lambda *a, **k: precisions.append(a[2]) or original(*a, **k))
        options = ("--precision", "fp32", "--workers", "0", "--device", "cpu", "--json", str(table))
        main(["evaluate", str(one), str(data), *options])
    assert precisions == ["fp32"]
    assert json.loads(table.read_text())["AP"] == pytest.approx(single["AP"], abs=1e-3)


def test_comparing_a_model_with_itself_gives_zero_differences(models):
    one, _, data = models
    results = evaluate_models([one, one], data, workers=0, device="cpu", limit=2)
    assert [result.name for result in results] == [str(one), str(one)]
    differences = compare_metrics(results)["difference"]
    assert not any(value for name, value in differences.items() if name.startswith("A"))


@pytest.mark.parametrize("classes", [1, 80])
@pytest.mark.parametrize("scenario", ["all", "no detections", "no objects"])
def test_degenerate_reports(tmp_path, classes, scenario):
    truth, results = synthetic_detections(images=4, classes=classes)
    truth = {**truth, "annotations": []} if scenario == "no objects" else truth
    result = evaluation_result(truth, [] if scenario == "no detections" else results)
    page_json = page_data(render_report([result], "set", "val"))
    (model,) = page_json["models"]
    assert len(model["classes"]) == len(page_json["names"]) == classes
    assert np.array(model["confusion"]["matrix"]).shape == (classes + 1, classes + 1)
    assert (model["best"] is None) == (scenario != "all")


def test_class_names_are_escaped(tmp_path):
    truth, results = synthetic_detections(images=2, classes=2)
    truth["categories"][0]["name"] = "</script><script>alert(1)</script>__STYLE__"
    page = render_report([evaluation_result(truth, results, name="<b>model</b>")], "a & b", "val")
    assert page_data(page)["names"][0] == truth["categories"][0]["name"]
    assert page.count("</script>") == 2
    assert "<b>model</b>" not in page.replace(json.dumps("<b>model</b>"), "")


def test_images_with_the_most_errors_are_listed(tmp_path):
    truth, results = synthetic_detections(images=25, seed=4)
    paths = {}
    for image in truth["images"]:
        paths[image["id"]] = tmp_path / image["file_name"].replace("jpg", "png")
        Image.new("RGB", (640, 480), (90, 90, 90)).save(paths[image["id"]])
    page_json = page_data(
        render_report([evaluation_result(truth, results, paths), evaluation_result(truth, [])], "set", "val")
    )
    images = page_json["worst"]
    assert len(images) == MAX_IMAGES
    errors = [image["models"][0]["wrong"] + image["models"][0]["missed"] for image in images]
    assert errors == sorted(errors, reverse=True)
    threshold = page_json["models"][0]["best"]["threshold"]
    correct = 0
    for image in images:
        assert image["image"].startswith("data:image/jpeg;base64,")
        image_id = 10 * int(Path(image["name"]).stem)
        above_threshold = [
            result for result in results if result["image_id"] == image_id and result["score"] >= threshold
        ]
        first, second = image["models"]
        assert len(first["detections"]) == len(above_threshold)
        assert sum(1 - detection[-1] for detection in first["detections"]) == first["wrong"]
        assert len(first["found"]) - sum(first["found"]) == first["missed"]
        assert second["missed"] == len(image["objects"]) == len(second["found"])
        correct += sum(first["found"])
    assert correct > 20


def test_models_of_different_datasets_are_rejected():
    results = [evaluation_result(*synthetic_detections(classes=classes), name=f"m{classes}") for classes in (2, 3)]
    with pytest.raises(UserError, match="m3: its classes or images differ from those of m2"):
        render_report(results, "set", "val")


def test_unwritable_report_paths_are_rejected(models, tmp_path):
    one, _, data = models
    for path in (tmp_path / "report.txt", tmp_path):
        with pytest.raises(SystemExit):
            main(["evaluate", str(one), str(data), "--report", str(path)])
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        write_report(tmp_path / "folder.html", [evaluation_result(*synthetic_detections(images=1))], "set", "val")


@pytest.mark.slow
def test_report_of_5000_images_is_fast_and_small(tmp_path):
    import time

    truth, results = synthetic_detections(images=5000, classes=80, objects=7, detections=100, crowds=0.02)
    result = evaluation_result(truth, results)
    start = time.process_time()
    path = write_report(tmp_path / "large.html", [result, result], "set", "val")
    assert time.process_time() - start < 60
    assert path.stat().st_size < 20e6


@pytest.mark.parametrize("size", [(120, 160), (960, 1280)])
def test_images_have_masks(tmp_path, size):
    """At the size of the page's images; without masks, the page is the same otherwise."""
    masks = write_triangles(tmp_path, size)
    dataset = open_dataset(tmp_path, split="val", masks=True)
    boxes = [annotation["bbox"] for annotation in dataset.ground_truth["annotations"][:2]]
    results = [
        {"image_id": 5, "category_id": 7, "bbox": box, "score": score, "segmentation": rle}
        for box, score, rle in zip(boxes, (0.5, 0.75), encode_masks(masks), strict=True)
    ]
    [corner] = encode_masks(masks[1:, ::-1])
    wrong = {**results[1], "bbox": [size[1] / 2, 0, 30, 30], "score": 0.6, "segmentation": corner}
    unlisted = {**results[0], "category_id": 8}
    arguments = dataset.ground_truth, [unlisted, *results, wrong], {5: dataset.path(0)}
    content, plain = (
        page_data(render_report([evaluation_result(*arguments, masks=masks)], "set", "val")) for masks in (True, False)
    )
    for view in (content, content["masks"]):
        [image] = view["worst"]
        objects, detections = image["objects"], image["models"][0]["detections"]
        rles = [row.pop() for row in (*objects[:2], *detections)]
        assert all(map(same_shape, rles, [*masks, masks[0], masks[1][::-1], masks[1]]))
        assert all(max(rle["size"]) == min(size[1], 640) for rle in rles)
        without, crowd = objects[2].pop(), objects[3].pop()
        assert not any(same_shape(rle, mask) for rle, mask in ((without, masks[1]), (crowd, masks[0])))
    assert content["worst"] == plain["worst"]


def test_notebooks_show_the_report(models):
    one, _, data = models
    (result,) = evaluate_models([one], data, device="cpu", workers=0)
    frame = re.fullmatch(r'<iframe srcdoc="([^"]*)" .*</iframe>', result._repr_html_(), re.DOTALL)
    assert frame
    page = html.unescape(frame[1])
    assert page == render_report([result], "data", "val")
    assert page_data(page)["models"][0]["metrics"]["AP"] == result.metrics["AP"]
    assert repr(result) == f"EvaluationResult({one} on 6 images: AP {result.metrics['AP']:.3f}, " + (
        f"AP50 {result.metrics['AP50']:.3f})"
    )
