"""A model as a web service: `serve`. Needs the extra of that name."""

from __future__ import annotations

from importlib.util import find_spec

from ..utils.errors import UserError

_NEEDED = ("fastapi", "uvicorn", "python_multipart", "prometheus_client")


def check_installed() -> None:
    """Raises UserError where a package of the extra is missing."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise UserError(f"serving needs {', '.join(missing)}: pip install 'deformable-detr[serve]'")
