"""`deformable-detr models`."""

from dataclasses import asdict

from ..utils.errors import UserError
from .options import JsonFile


def models(*, family: str | None = None, json: JsonFile = None) -> None:
    """List the pretrained models that every command takes by name.

    AP is the published one, on COCO val2017 in percent. Input sizes are in pixels: H×W, or shortest–longest side.

    Args:
        family: Only this family, such as D-FINE.
    """
    from ..utils.files import prepare_files, write_json
    from ..weights.catalog import CATALOG, HEADER

    prepare_files({"--json": json})
    wanted = None if family is None else family.casefold()
    rows = [model for model in CATALOG if wanted in (None, model.family.casefold())]
    if not rows:
        families = ", ".join(dict.fromkeys(model.family for model in CATALOG))
        raise UserError(f"--family {family}: no such family; choose from {families}")
    cells = [HEADER, *(model.cells() for model in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if json is not None:
        write_json(json, [asdict(model) for model in rows])
