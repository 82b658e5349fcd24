"""Very small models to export, with weights that make every part matter."""

import json

import torch

from deformable_detr.config.schema import ModelConfig
from deformable_detr.detector import DeformableDETR
from tests.support.datasets import write_image

NAMES, IDS = ('cat "1"', "häuser & <dogs>", "c"), (7, 3, 90)


def tiny(**changes):
    """Return a model with one level, one layer of each kind and a four-block ResNet; two-stage unless changed."""
    base = {
        "backbone_shape": {"block": "basic", "depths": (1, 1, 1, 1), "widths": (8, 8, 16, 16), "stem": 8},
        "backbone_weights": "none", "num_feature_levels": 1, "hidden_dim": 16, "num_heads": 2, "encoder_layers": 1,
        "decoder_layers": 1, "ffn_dim": 32, "num_queries": 12, "num_classes": 3, "class_names": NAMES,
        "category_ids": IDS, "image_size": 96, "refine": True, "two_stage": True, "query_init": "encoder",
        "class_aware_proposals": True, "pixel_mean": (0.4, 0.5, 0.6), "pixel_std": (0.2, 0.25, 0.3),
    }  # fmt: skip
    return randomized(DeformableDETR(ModelConfig.from_dict({**base, **changes})))


def randomized(model, spread=0.15):
    """Randomize heads, offsets and batch norm statistics, which initialization leaves constant, in eval mode."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("heads", "sampling_offsets.weight", "attention_weights", "class")):
                parameter += spread * torch.randn(parameter.shape, generator=generator)
        for name, buffer in model.named_buffers():
            if "running_mean" in name:
                buffer += 0.1 * torch.randn(buffer.shape, generator=generator)
            elif "running_var" in name:
                buffer *= 0.5 + torch.rand(buffer.shape, generator=generator)
    return model.eval()


def write_pseudo_labeled_dataset(root, model, images=3):
    """Write a COCO dataset of noise images, labeled with the model's best detections, so that AP is not zero."""
    for split, seed in (("train", 100), ("valid", 0)):
        content = {"images": [], "annotations": []}
        content["categories"] = [{"id": i, "name": n} for i, n in zip(IDS, NAMES, strict=True)]
        for number in range(1, images + 1):
            path = write_image(root / split / f"{number}.png", (100 + 20 * number, 90), seed=seed + number)
            content["images"].append({"id": number, "file_name": path.name, "width": 100 + 20 * number, "height": 90})
            for detection in model.predict(path, threshold=0, top_k=4).to_coco(number):
                area = detection["bbox"][2] * detection["bbox"][3]
                annotation = {**detection, "id": len(content["annotations"]) + 1, "area": area, "iscrowd": 0}
                content["annotations"].append(annotation)
        (root / split / "_annotations.coco.json").write_text(json.dumps(content))
    return root
