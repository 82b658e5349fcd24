"""Compiles the CPU kernels into the wheel. Without a compiler, or on a platform that they are not made for, the wheel
is a pure one: the package then computes in plain PyTorch and says so.

DEFORMABLE_DETR_NATIVE=require makes a failed compilation an error (release builds), =skip leaves it out.
"""

import importlib.util
import os
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE = "deformable_detr/ops/native"


def _builder(root: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("native_build", Path(root, "src", PACKAGE, "build.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class NativeBuildHook(BuildHookInterface):
    """hatchling calls it for every wheel, editable ones included."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        wish = os.environ.get("DEFORMABLE_DETR_NATIVE", "")
        if self.target_name != "wheel" or wish == "skip":
            return
        builder = _builder(self.root)
        editable = version == "editable"  # the source folder is the installed one
        self._temporary = tempfile.TemporaryDirectory()
        folder = Path(self.root, "src", PACKAGE) if editable else Path(self._temporary.name)
        try:
            library = builder.build(folder)
        except builder.BuildError as error:
            if wish == "require":
                raise
            self.app.display_warning(f"no compiled CPU kernels in this installation: {error}")
            return
        if not editable:
            build_data["force_include"][str(library)] = f"{PACKAGE}/{library.name}"
            build_data["pure_python"] = False
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["tag"] = f"py3-none-{platform}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if hasattr(self, "_temporary"):
            self._temporary.cleanup()
