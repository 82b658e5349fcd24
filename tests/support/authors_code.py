"""Checkouts of other projects' code, run beside ours: found, imported without their compiled parts, forgotten after."""

import os
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from tests.support.parity import batch


def checkout(variable: str, marker: str) -> Path:
    """Return the folder that an environment variable names; skip the test if it does not have the file `marker`."""
    folder = Path(os.environ.get(variable) or "none")
    if not (folder / marker).is_file():
        pytest.skip(f"no folder with {marker} (set {variable})")
    return folder


@contextmanager
def importable(folder: Path, *packages: str) -> Iterator[pytest.MonkeyPatch]:
    """Let `packages` be imported from a folder in this context, without their compiled op and downloads of ResNets."""
    import torchvision

    def imported() -> list[str]:
        return [name for name in sys.modules if name.partition(".")[0] in packages]

    with pytest.MonkeyPatch.context() as patch:
        for name in imported():
            patch.delitem(sys.modules, name)
        patch.syspath_prepend(str(folder))
        patch.setitem(sys.modules, "MultiScaleDeformableAttention", types.ModuleType("MultiScaleDeformableAttention"))
        resnet = torchvision.models.resnet50
        patch.setattr(torchvision.models, "resnet50", lambda pretrained, **options: resnet(weights=None, **options))
        yield patch
        for name in imported():
            del sys.modules[name]


def use_python_op(patch: pytest.MonkeyPatch, functions: Any, modules: Any) -> None:
    """Replace the compiled op in the official `ops.functions` and `ops.modules` by its Python version."""

    def op(value, shapes, starts, locations, weights, step):
        return functions.ms_deform_attn_core_pytorch(value, shapes, locations, weights)

    patch.setattr(modules, "MSDeformAttnFunction", types.SimpleNamespace(apply=op))


@contextmanager
def in_precision(dtype: torch.dtype, *modules: Any) -> Iterator[None]:
    """Make explicit float32 casts in modules float64, to compare in double precision."""
    with pytest.MonkeyPatch.context() as patched:
        if dtype == torch.float64:
            torch_float64 = types.SimpleNamespace(**{**vars(torch), "float32": torch.float64})
            for module in modules:
                patched.setattr(module, "torch", torch_float64)
            patched.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


class Stub(types.ModuleType):
    """A package that is not installed: every name in it is an empty module class."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (nn.Module,), {})


def stub(patch: pytest.MonkeyPatch, *names: str, **values: Any) -> None:
    for name in names:
        module = Stub(name)
        vars(module).update(values)
        patch.setitem(sys.modules, name, module)


def bare_package(patch: pytest.MonkeyPatch, folder: Path, *names: str) -> None:
    """Let modules of packages be imported without running the `__init__.py` of the packages."""
    for name in names:
        module = types.ModuleType(name)
        module.__path__ = [str(folder / name.replace(".", "/"))]
        patch.setitem(sys.modules, name, module)


def tall_batch(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a batch with more tokens than queries, and maps that are not multiples of Swin's windows."""
    pixels, mask = batch(dtype)
    return pixels.repeat_interleave(4, 2)[:, :, :250], mask.repeat_interleave(4, 1)[:, :250]
