"""A detector from wherever it is: a model that PyTorch runs, or an exported file with a runtime of its own."""

from __future__ import annotations

import os
from typing import Any

from ..errors import UserError


def load_detector(source: str | os.PathLike[str], device: str = "auto", precision: str | None = None) -> Any:
    """The detector, ready on `device`: of an exported file (.onnx, .xml, .pt2), or what `from_pretrained` takes.

    precision: fp32 or bf16 gives the model as `optimize` makes it; none: as it is. Exported files are what they are.
    All have config, pixel_mean, pixel_std, `predict`, and give the same outputs. Raises UserError, also for bf16 of an
    exported file.
    """
    from ..export.runtime import is_exported, load

    if is_exported(source):
        if precision == "bf16":
            raise UserError(f"{os.fspath(source)}: an exported file has a precision of its own, bf16 is for models")
        return load(source, device)
    from ..device import pick_device
    from ..model.detector import DeformableDETR

    model = DeformableDETR.from_pretrained(source).to(pick_device(device))
    return model if precision is None else model.optimize(precision)
