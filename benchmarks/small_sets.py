"""Compare what detectors learn from small datasets, at equal images or equal minutes, with the same backbone weights.

Ours, torchvision's Faster R-CNN and FCOS, and transformers' RT-DETR and D-FINE see the same batches: our loader, our
augmentation, the same order. Peers have their own losses, AdamW, linear warm-up, cosine decay, two frozen stages and
frozen batch norms. `--lr` is their learning rate; choose it per peer and dataset from 2.5e-4, 5e-4 and 1e-3.

    python benchmarks/small_sets.py DATA… --backbone-weights WEIGHTS --out small_sets.json
    python benchmarks/small_sets.py DATA… --backbone-weights WEIGHTS --minutes 13 --methods ours --out small_sets.json
    python benchmarks/small_sets.py --table --out small_sets.json

Existing runs of the file are kept, and not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import FeaturePyramidNetwork, box_convert
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from deformable_detr import train
from deformable_detr.config import presets
from deformable_detr.config.detector import AdapterConfig
from deformable_detr.config.schema import Config, DataConfig, TrainConfig
from deformable_detr.data.dataloader import Batch, LoaderOptions, build_dataloader
from deformable_detr.data.dataset import CocoDataset, open_dataset
from deformable_detr.data.transforms import EvalTransform, train_transform
from deformable_detr.evaluation.metrics import coco_metrics
from deformable_detr.model.backbone import Backbone
from deformable_detr.structures import ImageBatch
from deformable_detr.training.trainer import train_model

BACKBONE = "tf_efficientnet_lite0"
MEAN, STD = torch.tensor([0.5] * 3), torch.tensor([0.5] * 3)  # timm's values for the backbone
LR, BACKBONE_LR_MULT, WARMUP_STEPS, CLIP, WEIGHT_DECAY = 5e-4, 0.2, 100, 1.0, 1e-4
WIDTH, BOX_HEAD_WIDTH = 128, 512
METHODS = ("ours", "faster-rcnn", "fcos", "d-fine", "rt-detr")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="*")
    parser.add_argument("--backbone-weights", default="none", help="a safetensors file")
    parser.add_argument("--image-size", type=int, default=192)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--minutes", type=float, help="minutes of training steps instead of epochs")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--lr", type=float, default=LR, help="of the peers")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", action="store_true", help="only print the results of the file")
    options = parser.parse_args()
    runs = json.loads(options.out.read_text()) if options.out.exists() else []
    if not options.table:
        torch.set_num_threads(options.threads)
        for data in options.data:
            for seed in options.seeds:
                for method in options.methods:
                    add_run(runs, options, data, method, seed)
    print(table(runs))


def add_run(runs: list[dict[str, Any]], options: argparse.Namespace, data: str, method: str, seed: int) -> None:
    run = {
        "data": Path(data).name, "method": method, "seed": seed, "image_size": options.image_size,
        "epochs": None if options.minutes else options.epochs, "minutes": options.minutes,
        "batch_size": options.batch_size, "lr": None if method == "ours" else options.lr,
    }  # fmt: skip
    if any(run.items() <= old.items() for old in runs):
        return
    runners = {"ours": train_ours, "d-fine": train_family, "rt-detr": train_family}
    result = runners.get(method, train_torchvision)(options, data, method, seed)
    runs.append({**run, **result})
    options.out.write_text(json.dumps(runs, indent=1) + "\n")
    print(json.dumps(runs[-1]), flush=True)


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Return mean and range over the seeds as Markdown."""
    columns = ("data", "image_size", "epochs", "minutes", "method", "lr")
    lines = [f"| {' | '.join(columns)} | parameters | images | seeds | AP | AP50 |", "|" + "---|" * (len(columns) + 5)]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault(tuple(run[name] for name in columns), []).append(run)
    for key, group in groups.items():
        cells = []
        for name in ("AP", "AP50"):
            values = [run[name] or 0.0 for run in group]
            cells.append(f"{sum(values) / len(values):.3f} ({min(values):.3f}–{max(values):.3f})")
        first = ["–" if value is None else str(value) for value in key]
        images = round(sum(run["images"] for run in group) / len(group))
        parameters = f"{group[0]['parameters'] / 1e6:.1f} M"
        lines.append(f"| {' | '.join(first)} | {parameters} | {images} | {len(group)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def train_ours(options: argparse.Namespace, data: str, method: str, seed: int) -> dict[str, Any]:
    """Train the default recipe."""
    with tempfile.TemporaryDirectory() as folder:
        summary = train(
            data, folder + "/run", preset="small", seed=seed, check="off", eval_every=10**6,
            backbone_weights=options.backbone_weights, **shared_options(options), image_size=options.image_size,
            workers=options.workers,
        )  # fmt: skip
        return result(summary, Path(folder, "run"))


def shared_options(options: argparse.Namespace) -> dict[str, Any]:
    budget = {"minutes": options.minutes} if options.minutes else {"epochs": options.epochs}
    return {**budget, "batch_size": options.batch_size}


def result(summary: dict[str, Any], run: Path) -> dict[str, Any]:
    from deformable_detr import load_detector

    parameters = sum(parameter.numel() for parameter in load_detector(run, "cpu").parameters())
    return {
        "AP": summary["AP"], "AP50": summary["AP50"], "images": summary["images_seen"],
        "seconds": round(summary["seconds"], 1), "parameters": parameters,
    }  # fmt: skip


def train_family(options: argparse.Namespace, data: str, method: str, seed: int) -> dict[str, Any]:
    """Train transformers' RT-DETR or D-FINE, with three decoder layers and our width, by their own loss."""
    budget = shared_options(options)
    network = {
        "backbone_config": {
            "model_type": "timm_backbone", "backbone": BACKBONE, "out_indices": [2, 3, 4], "freeze_batch_norm_2d": True,
        },
        "encoder_in_channels": [40, 112, 320], "decoder_layers": 3, "decoder_in_channels": [WIDTH] * 3,
        **dict.fromkeys(("encoder_hidden_dim", "d_model", "hidden_size"), WIDTH),
        **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 4 * WIDTH),
    }  # fmt: skip
    model = AdapterConfig.from_dict(
        {
            "family": method.replace("-", "_"), "network": network, "num_queries": 100, "size_divisor": 32,
            "image_size": options.image_size, "pixel_mean": MEAN.tolist(), "pixel_std": STD.tolist(),
        },
        "small_sets.py",
    )  # fmt: skip
    config = TrainConfig.from_dict(
        {
            "epochs": None, **budget, "eval_every": 10**6, "lr": options.lr, "backbone_lr_mult": BACKBONE_LR_MULT,
            "sampling_lr_mult": 1.0, "lr_schedule": "cosine", "warmup_steps": WARMUP_STEPS, "clip_max_norm": CLIP,
            "weight_decay": WEIGHT_DECAY, "ema_decay": 0.9998, "seed": seed,
        },
        "small_sets.py",
    )  # fmt: skip
    data_config = DataConfig(workers=options.workers, check="off")
    with tempfile.TemporaryDirectory() as folder, initial_backbone(options.backbone_weights):
        run = Path(folder, "run")
        summary = train_model(data, run, Config(preset="small_sets", model=model, data=data_config, train=config))
        return result(summary, run)


