"""Where the time of a forward pass goes: backbone, projections, encoder, proposals, decoder, heads."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..detector import DeformableDETR
from ..model.postprocess import postprocess
from ..structures import ImageBatch
from .rounds import in_turn

REST = "rest"  # what is in no part

_NAMES = {
    "backbone": ("backbone", "model.backbone"),
    "projections": ("projections", "model.input_proj"),
    "encoder": ("encoder", "model.encoder"),
    "proposals": ("proposals",),
    "decoder": ("decoder", "model.decoder"),
    "heads": ("decoder.heads", "decoder.classes", "decoder.boxes", "class_embed", "bbox_embed"),
}


def parts(module: nn.Module) -> dict[str, list[nn.Module]]:
    """The modules behind each part, of our model in either form and of transformers'."""
    named = dict(module.named_modules())
    result: dict[str, list[nn.Module]] = {}
    for part, names in _NAMES.items():
        for name in names:
            found = named.get(name)
            if found is not None:
                leaves = list(found.children()) if isinstance(found, nn.ModuleList) else [found]
                result.setdefault(part, []).extend(leaves)
    return result


class TimedParts:
    """A call that notes, every time it is made, how long each part of a module took. Heads in another part are heads.

    On a GPU each part waits for the one before, so the parts are told by calls of their own, not those of the rounds.
    """

    def __init__(self, call: Callable[[], Any], module: nn.Module) -> None:
        self.call, self.parts = call, parts(module)
        self.noted: list[dict[str, float]] = []
        self._wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None

    def __call__(self) -> Any:
        spent = dict.fromkeys(self.parts, 0.0)
        stack: list[tuple[float, float]] = []  # start, and what parts inside took

        def enter(*_: Any) -> None:
            self._wait()
            stack.append((time.perf_counter(), 0.0))

        def leaving(part: str) -> Callable[..., None]:
            def leave(*_: Any) -> None:
                self._wait()
                start, inside = stack.pop()
                took = time.perf_counter() - start
                spent[part] += (took - inside) * 1e3
                if stack:
                    stack[-1] = (stack[-1][0], stack[-1][1] + took)

            return leave

        hooks = []
        for part, modules in self.parts.items():
            for module in modules:
                hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leaving(part))]
        start = time.perf_counter()
        try:
            result = self.call()
            self._wait()
        finally:
            total = (time.perf_counter() - start) * 1e3
            for hook in hooks:
                hook.remove()
        self.noted.append({**spent, REST: max(0.0, total - sum(spent.values()))})
        return result

    def medians(self, rounds: int) -> dict[str, float]:
        """Median milliseconds of each part in the latest rounds, in the order that they run."""
        latest = self.noted[-rounds:]
        return {part: statistics.median(noted[part] for noted in latest) for part in latest[0]}


def around(
    model: DeformableDETR, device: str, batch: int, height: int, width: int, outputs: dict[str, Tensor]
) -> dict[str, float]:
    """Milliseconds of what comes before the model (uint8 to normalized) and after it (selection)."""
    pixels = torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8)
    images = ImageBatch(pixels, torch.zeros(batch, height, width, dtype=torch.bool))
    mean, std = model.get_buffer("pixel_mean"), model.get_buffer("pixel_std")
    times = in_turn(
        {
            "pre": lambda: images.to(device).normalize(mean, std),
            "post": lambda: postprocess(outputs, [(height, width)] * batch),
        },
        5,
    )
    return {name: found.median_ms for name, found in times.items()}
