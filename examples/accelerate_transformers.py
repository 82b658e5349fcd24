"""Ten lines that make a transformers model faster: python examples/accelerate_transformers.py [HUB_ID_OR_FOLDER]

Without a model it makes a Deformable DETR with random weights; the time is the same.
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
def timed() -> tuple[torch.Tensor, float]:
    """Boxes (1, Q, 4) and the best of five times in seconds."""
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        boxes = model(pixels).pred_boxes
        seconds.append(time.perf_counter() - start)
    return boxes, min(seconds)


boxes, before = timed()
changed = ops.accelerate(model)  # this is all
faster_boxes, after = timed()
ops.restore(model)  # and as it was

print(f"{len(changed)} layers changed; {before * 1e3:.0f} ms before, {after * 1e3:.0f} ms after")
print(f"{before / after:.1f} times as fast; boxes differ by {(boxes - faster_boxes).abs().max():.1e}")
