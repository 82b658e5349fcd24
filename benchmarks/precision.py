"""What a precision costs in accuracy: AP of a model as it was trained and as `optimize` makes it, on the same images.

python benchmarks/precision.py runs/cards DATA --json precision.json
"""

import argparse
import json
from pathlib import Path

from deformable_detr import DeformableDETR, evaluate
from deformable_detr.benchmark.rounds import described, write

FIGURES = ("AP", "AP50", "AP75")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = DeformableDETR.from_pretrained(options.model)
    ways = {"as trained, fp32": model, "optimized, fp32": model.optimize(), "optimized, bf16": model.optimize("bf16")}
    rows = []
    for name, way in ways.items():
        found = evaluate(way, options.data, batch_size=options.batch_size, workers=0, progress=False)
        rows.append({"way": name, "images": found["images"], **{figure: found[figure] for figure in FIGURES}})
        print(f"{name:18}" + "".join(f"  {figure} {found[figure]:.4f}" for figure in FIGURES), flush=True)
    if options.json is not None:
        report = {**described(None), "command": "python benchmarks/precision.py MODEL DATA", "rows": rows}
        write(options.json, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
