"""`deformable-detr convert`."""

from pathlib import Path
from typing import Literal


def convert(source: str, *, to: Literal["native", "transformers", "official"], out: Path) -> None:
    """Convert a model to another format.

    Args:
        source: Run or model folder, transformers folder or hub id, or official .pth.
        to: native, transformers (for its Auto classes) or official (for the paper authors' code).
        out: Folder for the model; it must not contain one.
    """
    from ..weights.convert import convert as convert_model

    for line in convert_model(source, to, out):
        print(line)
