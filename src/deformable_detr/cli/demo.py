"""`deformable-detr demo`."""

from pathlib import Path


def demo(*, out: Path = Path("runs/demo")) -> None:
    """Train a detector of handwritten digits on generated images, evaluate it and draw its detections.

    Args:
        out: Folder for the dataset, the run and the pictures.
    """
    from ..demo import run

    run(out)
