"""`python -m deformable_detr` is the command line too."""

from .cli import main

main()
