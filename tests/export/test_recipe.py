"""The program in docs/export/onnx.md that needs only ONNX Runtime, NumPy and Pillow."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deformable_detr.export import ExportOptions, export_model
from deformable_detr.runtimes.detector import load_exported
from deformable_detr.utils.errors import UserError

PAGE = Path(__file__).parents[2] / "docs" / "export" / "onnx.md"
SIZES = [(64, 48), (97, 131), (300, 40), (40, 300), (96, 96), (640, 427), (33, 35)]  # width, height


def run_recipe(model_file, image, threshold, capsys):
    """Run the program as it stands in the page, but with other files and threshold."""
    text = PAGE.read_text().partition("## Run without this package")[2].partition("```python\n")[2].partition("```")[0]
    changes = {"cards.onnx": str(model_file), "table.jpg": str(image), "threshold=0.5": f"threshold={threshold}"}
    for old, new in changes.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    scope = {}
    exec(compile(text, str(PAGE), "exec"), scope)
    return scope["detect"](image), capsys.readouterr().out


@pytest.mark.parametrize("kind", ["any size", "fixed size", "stretched", "without duplicates"])
def test_recipe_equals_predict(model, exported, tmp_path, capsys, kind):
    file = exported.path
    if kind == "fixed size":
        file = tmp_path / "fixed.onnx"
        export_model(model, file, "onnx", ExportOptions(image_size=(96, 128)))
    elif kind == "stretched":
        model = copy.deepcopy(model)
        model.config = model.config.replace(resize="fixed", image_size=96, image_width=128, max_size=None)
        file = tmp_path / "stretched.onnx"
        with pytest.raises(UserError, match="--image-size 96,96: the model takes 96,128"):
            export_model(model, file, "onnx", ExportOptions(image_size=(96, 96)))
        export_model(model, file, "onnx")
    elif kind == "without duplicates":
        model = copy.deepcopy(model)
        model.config = model.config.replace(nms_iou=0.3)
        with torch.no_grad():
            for head in model.decoder.heads.boxes:
                head.layers[-1].bias[2:] += 1.5  # large boxes, so that they overlap
        file = tmp_path / "distinct.onnx"
        export_model(model, file, "onnx")
    detector = load_exported(file)
    for number, (width, height) in enumerate(SIZES):
        coarse = np.random.default_rng(number).integers(0, 256, (9, 11, 3), dtype=np.uint8)
        path = tmp_path / f"{number}.png"
        Image.fromarray(coarse).resize((width, height)).save(path)
        detections = detector.predict(path, threshold=0)
        if kind == "without duplicates":
            assert len(detections) < model.config.num_queries * model.config.num_classes
        best = detections.scores[:10].numpy()
        cut = 1 + int((best[1:-1] - best[2:]).argmax())  # at the largest gap, so that rounding decides nothing
        threshold = float(best[cut : cut + 2].mean())
        expected = (detector if kind == "fixed size" else model).predict(path, threshold)
        (boxes, scores, labels), printed = run_recipe(file, path, threshold, capsys)
        assert len(scores) == len(expected) >= 2
        assert abs(scores - expected.scores.numpy()).max() < 0.005
        for box, score, label in zip(expected.boxes.numpy(), expected.scores, expected.labels, strict=True):
            same = (labels == int(label)) & (abs(scores - float(score)) < 0.005) & (abs(boxes - box).max(axis=1) < 1)
            assert same.any()
        assert len(printed.splitlines()) == len(expected)
        assert expected.names[0] in printed
