"""The report shows the numbers of the evaluation and the images with the most errors."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deformable_detr.cli import main
from deformable_detr.evaluation.evaluator import compare_metrics, evaluate_models
from deformable_detr.evaluation.report import MAX_IMAGES, render_report, write_report
from deformable_detr.runtimes.fused import OptimizedDetector
from deformable_detr.utils.errors import UserError
from tests.support.detections import evaluation_result, page_data, synthetic_detections
from tests.support.training import tiny_config, write_dataset


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models of random weights and a data set."""
    from deformable_detr.detector import DeformableDETR

    folder = tmp_path_factory.mktemp("models")
    data = write_dataset(folder / "data", val=6)
    classes = {"class_names": ("red", "green", "blue"), "category_ids": (10, 20, 30)}
    for name in ("one", "two"):
        DeformableDETR(tiny_config().updated({"model": classes}, "test").model).save_pretrained(folder / name)
    return folder / "one", folder / "two", data


def test_numbers_are_the_evaluations(models, tmp_path, capsys):
    one, two, data = models
    page, table = tmp_path / "report.html", tmp_path / "figures.json"
    options = ["--workers", "0", "--device", "cpu", "--report", str(page), "--json", str(table)]
    main(["evaluate", str(one), str(data), *options, "--compare", str(two)])
    printed, told, shown = capsys.readouterr().out, json.loads(table.read_text()), page_data(page.read_text())
    assert [model["name"] for model in shown["models"]] == [str(one), str(two)]
    for model, metrics in zip(shown["models"], (told, told["compare"]), strict=True):
        for name, value in model["metrics"].items():
            assert value == metrics[name]
        assert {row["name"]: row["AP"] for row in model["classes"]} == metrics["per_class"]
    for name in ("AP", "AR100"):
        assert told["difference"][name] == told["compare"][name] - told[name]
        assert re.search(rf"^{name} +{told[name]:.3f} +{told['compare'][name]:.3f}", printed, re.MULTILINE)
    assert printed.splitlines()[0] == f"A: {one}, B: {two}"
    assert printed.splitlines()[1].split() == ["A", "B", "B", "−", "A"]
    assert set(told["difference"]["per_class"]) == {"red", "green", "blue"}

    main(["evaluate", str(one), str(data), "--workers", "0", "--device", "cpu", "--json", str(table)])
    alone = json.loads(table.read_text())
    assert "compare" not in alone
    assert {name: alone[name] for name in shown["models"][0]["metrics"]} == shown["models"][0]["metrics"]

    with pytest.MonkeyPatch.context() as patch:
        asked = []
        original = OptimizedDetector.__init__
        patch.setattr(OptimizedDetector, "__init__", lambda *a, **k: asked.append(a[2]) or original(*a, **k))
        options = ("--precision", "fp32", "--workers", "0", "--device", "cpu", "--json", str(table))
        main(["evaluate", str(one), str(data), *options])
    assert asked == ["fp32"]
    assert json.loads(table.read_text())["AP"] == pytest.approx(alone["AP"], abs=1e-3)


def test_the_same_model_has_no_differences(models):
    one, _, data = models
    results = evaluate_models([one, one], data, workers=0, device="cpu", limit=2)
    assert [result.name for result in results] == [str(one), str(one)]
    differences = compare_metrics(results)["difference"]
    assert not any(value for name, value in differences.items() if name.startswith("A"))


@pytest.mark.parametrize("classes", [1, 80])
@pytest.mark.parametrize("what", ["all", "no detections", "no objects"])
def test_always_a_page(tmp_path, classes, what):
    truth, results = synthetic_detections(images=4, classes=classes)
    truth = {**truth, "annotations": []} if what == "no objects" else truth
    result = evaluation_result(truth, [] if what == "no detections" else results)
    shown = page_data(render_report([result], "set", "val"))
    (model,) = shown["models"]
    assert len(model["classes"]) == len(shown["names"]) == classes
    assert np.array(model["confusion"]["matrix"]).shape == (classes + 1, classes + 1)
    assert (model["best"] is None) == (what != "all")


def test_names_of_classes_cannot_leave_the_data(tmp_path):
    truth, results = synthetic_detections(images=2, classes=2)
    truth["categories"][0]["name"] = "</script><script>alert(1)</script>__STYLE__"
    page = render_report([evaluation_result(truth, results, name="<b>model</b>")], "a & b", "val")
    assert page_data(page)["names"][0] == truth["categories"][0]["name"]
    assert page.count("</script>") == 2
    assert "<b>model</b>" not in page.replace(json.dumps("<b>model</b>"), "")


def test_images_with_the_most_errors_are_shown(tmp_path):
    truth, results = synthetic_detections(images=25, seed=4)
    paths = {}
    for image in truth["images"]:
        paths[image["id"]] = tmp_path / image["file_name"].replace("jpg", "png")
        Image.new("RGB", (640, 480), (90, 90, 90)).save(paths[image["id"]])
    shown = page_data(
        render_report([evaluation_result(truth, results, paths), evaluation_result(truth, [])], "set", "val")
    )
    images = shown["worst"]
    assert len(images) == MAX_IMAGES
    errors = [image["models"][0]["wrong"] + image["models"][0]["missed"] for image in images]
    assert errors == sorted(errors, reverse=True)
    threshold = shown["models"][0]["best"]["threshold"]
    right = 0
    for image in images:
        assert image["image"].startswith("data:image/jpeg;base64,")
        identity = 10 * int(Path(image["name"]).stem)
        kept = [result for result in results if result["image_id"] == identity and result["score"] >= threshold]
        one, other = image["models"]
        assert len(one["detections"]) == len(kept)
        assert sum(1 - found[-1] for found in one["detections"]) == one["wrong"]
        assert len(one["found"]) - sum(one["found"]) == one["missed"]
        assert other["missed"] == len(image["objects"]) == len(other["found"])
        right += sum(one["found"])
    assert right > 20


def test_models_of_other_sets_are_refused():
    results = [evaluation_result(*synthetic_detections(classes=classes), name=f"m{classes}") for classes in (2, 3)]
    with pytest.raises(UserError, match="m3: its classes or images differ from those of m2"):
        render_report(results, "set", "val")


def test_places_that_cannot_be_written(models, tmp_path):
    one, _, data = models
    for wrong in (tmp_path / "report.txt", tmp_path):
        with pytest.raises(SystemExit):
            main(["evaluate", str(one), str(data), "--report", str(wrong)])
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        write_report(tmp_path / "folder.html", [evaluation_result(*synthetic_detections(images=1))], "set", "val")


@pytest.mark.slow
def test_five_thousand_images_are_quick_and_small(tmp_path):
    import time

    truth, results = synthetic_detections(images=5000, classes=80, objects=7, detections=100, crowds=0.02)
    result = evaluation_result(truth, results)
    start = time.process_time()
    path = write_report(tmp_path / "large.html", [result, result], "set", "val")
    assert time.process_time() - start < 60
    assert path.stat().st_size < 20e6
