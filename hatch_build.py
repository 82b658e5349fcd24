"""Build hook that compiles the CPU kernels into the wheel.

The library is plain C++ loaded by ctypes: one wheel per platform fits every Python. Without a compiler or on an
unsupported platform the wheel is pure Python, and the package falls back to plain PyTorch.
DEFORMABLE_DETR_NATIVE=require turns a failed build into an error (for releases); =skip skips it.
"""

import importlib.util
import os
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import platform_tags

PACKAGE = "deformable_detr/ops/native"


def _builder(root: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("native_build", Path(root, "src", PACKAGE, "build.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _platform() -> str:
    """Return the platform tag of the wheel; cibuildwheel and cross builds state it in _PYTHON_HOST_PLATFORM."""
    name = os.environ.get("_PYTHON_HOST_PLATFORM") or sysconfig.get_platform()
    if "universal2" in name:  # Python runs on both processors, the library on one
        name = next(platform_tags())
    return name.replace("-", "_").replace(".", "_")


class NativeBuildHook(BuildHookInterface):
    """Called by hatchling for every wheel, including editable ones."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        mode = os.environ.get("DEFORMABLE_DETR_NATIVE", "")
        if self.target_name != "wheel" or mode == "skip":
            return
        builder = _builder(self.root)
        editable = version == "editable"
        self._temporary = tempfile.TemporaryDirectory()
        folder = Path(self.root, "src", PACKAGE) if editable else Path(self._temporary.name)
        try:
            library = builder.build(folder)
        except builder.BuildError as error:
            if mode == "require":
                raise
            self.app.display_warning(f"CPU kernels not compiled: {error}")
            return
        if not editable:
            build_data["force_include"][str(library)] = f"{PACKAGE}/{library.name}"
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{_platform()}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if hasattr(self, "_temporary"):
            self._temporary.cleanup()
