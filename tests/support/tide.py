"""The error types of tidecv, the package of TIDE's authors."""

import sys
from unittest.mock import MagicMock

import pytest

from .mask_scenes import compressed, decoded


def tide_reference(truth, results, monkeypatch, masks=False):
    """Return tidecv's AP50 and gains of boxes or masks in percent, with its plotting libraries mocked."""
    pytest.importorskip("pycocotools")
    for name in ("cv2", "seaborn", "pandas", "appdirs", "matplotlib.pyplot"):
        monkeypatch.setitem(sys.modules, name, MagicMock())
    tidecv = pytest.importorskip("tidecv", reason="needs tidecv, the reference of TIDE", exc_type=ImportError)
    objects, detections = tidecv.Data("truth"), tidecv.Data("detections")
    for category in truth["categories"]:
        objects.add_class(category["id"], category["name"])
    for image in truth["images"]:
        objects.add_image(image["id"], str(image["id"]))
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]} if masks else {}
    for row in truth["annotations"]:
        mask = [compressed(decoded(row["segmentation"], sizes[row["image_id"]]))] if masks else []
        add = objects.add_ignore_region if row["iscrowd"] else objects.add_ground_truth
        add(row["image_id"], row["category_id"], row["bbox"], *mask)
    for row in results:
        mask = [row["segmentation"]] if masks else []
        detections.add_detection(row["image_id"], row["category_id"], row["score"], row["bbox"], *mask)
    run = tidecv.TIDE()
    run.evaluate(objects, detections, mode=tidecv.TIDE.MASK if masks else tidecv.TIDE.BOX)
    errors = run.get_all_errors()
    return next(iter(run.runs.values())).ap, errors["main"]["detections"], errors["special"]["detections"]
