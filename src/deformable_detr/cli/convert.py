"""`deformable-detr convert`."""

from pathlib import Path
from typing import Literal

from ..utils.errors import UserError
from ..utils.terminal import echo
from .options import Overrides


def convert(
    source: str, *, to: Literal["native", "transformers", "official"], out: Path, set_: Overrides = None
) -> None:
    """Convert a model to another format.

    Args:
        source: Run or model folder, transformers folder or hub id, or .pth of the official code, DINO, detrex or
            mmdetection.
        to: native, transformers (for its Auto classes) or official (for the paper authors' code).
        out: Folder for the model; it must not contain one.
        set_: What a .pth does not tell, such as model.num_heads=8. May be repeated.
    """
    from ..config.resolve import parse_overrides
    from ..weights.convert import convert as convert_model

    changes = parse_overrides(set_ or ())
    stated = changes.pop("model", {})
    if changes or not isinstance(stated, dict):
        raise UserError(f"--set {(set_ or [''])[0]}: convert only takes keys of the model, such as model.num_heads=8")
    for line in convert_model(source, to, out, stated, progress=True):
        echo(line)
