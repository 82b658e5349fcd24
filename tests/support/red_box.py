"""A stand-in with the detector's interface that finds the one red rectangle of an image."""

import torch
from torch import nn

from deformable_detr.config.schema import ModelConfig
from deformable_detr.predict.predictor import Detector


class RedBoxFinder(Detector):
    """The first query finds the red rectangle, label 1, score 0.9; the others have falling scores below 0.5."""

    def __init__(self, **config):
        super().__init__()
        base = {"num_classes": 2, "class_names": ("green", "red"), "category_ids": (3, 17), "image_size": 64}
        self.config = ModelConfig(**{**base, "backbone_weights": "none", "num_queries": 5, **config})
        self.register_buffer("pixel_mean", torch.tensor([0.4, 0.5, 0.6]))
        self.register_buffer("pixel_std", torch.tensor([0.2, 0.25, 0.3]))
        self.frozen, self.moving = nn.Dropout(0.5), nn.Dropout(0.5)
        self.input_shapes = []

    def forward(self, pixels, padding_mask=None, return_attention=False):
        assert not self.training
        assert not torch.is_grad_enabled()
        self.input_shapes.append(tuple(pixels.shape))
        B, Q, K = len(pixels), self.config.num_queries, self.config.num_classes
        assert not pixels.masked_select(padding_mask[:, None]).any()
        colors = pixels * self.pixel_std[:, None, None] + self.pixel_mean[:, None, None]
        red = (colors[:, 0] > 0.5) & (colors[:, 1] < 0.5) & ~padding_mask
        logits = torch.linspace(-1, -2, Q)[None, :, None].repeat(B, 1, K)
        boxes = torch.full((B, Q, 4), 0.5)
        for i in range(B):
            height, width = (~padding_mask[i]).any(1).sum(), (~padding_mask[i]).any(0).sum()
            ys, xs = red[i].nonzero(as_tuple=True)
            if len(ys):
                x1, y1, x2, y2 = xs.min(), ys.min(), xs.max() + 1, ys.max() + 1
                box = [(x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height]
                boxes[i, 0] = torch.stack(box)
                logits[i, 0] = -9.0
                logits[i, 0, 1 % K] = torch.logit(torch.tensor(0.9))
        return {"pred_logits": logits, "pred_boxes": boxes}
