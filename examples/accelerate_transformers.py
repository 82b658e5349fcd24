"""Accelerate a transformers model: python examples/accelerate_transformers.py [HUB_ID_OR_FOLDER]

Without a model, the example creates a Deformable DETR with random weights.
"""

import sys
import time

import torch
from transformers import AutoModelForObjectDetection, DeformableDetrConfig, DeformableDetrForObjectDetection

from deformable_detr import ops

if len(sys.argv) > 1:
    model = AutoModelForObjectDetection.from_pretrained(sys.argv[1]).eval()
else:
    model = DeformableDetrForObjectDetection(DeformableDetrConfig(use_pretrained_backbone=False)).eval()
pixels = torch.rand(1, 3, 480, 640)


@torch.inference_mode()
def predict_boxes() -> tuple[torch.Tensor, float]:
    """Return boxes (1, Q, 4) and the shortest of five times in seconds."""
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        boxes = model(pixels).pred_boxes
        seconds.append(time.perf_counter() - start)
    return boxes, min(seconds)


boxes, before = predict_boxes()
changed = ops.accelerate(model)
faster_boxes, after = predict_boxes()
ops.restore(model)

print(f"{len(changed)} layers changed: {before * 1e3:.0f} ms before, {after * 1e3:.0f} ms after")
print(f"speedup {before / after:.1f}×; boxes differ by at most {(boxes - faster_boxes).abs().max():.1e}")
