"""Measure the AP of a model, of its optimized variant, and of that in bf16, on the same images.

python benchmarks/precision.py runs/cards DATA --json precision.json
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from common import apply_options, finish, option_parser
from deformable_detr import DeformableDETR, evaluate


@dataclass(frozen=True)
class Row:
    variant: str
    precision: str
    images: int
    AP: float
    AP50: float
    AP75: float


def main() -> None:
    parser = option_parser(__doc__, repeats=1)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--batch-size", type=int, default=4)
    options = parser.parse_args()
    apply_options(options)
    model = DeformableDETR.from_pretrained(options.model).to(options.device)
    variants = {
        ("model", "fp32"): model,
        ("optimized", "fp32"): model.optimize(),
        ("optimized", "bf16"): model.optimize("bf16"),
    }
    rows = []
    for variant, detector in variants.items():
        metrics = evaluate(detector, options.data, batch_size=options.batch_size, workers=0, progress=False)
        rows.append(Row(*variant, *(metrics[name] for name in ("images", "AP", "AP50", "AP75"))))
    columns = {"variant": "", "precision": "", "images": "", "AP": ".4f", "AP50": ".4f", "AP75": ".4f"}
    finish(options, rows, columns)


if __name__ == "__main__":
    main()
