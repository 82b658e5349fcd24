"""`deformable-detr benchmark`: speed, memory and AP of a model on this machine."""

from dataclasses import asdict
from pathlib import Path

from ..utils.terminal import echo
from .options import Device, JsonFile, Positive, PyTorchModel, Split


def benchmark(
    model: PyTorchModel,
    data: Path | None = None,
    /,
    *,
    batch_size: Positive = 1,
    image_size: str | None = None,
    repeats: Positive = 7,
    threads: Positive | None = None,
    split: Split = "val",
    limit: Positive | None = None,
    device: Device = "auto",
    json: JsonFile = None,
) -> None:
    """Measure a model as eager, optimized, bf16, ONNX Runtime, OpenVINO and int8, as far as it and the machine can.

    Args:
        data: Dataset to measure AP on and to calibrate int8. Default: neither AP nor int8.
        batch_size: Images per batch.
        image_size: H,W in pixels. Default: the model's size for a 4:3 image.
        repeats: Rounds of measurement; the median is shown.
        threads: CPU threads. Default: PyTorch's.
        limit: Number of images that AP is measured on.
    """
    from ..export.graph import parse_size
    from ..utils.files import prepare_files

    size = parse_size(image_size) if image_size else None
    prepare_files({"--json": json})
    import torch

    from ..benchmark import benchmark, describe_machine, table
    from ..detector import load_model
    from ..utils.device import pick_device
    from ..utils.files import write_json

    if threads is not None:
        torch.set_num_threads(threads)
    target = pick_device(device)
    detector = load_model(model).to(target)
    machine = describe_machine(target.type)
    rows = benchmark(
        detector, data, batch_size=batch_size, image_size=size, repeats=repeats, split=split, limit=limit, report=echo
    )
    echo(table(rows))
    if json is not None:
        options = {"batch_size": batch_size, "image_size": size, "repeats": repeats, "split": split, "limit": limit}
        write_json(json, {"machine": machine, **options, "rows": [asdict(row) for row in rows]})
