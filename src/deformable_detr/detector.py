"""The detector that users call: the network with loading, saving, prediction and optimization."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from .model.network import DeformableDETRNetwork
from .utils.errors import UserError
from .utils.files import is_exported

if TYPE_CHECKING:
    from .runtimes.fused import OptimizedDetector
    from .weights.model_card import ModelCardData


class DeformableDETR(DeformableDETRNetwork):
    """Deformable DETR: the network of `model.network` and what a user does with it.

    Args:
        config: The network. `presets` has the paper's variants.

    Raises:
        UserError: The backbone or its weights are not available.
    """

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], **changes: Any) -> Self:
        """Load a model in evaluation mode.

        Args:
            source: A run folder, a folder written by `save_pretrained`, a transformers repository (folder or hub id)
                or an official checkpoint (`.pth`).
            **changes: Config fields that should differ from the source's, such as `image_size=640`. See
                `weights.load.load`.

        Raises:
            UserError: The source is missing, foreign, damaged or unsafe, or a change has no meaning.
        """
        from .weights.load import load

        return load(source, cls, **changes)

    def save_pretrained(self, folder: str | os.PathLike[str], facts: ModelCardData | None = None) -> None:
        """Write config.json, model.safetensors and a model card, which `from_pretrained` reads.

        Args:
            folder: Created if missing.
            facts: Training data, metrics and license for the model card.
        """
        from .weights.native import save

        save(self, Path(folder), facts)

    def push_to_hub(self, repository: str, **options: Any) -> str:
        """Upload the model to `repository` ("owner/name") on the hub and return its address. See `weights.hub.push`."""
        from .weights.hub import push

        return push(self, repository, **options)

    def optimize(self, precision: str = "fp32", compile: bool = False) -> OptimizedDetector:
        """Return a copy for inference: the same outputs, faster and in less memory.

        Args:
            precision: "fp32", or "bf16" if the processor supports it.
            compile: Also compile with `torch.compile` (on CPUs this needs a C++ compiler).
        """
        from .runtimes.fused import OptimizedDetector

        return OptimizedDetector(self, precision, compile=compile)

    def predict(self, source: Any, threshold: float = 0.5, top_k: int = 100, batch_size: int = 1) -> Any:
        """Return `Detections` for one image (path, PIL image, HWC array, CHW tensor), or a list for a list of images.

        See `predict.predictor.predict`.
        """
        from .predict.predictor import predict

        return predict(self, source, threshold, top_k, batch_size)


def load_detector(source: str | os.PathLike[str], device: str = "auto", precision: str | None = None) -> Any:
    """Load a model or an exported file on a device.

    Args:
        source: An exported file (.onnx, .xml, .pt2) or anything that `DeformableDETR.from_pretrained` takes.
        device: "auto", "cpu", "cuda", "mps", or a device of the exported file's runtime.
        precision: "fp32" or "bf16" returns the model after `optimize`. Default: the model as it is.

    Returns:
        A detector with `config`, `pixel_mean`, `pixel_std` and `predict`.

    Raises:
        UserError: The source cannot be loaded, or "bf16" was asked of an exported file.
    """
    if is_exported(source):
        from .runtimes.detector import load_exported

        if precision == "bf16":
            raise UserError(f"{os.fspath(source)}: an exported file has a fixed precision; bf16 is for models")
        return load_exported(source, device)
    from .utils.device import pick_device

    model = DeformableDETR.from_pretrained(source).to(pick_device(device))
    return model if precision is None else model.optimize(precision)
