"""Compare a converted model with the one that it was made from."""

import copy
import io
from contextlib import redirect_stderr
from pathlib import Path

import torch
from torch import Tensor

from ..config.schema import ModelConfig
from ..model.network import DeformableDETRNetwork
from ..utils.errors import UserError, first_line
from ..utils.packages import quiet_loggers
from .checkpoint import Checkpoint
from .resize import level_strides

_TOLERANCE = 1e-6  # on logits and boxes in float64, where the two implementations differ by at most 1e-10


def check_round_trip(model: DeformableDETRNetwork, written: Checkpoint) -> None:
    """Raise UserError unless every tensor of the written file is bit-identical to the model's."""
    _, state = written.build(DeformableDETRNetwork)
    for name, value in model.state_dict().items():
        if name.endswith("num_batches_tracked"):  # transformers has no place for them
            continue
        written_value = state[name]
        if written_value.dtype != value.dtype or not torch.equal(written_value.nan_to_num(), value.cpu().nan_to_num()):
            raise UserError(f"refused: {written.path.name} reads back with other values of {name} than the model has")


def check_in_transformers(model: DeformableDETRNetwork, folder: Path) -> bool:
    """Compare the logits and boxes of transformers' model and ours on two padded random images in float64.

    Returns False if transformers is not installed. Raises UserError if it cannot run the model, or outputs differ.
    """
    try:
        import transformers
    except ImportError:
        return False
    version = f"transformers {transformers.__version__}"
    pixels, padding_mask = _random_images(model.config)
    try:
        with quiet_loggers("transformers"), redirect_stderr(io.StringIO()), torch.no_grad():
            converted, report = transformers.AutoModelForObjectDetection.from_pretrained(
                folder, output_loading_info=True, local_files_only=True
            )
            outputs = converted.double().eval()(pixels, pixel_mask=(~padding_mask).long())
            expected = copy.deepcopy(model).cpu().double().eval()(pixels, padding_mask)
    except Exception as error:  # from another library's model
        raise UserError(f"refused: {version} cannot run this model: {first_line(error)}") from None
    mismatched = [name for names in report.values() for name in (names or ())]
    if mismatched:
        raise UserError(f"refused: {version} has no use or no value for {mismatched[0]}")
    for what, theirs in (("logits", outputs.logits), ("boxes", outputs.pred_boxes)):
        ours = expected[f"pred_{what}"]
        if ours.shape != theirs.shape or not torch.allclose(ours, theirs, _TOLERANCE, _TOLERANCE, equal_nan=True):
            raise UserError(f"refused: in {version} the {what} differ from this model's")
    return True


def _random_images(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Noise (2, 3, H, W) and its padding mask; two-stage: with more tokens per image than queries."""
    side, tokens = 128, 0
    while config.two_stage and tokens < 1.2 * config.num_queries and side < 2048:
        side += 64
        # Of the smaller image, without those near its border.
        tokens = sum(max(0, side * 3 // 4 // s - 2) * max(0, side * 7 // 8 // s - 2) for s in level_strides(config))
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.zeros(2, side, side, dtype=torch.bool)
    mask[1, side * 3 // 4 :] = True
    mask[1, :, side * 7 // 8 :] = True
    return pixels.masked_fill(mask[:, None], 0.0), mask
