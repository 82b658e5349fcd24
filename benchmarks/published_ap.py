"""Evaluate a pretrained model on COCO val2017 and compare its AP with the published one. Exit code 1: they differ.

python benchmarks/published_ap.py dfine-s COCO --device cuda --json dfine-s.json

COCO is the folder with annotations/instances_val2017.json and val2017.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from deformable_detr.evaluation.evaluator import evaluate
from deformable_detr.utils.errors import UserError
from deformable_detr.utils.files import prepare_files, write_json
from deformable_detr.weights.catalog import find_model, hint

TOLERANCE = 0.2  # percent: other versions of libraries decode and resize images slightly differently


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="short name of a model (deformable-detr models)")
    parser.add_argument("data", help="COCO folder")
    parser.add_argument("--split", default="val")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    model = find_model(options.name)
    if model is None:
        raise UserError(f"{options.name} is no name of a pretrained model{hint(options.name)}")
    if model.ap is None:
        raise UserError(f"{model.name} has no published AP on COCO: it was trained on {model.data}")
    prepare_files({"--json": options.json})
    batches = {"batch_size": options.batch_size, "workers": options.workers}
    metrics = evaluate(model.name, options.data, options.split, device=options.device, **batches)
    if metrics["AP"] is None:
        raise UserError(f"{options.data}: the split {options.split} has no objects")
    measured = 100 * metrics["AP"]
    difference = measured - model.ap
    print(f"{model.name}: AP {measured:.1f}, published {model.ap:.1f}, difference {difference:+.2f}")
    if options.json is not None:
        write_json(options.json, {"name": model.name, "source": model.source, "published_AP": model.ap, **metrics})
    if abs(difference) > TOLERANCE:
        sys.exit(1)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
