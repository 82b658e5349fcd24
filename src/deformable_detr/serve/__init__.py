"""An HTTP server for a model, with a web page. Needs the extra `serve`."""

from __future__ import annotations

from importlib.util import find_spec

from ..utils.errors import UserError

_REQUIRED = ("fastapi", "uvicorn", "python_multipart", "prometheus_client")


def check_installed() -> None:
    """Raise UserError if a package of the extra is missing."""
    missing = [name for name in _REQUIRED if find_spec(name) is None]
    if missing:
        raise UserError(f"serve needs {', '.join(missing)}: pip install 'deformable-detr[serve]'")
