"""Compare AP over images seen: our default, our model of the paper, and transformers' Deformable DETR on the same data.

All use the same backbone weights, image size, layers, queries, width, batch size, training images and augmentation.
transformers' model is trained as in its documentation: AdamW with the paper's learning rates, its own loss and its own
image processor.

    python benchmarks/convergence.py DATA --backbone-weights WEIGHTS --epochs 12 --out benchmarks/results/cards.json

`--methods default without-denoising …` measures each part of the default recipe (see ABLATION).
`--table` prints the results of the file as Markdown, with mean and range over the seeds, without training.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from deformable_detr import DeformableDETR, train
from deformable_detr.config import presets
from deformable_detr.config.schema import Config, DataConfig, ModelConfig
from deformable_detr.data.dataloader import LoaderOptions, build_dataloader
from deformable_detr.data.dataset import open_dataset
from deformable_detr.data.transforms import EvalTransform, train_transform
from deformable_detr.evaluation.metrics import coco_metrics
from deformable_detr.ops import accelerate

Curve = list[dict[str, Any]]
# The default recipe with one change.
ABLATION: dict[str, dict[str, Any]] = {
    "without-denoising": {"num_denoising": 0},
    "without-overlap-classes": {"class_loss": "focal"},
    "without-averaging": {"ema_decay": 0.0},
    "without-look-forward-twice": {"look_forward_twice": False},
    "without-class-proposals": {"class_aware_proposals": False},
    "without-memory-content": {"query_init": "box"},
    "without-box-positions": {"iterative_query_pos": False},
    "without-cosine": {"lr_schedule": "step", "warmup_steps": 0},
    "with-paper-lr": {"lr": 2e-4, "backbone_lr_mult": 0.1, "sampling_lr_mult": 0.1, "clip_max_norm": 0.1},
    "with-mosaic": {"mosaic_prob": 0.5},
    "with-color": {"color_jitter_prob": 0.5},
    "with-aspect_ratio_grouping": {"aspect_ratio_grouping": True},
    "with-whole-crops": {"min_visibility": 0.3},
    "with-lower-lr": {"lr": 5e-4},
    "with-higher-lr": {"lr": 2e-3},
    "with-weight-decay": {"weight_decay": 1e-2},
}
OURS = ("default", "paper", *ABLATION)
METHODS = (*OURS, "transformers", "transformers-refine", "transformers-two-stage")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--backbone-weights", default="none", help="a safetensors file")
    parser.add_argument("--image-size", type=int, default=320)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--eval-every", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["default", "transformers-refine"])
    parser.add_argument("--out", type=Path, required=True, help="JSON file; its existing runs are kept")
    parser.add_argument("--table", action="store_true", help="only print the results of the file")
    options = parser.parse_args()

    runs = json.loads(options.out.read_text()) if options.out.exists() else []
    if options.table:
        print(table(runs))
        return
    for seed in options.seeds:
        for method in options.methods:
            run = {"method": method, "seed": seed, **run_settings(options)}
            if any({**run, "curve": old["curve"]} == old for old in runs):
                continue
            curve = train_ours(options, method, seed) if method in OURS else train_transformers(options, method, seed)
            runs.append({**run, "curve": curve})
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(runs, indent=1) + "\n")
            print(row(runs[-1]), flush=True)


def run_settings(options: argparse.Namespace) -> dict[str, Any]:
    import transformers

    return {
        "data": Path(options.data).name, "backbone": options.backbone, "image_size": options.image_size,
        "epochs": options.epochs, "batch_size": options.batch_size, "torch": torch.__version__,
        "transformers": transformers.__version__, "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }  # fmt: skip


def row(run: dict[str, Any]) -> str:
    last = run["curve"][-1]
    return (
        f"{run['data']:>14} {run['method']:>22} seed {run['seed']}: AP {last['AP']:.3f} AP50 {last['AP50']:.3f}"
        f" after {last['images_seen']} images, {last['minutes']:.1f} minutes of training"
    )


def table(runs: list[dict[str, Any]]) -> str:
    """Return the last metrics of each method as Markdown, with mean and range over its seeds."""
    lines = ["| dataset | image size | method | images seen | seeds | AP | AP50 |", "|---|---|---|---|---|---|---|"]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in runs:
        last = run["curve"][-1]
        groups.setdefault((run["data"], run["image_size"], run["method"], last["images_seen"]), []).append(last)
    for (data, size, method, images), evaluations in groups.items():
        cells = [f"{sum(x[k] for x in evaluations) / len(evaluations):.3f}" for k in ("AP", "AP50")]
        if len(evaluations) > 1:
            ranges = [
                f" ({min(x[k] for x in evaluations):.3f}–{max(x[k] for x in evaluations):.3f})" for k in ("AP", "AP50")
            ]
            cells = [cell + range_ for cell, range_ in zip(cells, ranges, strict=True)]
        lines.append(f"| {data} | {size} | {method} | {images} | {len(evaluations)} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def model_config(options: argparse.Namespace, method: str) -> ModelConfig:
    common = {
        "backbone": options.backbone, "backbone_weights": options.backbone_weights, "image_size": options.image_size
    }  # fmt: skip
    if method != "paper" and method in OURS:
        return presets.small(**common)
    small = presets.small()
    shared_fields = ("hidden_dim", "num_heads", "ffn_dim", "encoder_layers", "decoder_layers", "num_queries")
    return presets.two_stage(**common, **{name: getattr(small, name) for name in shared_fields})


def train_ours(options: argparse.Namespace, method: str, seed: int) -> Curve:
    preset = "two-stage" if method == "paper" else "small"
    model = model_config(options, method).model_dump(exclude={"class_names", "category_ids", "num_classes"})
    changes = dict(ABLATION.get(method, {}))
    model.update({name: changes.pop(name) for name in list(changes) if name in model})
    with tempfile.TemporaryDirectory() as folder:
        train(
            options.data,
            folder + "/run",
            preset=preset,
            model=model,
            epochs=options.epochs,
            eval_every=options.eval_every,
            batch_size=options.batch_size,
            seed=seed,
            **changes,
        )
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    return [curve_point(x, x["images_seen"], x["seconds"]) for x in lines if x["kind"] == "evaluation"]


def curve_point(metrics: dict[str, Any], images: int, seconds: float) -> dict[str, Any]:
    return {"images_seen": images, "minutes": round(seconds / 60, 2), "AP": metrics["AP"], "AP50": metrics["AP50"]}


def train_transformers(options: argparse.Namespace, method: str, seed: int) -> Curve:
    """Train transformers' model for the same number of steps on the same batches."""
    torch.manual_seed(seed)
    config = Config(data=DataConfig(), model=model_config(options, "paper"))
    rule = config.model.resize_rule
    train_set = open_dataset(
        options.data,
        "train",
        config.data,
        transform=train_transform(rule, config.data),
    )
    val_set = open_dataset(
        options.data,
        "val",
        config.data,
        train_set.categories,
        transform=EvalTransform(rule),
    )
    model = transformers_model(model_config(options, "paper"), len(train_set.categories), method)
    mean, std = torch.tensor([0.5] * 3), torch.tensor([0.5] * 3)  # timm's values for the backbone

    reduced_lr = ("backbone", "sampling_offsets", "reference_points")
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in model.named_parameters() if p.requires_grad and any(s in n for s in reduced_lr)]},
        {"params": [p for n, p in model.named_parameters() if p.requires_grad and not any(s in n for s in reduced_lr)]},
    ]
    groups[0]["lr"], groups[1]["lr"] = 2e-5, 2e-4
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-4)
    batches = build_dataloader(train_set, LoaderOptions(options.batch_size, 2, shuffle=True, seed=seed))
    lr_drop_epoch = round(0.8 * options.epochs)
    seconds, images, curve = 0.0, 0, []
    for epoch in range(options.epochs):
        if epoch == lr_drop_epoch:
            for group in optimizer.param_groups:
                group["lr"] /= 10
        batches.sampler.set_epoch(epoch)
        model.train()
        start = time.perf_counter()
        for batch, targets in batches:
            batch = batch.normalize(mean, std)
            canvas = batch.pixels.shape[2], batch.pixels.shape[3]
            labels = [
                {"class_labels": t.labels, "boxes": boxes_on_canvas(t.boxes, ~mask, canvas)}
                for t, mask in zip(targets, batch.padding_mask, strict=True)
            ]
            loss = model(batch.pixels, (~batch.padding_mask).long(), labels=labels).loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            images += len(targets)
        seconds += time.perf_counter() - start
        if (epoch + 1) % options.eval_every == 0 or epoch + 1 == options.epochs:
            curve.append(curve_point(evaluate_transformers(model, val_set, mean, std), images, seconds))
            print(curve[-1], flush=True)
    return curve


