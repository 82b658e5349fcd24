"""Masks without a model that learned them: an ellipse with a hole in each box."""

import torch


def ellipses(boxes, height, width):
    """Return mask logits (N, height, width) of boxes (N, 4) cxcywh in cells of the grid, three cells wide at least."""
    x, y = torch.arange(width) + 0.5, torch.arange(height)[:, None] + 0.5
    cx, cy, w, h = boxes[:, :, None, None].unbind(1)
    distance = ((x - cx) * 2 / w.clamp(min=3)) ** 2 + ((y - cy) * 2 / h.clamp(min=3)) ** 2
    return torch.minimum(1 - distance, distance - 0.1)


def with_masks(model):
    """Let a detector predict masks at stride 4 of its canvas, in place, and return it."""

    def add_masks(_, inputs, outputs):
        pixels, padding_mask = inputs[:2]
        height, width = pixels.shape[2] // 4, pixels.shape[3] // 4
        valid = ~padding_mask
        content = torch.stack([valid[:, 0].float().mean(1) * width, valid[:, :, 0].float().mean(1) * height], dim=1)
        boxes = outputs["pred_boxes"] * content.repeat(1, 2)[:, None]
        return {**outputs, "pred_masks": torch.stack([ellipses(image, height, width) for image in boxes])}

    model.register_forward_hook(add_masks)
    model.config = model.config.model_copy(update={"masks": True})
    return model
