"""`deformable-detr benchmark`: speed, memory and AP of a model on this machine."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from .app import app
from .options import Device, JsonFile, at_least_one


@app.command
def benchmark(
    model: Path,
    data: Path | None = None,
    /,
    *,
    batch_size: int = 1,
    image_size: str | None = None,
    repeats: int = 7,
    threads: int | None = None,
    split: str = "val",
    limit: int | None = None,
    device: Device = "auto",
    json: JsonFile = None,
) -> None:
    """Measure a model as eager, optimized, bf16, ONNX Runtime, OpenVINO and int8, as far as they are installed.

    Args:
        model: A run or model folder, a transformers folder or hub id, or an official .pth.
        data: Dataset to measure AP on and to calibrate int8. Default: neither AP nor int8.
        batch_size: Images per batch.
        image_size: H,W in pixels. Default: the model's size for a 4:3 image.
        repeats: Rounds of measurement; the median is shown.
        threads: CPU threads. Default: PyTorch's.
        split: Split that AP is measured on.
        limit: Number of images that AP is measured on.
    """
    from ..export.graph import parse_size
    from ..utils.files import prepare_files

    at_least_one(batch_size=batch_size, repeats=repeats, threads=threads, limit=limit)
    size = parse_size(image_size) if image_size else None
    prepare_files({"--json": json})
    import torch

    from ..benchmark import benchmark, describe_machine, table
    from ..detector import DeformableDETR
    from ..utils.device import pick_device
    from ..utils.files import write_json

    if threads is not None:
        torch.set_num_threads(threads)
    target = pick_device(device)
    detector = DeformableDETR.from_pretrained(model).to(target)
    machine = describe_machine(target.type)
    rows = benchmark(
        detector, data, batch_size=batch_size, image_size=size, repeats=repeats, split=split, limit=limit, report=print
    )
    print(table(rows))
    if json is not None:
        options = {"batch_size": batch_size, "image_size": size, "repeats": repeats, "split": split, "limit": limit}
        write_json(json, {"machine": machine, **options, "rows": [asdict(row) for row in rows]})