def boxes_on_canvas(boxes: torch.Tensor, valid: torch.Tensor, canvas: tuple[int, int]) -> torch.Tensor:
    """Convert boxes relative to the image to boxes relative to the padded canvas, as transformers' loss needs."""
    scale = torch.tensor([valid[0].sum() / canvas[1], valid[:, 0].sum() / canvas[0]])
    return boxes * scale.repeat(2)


def transformers_model(config: ModelConfig, classes: int, method: str) -> torch.nn.Module:
    import transformers

    backbone_class: Any = transformers.TimmBackboneConfig  # pyright does not see the keyword arguments of configs
    config_class: Any = transformers.DeformableDetrConfig
    backbone = backbone_class(backbone=config.backbone, use_pretrained_backbone=False, out_indices=[2, 3, 4])
    model = transformers.DeformableDetrForObjectDetection(
        config_class(
            backbone_config=backbone, num_labels=classes, d_model=config.hidden_dim,
            encoder_layers=config.encoder_layers, decoder_layers=config.decoder_layers,
            encoder_attention_heads=config.num_heads, decoder_attention_heads=config.num_heads,
            encoder_ffn_dim=config.ffn_dim, decoder_ffn_dim=config.ffn_dim, num_queries=config.num_queries,
            num_feature_levels=config.num_feature_levels, two_stage_num_proposals=config.num_queries,
            with_box_refine=method != "transformers", two_stage=method == "transformers-two-stage",
        )
    )  # fmt: skip
    # transformers freezes other backbones completely and drops the activations in EfficientNet's norms, so use ours.
    model.model.backbone.model = DeformableDETR(config).backbone.body
    accelerate(model)  # same outputs in less time
    return model


@torch.no_grad()
def evaluate_transformers(
    model: torch.nn.Module, dataset: Any, mean: torch.Tensor, std: torch.Tensor
) -> dict[str, Any]:
    from transformers import DeformableDetrImageProcessor

    processor: Any = DeformableDetrImageProcessor()
    ids = [category.id for category in dataset.categories]
    model.eval()
    results = []
    for batch, targets in build_dataloader(dataset, LoaderOptions(1, 2)):  # single images need no padding
        out = model(batch.normalize(mean, std).pixels, (~batch.padding_mask).long())
        sizes = torch.tensor([target.original_size for target in targets])
        detections = processor.post_process_object_detection(out, threshold=0.0, target_sizes=sizes, top_k=100)
        for target, item in zip(targets, detections, strict=True):
            item["boxes"][:, 2:] -= item["boxes"][:, :2]
            rows = zip(item["boxes"].tolist(), item["scores"].tolist(), item["labels"].tolist(), strict=True)
            results += [{"image_id": target.image_id, "category_id": ids[k], "bbox": b, "score": s} for b, s, k in rows]
    return coco_metrics(dataset.ground_truth, results)


if __name__ == "__main__":
    main()
