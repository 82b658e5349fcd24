"""Models as files for other runtimes: ONNX, OpenVINO and torch.export, verified before they are written."""

from ..runtimes.detector import ExportedDetector, load
from .export import Exported, export_model

__all__ = ["Exported", "ExportedDetector", "export_model", "load"]
