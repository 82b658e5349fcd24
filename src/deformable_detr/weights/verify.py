"""A converted model run beside the one that it was made of, before anybody gets it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.schema import ModelConfig
from ..model.network import DeformableDETRNetwork
from ..utils.errors import UserError, first_line
from .resize import level_strides

_TOLERANCE = 1e-6  # of logits and boxes in float64, where the two implementations differ by 1e-10 at most


def same_when_read(model: DeformableDETRNetwork, state: dict[str, Tensor], what: Path) -> None:
    """That every tensor read back from a written file is the model's, to the bit. Raises UserError."""
    own = model.state_dict()
    differ = sorted(own.keys() ^ state.keys()) or [
        name
        for name, value in own.items()
        if not torch.equal(value.cpu().nan_to_num(), state[name].nan_to_num()) or value.dtype != state[name].dtype
    ]
    if differ:
        raise UserError(f"refused: {what.name} reads back with another {differ[0]} than the model has")


def same_in_transformers(model: DeformableDETRNetwork, folder: Path) -> bool:
    """That transformers makes the same logits and boxes of random images, two sizes on one canvas, in float64.

    folder: the repository. Returns False where transformers is not installed, so that nothing was shown.
    Raises UserError where it cannot load the repository or computes something else.
    """
    try:
        import transformers
    except ImportError:
        return False
    ours = copy.deepcopy(model).cpu().double().eval()
    pixels, mask = _images(model.config)
    try:
        with _quiet(transformers), torch.no_grad():
            theirs, report = transformers.AutoModelForObjectDetection.from_pretrained(
                folder, output_loading_info=True, local_files_only=True
            )
            there = theirs.double().eval()(pixels, pixel_mask=(~mask).long())
            here = ours(pixels, mask)
    except Exception as error:  # whatever another library's model raises
        line = first_line(error)
        raise UserError(f"refused: transformers {transformers.__version__} cannot run this model: {line}") from None
    unused = [name for names in report.values() for name in (names or ())]
    if unused:
        raise UserError(f"refused: transformers {transformers.__version__} has no use or no value for {unused[0]}")
    for what, expected, found in (
        ("logits", here["pred_logits"], there.logits),
        ("boxes", here["pred_boxes"], there.pred_boxes),
    ):
        fits = expected.shape == found.shape
        if not fits or not torch.allclose(found, expected, rtol=_TOLERANCE, atol=_TOLERANCE, equal_nan=True):
            by = f" by {(found - expected).abs().max().item():.2g}" if fits else ""
            raise UserError(
                f"refused: in transformers {transformers.__version__} the {what} of this model differ{by}; its parts "
                f"(backbone {model.config.backbone}, …) do something else there"
            )
    return True


def _images(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Noise (2, 3, H, W) and its padding mask, large enough that each image has more tokens than there are queries."""
    side = 128
    while config.two_stage and _tokens(config, side) < 1.2 * config.num_queries and side < 2048:
        side += 64
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.zeros(2, side, side, dtype=torch.bool)
    mask[1, side * 3 // 4 :] = True
    mask[1, :, side * 7 // 8 :] = True
    return pixels.masked_fill(mask[:, None], 0.0), mask


def _tokens(config: ModelConfig, side: int) -> int:
    """Of the smaller image, those near its border not counted."""
    strides = level_strides(config)
    return sum(max(0, side * 3 // 4 // stride - 2) * max(0, side * 7 // 8 // stride - 2) for stride in strides)


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without transformers' messages and bars about what it loads."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
