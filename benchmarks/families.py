"""Time transformers' detectors against their optimized copies, all interleaved in one process.

    python benchmarks/families.py --threads 2 --json families.json

The networks have the sizes of RT-DETR-R18 and D-FINE-S and random weights. `error` is the maximum difference of logits
from transformers'; in bf16 it is large where rounding selects other queries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from common import BASELINE, apply_options, finish, option_parser
from deformable_detr.adapters.detector import TransformersDetector
from deformable_detr.benchmark import time_interleaved
from deformable_detr.config.detector import AdapterConfig
from deformable_detr.runtimes.fused.onednn import has_bf16

_STAGES = ["stage2", "stage3", "stage4"]
_RESNET18 = {
    "model_type": "rt_detr_resnet", "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512], "layer_type": "basic",
    "out_features": _STAGES,
}  # fmt: skip
_HGNET_B0 = {
    "model_type": "hgnet_v2", "stem_channels": [3, 16, 16], "stage_in_channels": [16, 64, 256, 512],
    "stage_mid_channels": [16, 32, 64, 128], "stage_out_channels": [64, 256, 512, 1024],
    "stage_num_blocks": [1, 1, 2, 1], "stage_downsample": [False, True, True, True],
    "stage_light_block": [False, False, True, True], "stage_kernel_size": [3, 3, 5, 5],
    "stage_numb_of_layers": [3, 3, 3, 3], "hidden_sizes": [64, 256, 512, 1024], "out_features": _STAGES,
    "use_learnable_affine_block": True,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "RT-DETR-R18": (
        "rt_detr",
        {
            "backbone_config": _RESNET18, "encoder_in_channels": [128, 256, 512], "decoder_layers": 3,
            "hidden_expansion": 0.5,
        },
    ),
    "D-FINE-S": (
        "d_fine",
        {
            "backbone_config": _HGNET_B0, "encoder_in_channels": [256, 512, 1024], "decoder_layers": 3,
            "hidden_expansion": 0.5, "depth_mult": 0.34, "eval_idx": -1,
        },
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One variant of a model. Speedup is relative to transformers' median."""

    model: str
    parameters: float  # millions
    variant: str
    precision: str
    batch: int
    median_ms: float
    p95_ms: float
    speedup: float
    error: float


def random_detector(family: str, network: dict[str, Any]) -> TransformersDetector:
    """Return a detector of COCO's 80 classes with the same random weights each time."""
    torch.manual_seed(0)
    config = AdapterConfig.from_dict(
        {"family": family, "network": network, "num_classes": 80, "num_queries": 300, "size_divisor": 32,
         "resize": "fixed", "image_size": 640},
        "families.py",
    )  # fmt: skip
    return TransformersDetector(config).eval()


def make_calls(detector: TransformersDetector, pixels: Tensor) -> dict[tuple[str, str], Callable[[], Any]]:
    """Return what to measure, by variant and precision; each returns the logits."""
    network = detector.network
    calls: dict[tuple[str, str], Callable[[], Any]] = {
        (BASELINE, "fp32"): torch.no_grad()(lambda: network(pixel_values=pixels).logits)
    }
    for precision in ("fp32", "bf16") if has_bf16() or pixels.is_cuda else ("fp32",):
        optimized = detector.optimize(precision)
        calls["optimized", precision] = partial(lambda model: model(pixels)["pred_logits"], optimized)
    return calls


def main() -> None:
    parser = option_parser(__doc__, repeats=15)
    parser.add_argument("--model", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--batch", type=int, default=1, help="images per batch")
    options = parser.parse_args()
    apply_options(options)
    rows: list[Row] = []
    for name in options.model:
        detector = random_detector(*MODELS[name]).to(options.device)
        pixels = torch.rand(options.batch, 3, 640, 640, generator=torch.Generator().manual_seed(0)).to(options.device)
        calls = make_calls(detector, pixels)
        expected = calls[BASELINE, "fp32"]()
        timings = time_interleaved(calls, options.repeats)
        baseline = timings[BASELINE, "fp32"].median_ms
        for (variant, precision), timing in timings.items():
            error = float((calls[variant, precision]() - expected).abs().max())
            parameters = sum(parameter.numel() for parameter in detector.parameters()) / 1e6
            rows.append(
                Row(name, parameters, variant, precision, options.batch, timing.median_ms, timing.p95_ms,
                    baseline / timing.median_ms, error)
            )  # fmt: skip
    columns = {
        "model": "", "parameters": ".1f", "variant": "", "precision": "", "batch": "", "median_ms": ".0f",
        "p95_ms": ".0f", "speedup": ".2f", "error": ".0e",
    }  # fmt: skip
    finish(options, rows, columns)


if __name__ == "__main__":
    main()