def initial_backbone(weights: str) -> Any:
    """Let transformers' models start with ImageNet weights and the peers' frozen stages."""
    from unittest import mock

    from safetensors.torch import load_file

    from deformable_detr.adapters.detector import TransformersDetector

    create = TransformersDetector.__init__

    def with_weights(self: Any, *args: Any, **kwargs: Any) -> None:
        create(self, *args, **kwargs)
        body = next(module for module in self.modules() if type(module).__name__ == "TimmBackbone")._backbone
        state = load_file(weights)
        body.load_state_dict({name: state[name] for name in body.state_dict()})
        frozen = Backbone(backbone_config(weights, 3)).body
        trained = {name for name, parameter in frozen.named_parameters() if parameter.requires_grad}
        for name, parameter in body.named_parameters():
            parameter.requires_grad_(name in trained)

    return mock.patch.object(TransformersDetector, "__init__", with_weights)


def backbone_config(weights: str, levels: int) -> Any:
    """Return the config of the peers' backbone with 3 (strides 8 to 32) or 4 maps (strides 4 to 32)."""
    finest = {"finest_stride": 4} if levels == 4 else {}
    own = {"frozen_stages": 2, "roi_grid": 0}
    return presets.small(backbone_weights=weights, num_feature_levels=levels, **own, **finest)


class PyramidBackbone(nn.Module):
    """The backbone with the feature pyramid of torchvision's detectors."""

    def __init__(self, weights: str, levels: int, extra: Any) -> None:
        super().__init__()
        self.backbone = Backbone(backbone_config(weights, levels))
        self.fpn = FeaturePyramidNetwork(list(self.backbone.channels), WIDTH, extra_blocks=extra)
        self.out_channels = WIDTH

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        return self.fpn({str(index): x.contiguous() for index, x in enumerate(self.backbone(pixels))})


