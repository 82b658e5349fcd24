"""Entry point of `deformable-detr` and `python -m deformable_detr`."""

from .cli import main as run

__all__ = ["run"]

if __name__ == "__main__":
    run()
