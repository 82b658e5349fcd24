"""Export models to ONNX, OpenVINO and torch.export files, verified before they are written."""

from ..runtimes.detector import ExportedDetector, load_exported
from .export import ExportOptions, ExportResult, export_model

__all__ = ["ExportOptions", "ExportResult", "ExportedDetector", "export_model", "load_exported"]
