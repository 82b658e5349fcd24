"""Models as files for other runtimes: ONNX, OpenVINO and torch.export, verified before they are written."""

from .run import Exported, export_model
from .runtime import ExportedDetector, load

__all__ = ["Exported", "ExportedDetector", "export_model", "load"]
