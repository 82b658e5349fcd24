"""Measure AP and time on large canvases: without tiles, with tiles, and with SAHI's slicing and merging.

    pip install sahi
    python benchmarks/tiles.py runs/cells DATA --tile 320 --scales 0.3,1,3 --sahi --json tiles.json

The validation images of DATA, scaled by the factors, fill canvases. All three use the same model and score threshold;
SAHI runs with its defaults and its own pass over the whole image. Below a threshold of 0.1 it merges by NMS and IoU,
above by GREEDYNMM and the overlap over the smaller area.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from deformable_detr import load_detector
from deformable_detr.data.dataset import open_dataset
from deformable_detr.evaluation.metrics import run_coco_eval, summarize
from deformable_detr.structures import Detections
from deformable_detr.utils.files import write_json

GAP = 4  # pixels between images


def write_canvases(data: Path, folder: Path, count: int, side: int, scales: list[float], seed: int) -> dict[str, Any]:
    """Write canvases in rows of images of one scale each, and return their COCO dict."""
    random = np.random.default_rng(seed)
    dataset = open_dataset(data, "val")
    truth: dict[str, Any] = {"images": [], "annotations": []}
    truth["categories"] = [{"id": category.id, "name": category.name} for category in dataset.categories]
    for number in range(1, count + 1):
        canvas, top = Image.new("RGB", (side, side), (114, 114, 114)), 0
        while top < side:
            scale, left, height = scales[int(random.integers(len(scales)))], 0, 0
            while left < side:
                image, target = dataset.load(int(random.integers(len(dataset))))
                picture = Image.fromarray(image.permute(1, 2, 0).numpy())
                size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
                if left + size[0] > side or top + size[1] > side:
                    break
                canvas.paste(picture.resize(size, Image.Resampling.LANCZOS), (left, top))
                boxes = (target.boxes * target.boxes.new_tensor([*size, *size])).tolist()
                for (x, y, w, h), label in zip(boxes, target.labels.tolist(), strict=True):
                    truth["annotations"].append(
                        {
                            "id": len(truth["annotations"]) + 1, "image_id": number, "area": w * h, "iscrowd": 0,
                            "category_id": dataset.categories[label].id,
                            "bbox": [left + x - w / 2, top + y - h / 2, w, h],
                        }
                    )  # fmt: skip
                left, height = left + size[0] + GAP, max(height, size[1])
            top += height + GAP if height else side // 8  # too large for the rest of the canvas
        path = folder / f"{number}.png"
        canvas.save(path)
        truth["images"].append({"id": number, "file_name": str(path), "height": side, "width": side})
    return truth


def sahi_predictor(model: Any, options: argparse.Namespace) -> Callable[[str], list[dict[str, Any]]]:
    """Return a function from a file to COCO results by SAHI around the detector."""
    from sahi.models.base import DetectionModel  # pyright: ignore[reportMissingImports]
    from sahi.predict import get_sliced_prediction  # pyright: ignore[reportMissingImports]
    from sahi.prediction import ObjectPrediction  # pyright: ignore[reportMissingImports]

    class Wrapped(DetectionModel):
        def load_model(self) -> None:
            self.set_model(model)

        def set_model(self, model: Any, **kwargs: Any) -> None:
            self.model = model
            self.category_mapping = {str(i): name for i, name in enumerate(model.config.class_names)}

        def perform_inference(self, image: np.ndarray) -> None:
            self._original_predictions = model.predict(np.ascontiguousarray(image), options.threshold, options.top_k)

        def _create_object_prediction_list_from_original_predictions(
            self, shift_amount_list: Any = None, full_shape_list: Any = None
        ) -> None:
            shift = (shift_amount_list or [[0, 0]])[0]
            found: Detections = self._original_predictions  # pyright: ignore[reportAssignmentType]
            self._object_prediction_list_per_image = [
                [
                    ObjectPrediction(
                        bbox=box, category_id=label, score=score, category_name=name, shift_amount=shift,
                        full_shape=full_shape_list[0] if full_shape_list and isinstance(full_shape_list[0], list)
                        else full_shape_list,
                    )
                    for box, label, score, name in zip(
                        found.boxes.tolist(), found.labels.tolist(), found.scores.tolist(), found.names, strict=True
                    )
                ]
            ]  # fmt: skip

    wrapped = Wrapped(model=model, device="cpu", confidence_threshold=options.threshold, load_at_init=True)

    def predict(path: str) -> list[dict[str, Any]]:
        result = get_sliced_prediction(
            path, wrapped, slice_height=options.tile, slice_width=options.tile, verbose=0,
            overlap_height_ratio=options.overlap, overlap_width_ratio=options.overlap,
        )  # fmt: skip
        return [
            {
                "category_id": model.config.category_ids[item.category.id], "score": float(item.score.value),
                "bbox": [float(side) for side in item.bbox.to_xywh()],
            }
            for item in result.object_prediction_list
        ]  # fmt: skip

    return predict


def measure(name: str, truth: dict[str, Any], predict: Callable[[str], list[dict[str, Any]]]) -> dict[str, Any]:
    """Predict all canvases and return the metrics and seconds per canvas."""
    start, results = time.perf_counter(), []
    for image in truth["images"]:
        results += [{**row, "image_id": image["id"]} for row in predict(image["file_name"])]
    seconds = (time.perf_counter() - start) / len(truth["images"])
    metrics = summarize(run_coco_eval(truth, results, tiled=True))
    keys = ("AP", "AP50", "AP_small", "AP_medium", "AP_large")
    row = {"method": name, "seconds": seconds, "detections": len(results), **{key: metrics[key] for key in keys}}
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--canvases", type=int, default=4)
    parser.add_argument("--side", type=int, default=4000)
    parser.add_argument("--scales", default="0.3,1,3", help="factors of the images, one per row of a canvas")
    parser.add_argument("--tile", type=int, default=640)
    parser.add_argument("--overlap", type=float, default=0.2)
    parser.add_argument("--threshold", type=float, default=0.05)
    parser.add_argument("--top-k", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sahi", action="store_true", help="also measure SAHI")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    model = load_detector(options.model, "cpu").optimize()

    def detect(path: str, tile: int | None) -> list[dict[str, Any]]:
        tiles: dict[str, Any] = {"tile": tile, "tile_overlap": options.overlap}
        return model.predict(path, options.threshold, options.top_k, **tiles).to_coco(0)

    with tempfile.TemporaryDirectory() as folder:
        scales = [float(scale) for scale in options.scales.split(",")]
        truth = write_canvases(options.data, Path(folder), options.canvases, options.side, scales, options.seed)
        rows = [
            measure("whole image", truth, lambda path: detect(path, None)),
            measure("tiles", truth, lambda path: detect(path, options.tile)),
        ]
        if options.sahi:
            rows.append(measure("SAHI", truth, sahi_predictor(model, options)))
    if options.json is not None:
        write_json(options.json, {"options": {k: str(v) for k, v in vars(options).items()}, "rows": rows})


if __name__ == "__main__":
    main()
