"""The report says what the evaluation says, whatever there is to say, and its pictures are of the worst images."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deformable_detr.cli import main
from deformable_detr.evaluation.compare import evaluate_models, outcome
from deformable_detr.evaluation.evaluator import Evaluated
from deformable_detr.evaluation.metrics import count, figures
from deformable_detr.evaluation.report import MOST_PICTURES, report, write_report
from deformable_detr.runtimes.fused import OptimizedDetector
from deformable_detr.utils.errors import UserError
from tests.support.detections import synthetic
from tests.support.training import tiny_config, write_dataset


def evaluated(truth, results, paths=None):
    counted = count(truth, results)
    metrics = {**figures(counted), "images": len(truth["images"]), "images_per_second": 20.0}
    return Evaluated(metrics, counted, list(results), paths or {}, 1.5, "cpu")


def content(page):
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


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
    printed, told, shown = capsys.readouterr().out, json.loads(table.read_text()), content(page.read_text())
    assert [model["name"] for model in shown["models"]] == ["one", "two"]
    for model, metrics in zip(shown["models"], (told, told["compare"]), strict=True):
        for name, value in model["figures"].items():
            assert value == metrics[name]
        assert {row["name"]: row["AP"] for row in model["classes"]} == metrics["per_class"]
    for name in ("AP", "AR100"):
        assert told["difference"][name] == told["compare"][name] - told[name]
        assert re.search(rf"^{name} +{told[name]:.3f} +{told['compare'][name]:.3f}", printed, re.MULTILINE)
    assert printed.splitlines()[0] == "A: one, B: two"
    assert printed.splitlines()[1].split() == ["A", "B", "B", "−", "A"]
    assert set(told["difference"]["per_class"]) == {"red", "green", "blue"}

    main(["evaluate", str(one), str(data), "--workers", "0", "--device", "cpu", "--json", str(table)])
    alone = json.loads(table.read_text())
    assert "compare" not in alone
    assert {name: alone[name] for name in shown["models"][0]["figures"]} == shown["models"][0]["figures"]

    with pytest.MonkeyPatch.context() as patch:
        asked = []
        original = OptimizedDetector.__init__
        patch.setattr(OptimizedDetector, "__init__", lambda *a, **k: asked.append(a[2]) or original(*a, **k))
        options = ("--precision", "fp32", "--workers", "0", "--device", "cpu", "--json", str(table))
        main(["evaluate", str(one), str(data), *options])
    assert asked == ["fp32"]
    assert json.loads(table.read_text())["AP"] == pytest.approx(alone["AP"], abs=1e-3)


def test_names_tell_models_apart(models, tmp_path):
    from deformable_detr.evaluation.compare import _names

    assert _names([Path("/a/run"), Path("/b/run")]) == ["a/run", "b/run"]
    assert _names([Path("/a/x.onnx")]) == ["x.onnx"]
    one, _, data = models
    both = evaluate_models([one, one], data, workers=0, device="cpu", limit=2)
    assert [name for name, _ in both] == ["one (1)", "one (2)"]
    differences = outcome(both)["difference"]
    assert not any(value for name, value in differences.items() if name.startswith("A"))


@pytest.mark.parametrize("classes", [1, 80])
@pytest.mark.parametrize("what", ["all", "no detections", "no objects"])
def test_always_a_page(tmp_path, classes, what):
    truth, results = synthetic(images=4, classes=classes)
    truth = {**truth, "annotations": []} if what == "no objects" else truth
    one = evaluated(truth, [] if what == "no detections" else results)
    shown = content(report([("model", one)], "set", "val"))
    (model,) = shown["models"]
    assert len(model["classes"]) == len(shown["names"]) == classes
    assert np.array(model["confusion"]["matrix"]).shape == (classes + 1, classes + 1)
    assert (model["best"] is None) == (what != "all")


def test_names_of_classes_cannot_leave_the_data(tmp_path):
    truth, results = synthetic(images=2, classes=2)
    truth["categories"][0]["name"] = "</script><script>alert(1)</script>__STYLE__"
    page = report([("<b>model</b>", evaluated(truth, results))], "a & b", "val")
    assert content(page)["names"][0] == truth["categories"][0]["name"]
    assert page.count("</script>") == 2
    assert "<b>model</b>" not in page.replace(json.dumps("<b>model</b>"), "")


def test_pictures_are_of_the_images_with_the_most_errors(tmp_path):
    truth, results = synthetic(images=25, seed=4)
    paths = {}
    for image in truth["images"]:
        paths[image["id"]] = tmp_path / image["file_name"].replace("jpg", "png")
        Image.new("RGB", (640, 480), (90, 90, 90)).save(paths[image["id"]])
    shown = content(report([("a", evaluated(truth, results, paths)), ("b", evaluated(truth, []))], "set", "val"))
    pictures = shown["pictures"]
    assert len(pictures) == MOST_PICTURES
    errors = [picture["models"][0]["wrong"] + picture["models"][0]["missed"] for picture in pictures]
    assert errors == sorted(errors, reverse=True)
    threshold = shown["models"][0]["best"]["threshold"]
    right = 0
    for picture in pictures:
        assert picture["picture"].startswith("data:image/jpeg;base64,")
        identity = 10 * int(Path(picture["name"]).stem)
        kept = [result for result in results if result["image_id"] == identity and result["score"] >= threshold]
        one, other = picture["models"]
        assert len(one["detections"]) == len(kept)
        assert sum(1 - found[-1] for found in one["detections"]) == one["wrong"]
        assert len(one["found"]) - sum(one["found"]) == one["missed"]
        assert other["missed"] == len(picture["objects"]) == len(other["found"])
        right += sum(one["found"])
    assert right > 20


def test_models_of_other_sets_are_refused():
    one, other = evaluated(*synthetic(classes=2)), evaluated(*synthetic(classes=3))
    with pytest.raises(UserError, match=r"b: other classes or images than a's"):
        report([("a", one), ("b", other)], "set", "val")


def test_places_that_cannot_be_written(models, tmp_path):
    one, _, data = models
    for wrong in (tmp_path / "report.txt", tmp_path):
        with pytest.raises(SystemExit):
            main(["evaluate", str(one), str(data), "--report", str(wrong)])
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        write_report(tmp_path / "folder.html", [("a", evaluated(*synthetic(images=1)))], "set", "val")


@pytest.mark.slow
def test_five_thousand_images_are_quick_and_small(tmp_path):
    import time

    truth, results = synthetic(images=5000, classes=80, objects=7, detections=100, crowds=0.02)
    one = evaluated(truth, results)
    start = time.process_time()
    path = write_report(tmp_path / "large.html", [("a", one), ("b", one)], "set", "val")
    assert time.process_time() - start < 60
    assert path.stat().st_size < 20e6