def torchvision_model(method: str, num_classes: int, options: argparse.Namespace) -> nn.Module:
    """Return Faster R-CNN (strides 4 to 64) or FCOS (8 to 128) with anchors in proportion to the image size."""
    scale = options.image_size / 800  # the defaults of torchvision are for 800 pixels
    resize = {"min_size": options.image_size, "max_size": 4096, "image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    resize["_skip_resize"] = True
    if method == "faster-rcnn":
        body = PyramidBackbone(options.backbone_weights, 4, LastLevelMaxPool())
        anchors = AnchorGenerator(tuple((size * scale,) for size in (32, 64, 128, 256, 512)), ((0.5, 1.0, 2.0),) * 5)
        head = TwoMLPHead(WIDTH * 7**2, BOX_HEAD_WIDTH)
        predictor = FastRCNNPredictor(BOX_HEAD_WIDTH, num_classes + 1)
        return FasterRCNN(
            body, rpn_anchor_generator=anchors, box_head=head, box_predictor=predictor, box_score_thresh=0.0, **resize
        )
    body = PyramidBackbone(options.backbone_weights, 3, LastLevelP6P7(WIDTH, WIDTH))
    anchors = AnchorGenerator(tuple((stride,) for stride in (8, 16, 32, 64, 128)), ((1.0,),) * 5)
    model = FCOS(body, num_classes, anchor_generator=anchors, score_thresh=0.0, **resize)  # type: ignore[arg-type]
    return model


def train_torchvision(options: argparse.Namespace, data: str, method: str, seed: int) -> dict[str, Any]:
    """Train a detector of torchvision on the batches of our loader."""
    torch.manual_seed(seed)
    rule, data_config = presets.small(image_size=options.image_size).resize_rule, DataConfig()
    train_set = open_dataset(data, "train", data_config, transform=train_transform(rule, data_config))
    val_set = open_dataset(data, "val", data_config, train_set.categories, EvalTransform(rule))
    model = torchvision_model(method, len(train_set.categories), options)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for name, p in parameters.items() if ("backbone.backbone" in name) == is_body], "lr": lr}
        for is_body, lr in ((False, options.lr), (True, options.lr * BACKBONE_LR_MULT))
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY)
    rates = [group["lr"] for group in groups]
    loader = build_dataloader(train_set, LoaderOptions(options.batch_size, options.workers, shuffle=True, seed=seed))
    total, step, images, seconds, epoch = options.epochs * len(loader), 0, 0, 0.0, 0
    offset = 1 if method == "faster-rcnn" else 0  # its class 0 is the background

    def progress() -> float:
        return seconds / (60 * options.minutes) if options.minutes else step / total

    while progress() < 1:
        loader.sampler.set_epoch(epoch)
        model.train()
        start = time.perf_counter()
        for batch, targets in loader:
            factor = min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * min(progress(), 1.0)))
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            loss = torch.stack(list(model(*detection_inputs(batch, targets, offset)).values())).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters.values(), CLIP)
            optimizer.step()
            step, images = step + 1, images + len(targets)
            seconds, start = seconds + time.perf_counter() - start, time.perf_counter()
            if progress() >= 1:
                break
        epoch += 1
    metrics = evaluate(model, val_set, offset)
    count = sum(parameter.numel() for parameter in model.parameters())
    return {
        "AP": metrics["AP"], "AP50": metrics["AP50"], "images": images, "seconds": round(seconds, 1),
        "parameters": count,
    }  # fmt: skip


def detection_inputs(batch: ImageBatch, targets: Any, offset: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Return a batch as torchvision's detectors take it: normalized images and boxes in pixels."""
    images, labeled = [], []
    for pixels, mask, target in zip(batch.normalize(MEAN, STD).pixels, batch.padding_mask, targets, strict=True):
        height, width = int((~mask[:, 0]).sum()), int((~mask[0]).sum())
        boxes = box_convert(target.boxes, "cxcywh", "xyxy") * torch.tensor([width, height] * 2)
        images.append(pixels[:, :height, :width])
        labeled.append({"boxes": boxes, "labels": target.labels + offset})
    return images, labeled


@torch.no_grad()
def evaluate(model: nn.Module, dataset: CocoDataset, offset: int) -> dict[str, Any]:
    ids = [category.id for category in dataset.categories]
    model.eval()
    results = []
    batches: Any = build_dataloader(dataset, LoaderOptions(1, 0))
    batch: Batch
    for batch in batches:
        [target] = batch[1]
        images, _ = detection_inputs(*batch, offset)
        [found] = model(images)
        scale = target.original_size[1] / images[0].shape[2], target.original_size[0] / images[0].shape[1]
        boxes = box_convert(found["boxes"] * torch.tensor(scale * 2), "xyxy", "xywh")
        rows = zip(boxes.tolist(), found["scores"].tolist(), (found["labels"] - offset).tolist(), strict=True)
        results += [
            {"image_id": target.image_id, "category_id": ids[k], "bbox": box, "score": s}
            for box, s, k in rows
            if k < len(ids)
        ]
    return coco_metrics(dataset.ground_truth, results)


if __name__ == "__main__":
    main()
