"""A few validation images and what was found in them, evaluation by evaluation: a folder beside the run's figures."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ..data.dataset import CocoDataset

log = logging.getLogger(__name__)

FOLDER = "gallery"
MOST_IMAGES = 6
LONGEST_SIDE = 480  # of a picture, in pixels
MOST_BOXES = 20  # an image, the best
LEAST_SCORE = 0.05


class Gallery:
    """Adds the detections of one evaluation to the gallery of a run; to be called with the data set and the results.

    folder: of the run. step, epoch: when the evaluation was.
    """

    def __init__(self, folder: Path, step: int, epoch: int) -> None:
        self.folder, self.step, self.epoch = folder / FOLDER, step, epoch

    def __call__(self, dataset: CocoDataset, results: Sequence[dict[str, Any]]) -> None:
        try:
            self._add(dataset, results)
        except OSError as error:  # the run goes on without it
            log.warning("the gallery in %s was not written: %s", self.folder, error.strerror or error)

    def _add(self, dataset: CocoDataset, results: Sequence[dict[str, Any]]) -> None:
        from ..utils.files import replace_file

        places = np.unique(
            np.linspace(0, len(dataset) - 1, min(MOST_IMAGES, len(dataset))).round().astype(int)
        ).tolist()
        identities = [int(dataset.image_ids[place]) for place in places]
        described = self.folder / "images.json"
        if _ids(described) != identities:
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_file(described, json.dumps(_describe(dataset, places, identities), ensure_ascii=False))
        labels = {category.id: label for label, category in enumerate(dataset.categories)}
        found: dict[int, list[list[float]]] = defaultdict(list)
        wanted = set(identities)
        for result in results:
            if result["image_id"] in wanted and result["score"] >= LEAST_SCORE:
                box = [round(value, 1) for value in result["bbox"]]
                found[result["image_id"]].append([*box, labels[result["category_id"]], round(result["score"], 3)])
        best = [sorted(found[identity], key=lambda one: -one[-1])[:MOST_BOXES] for identity in identities]
        record = {"step": self.step, "epoch": self.epoch, "ids": identities, "images": best}
        with open(self.folder / "predictions.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def read_gallery(folder: Path, steps: Sequence[int]) -> dict[str, Any] | None:
    """The gallery of a run: its images.json with "evaluations", of the steps only; of a step that was evaluated twice,
    because work was lost, the last. None where there is none.
    """
    described = folder / FOLDER / "images.json"
    try:
        content = json.loads(described.read_text(encoding="utf-8"))
        lines = (folder / FOLDER / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, ValueError):
        return None
    kept, wanted = {}, set(steps)
    for line in lines:
        try:
            record = json.loads(line)
            if record["step"] in wanted and record["ids"] == content["ids"]:
                kept[record["step"]] = {key: record[key] for key in ("step", "epoch", "images")}
        except (ValueError, KeyError, TypeError):
            continue  # cut where a process was killed
    return {**content, "evaluations": [kept[step] for step in sorted(kept)]}


def _ids(described: Path) -> list[int] | None:
    try:
        return json.loads(described.read_text(encoding="utf-8"))["ids"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _describe(dataset: CocoDataset, places: Sequence[int], identities: Sequence[int]) -> dict[str, Any]:
    """The images with their objects: [x, y, w, h, label], crowds left out."""
    from PIL import Image

    from ..utils.images import read_image
    from ..visualize.web.html import picture

    labels = {category.id: label for label, category in enumerate(dataset.categories)}
    objects: dict[int, list[list[float]]] = {identity: [] for identity in identities}
    for annotation in dataset.ground_truth["annotations"]:
        if annotation["image_id"] in objects and not annotation["iscrowd"]:
            box = [round(float(value), 1) for value in annotation["bbox"]]
            objects[annotation["image_id"]].append([*box, labels[annotation["category_id"]]])
    images = []
    for place, identity in zip(places, identities, strict=True):
        image = Image.fromarray(read_image(dataset.path(place)).permute(1, 2, 0).numpy())
        images.append(
            {"name": dataset.path(place).name, "width": image.width, "height": image.height,
             "picture": picture(image, LONGEST_SIDE), "objects": objects[identity]}
        )  # fmt: skip
    return {"ids": list(identities), "names": [category.name for category in dataset.categories], "images": images}
