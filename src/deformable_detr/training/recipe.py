"""What a preset leaves to the size of the data set: settings that are "auto" until the training images are counted."""

from __future__ import annotations

import math

from ..config.schema import Config

# Small sets are seen more often, but fewer images in all; a large one takes its 12 epochs, as DETRs do on COCO.
_EPOCHS_AT, _IMAGES_AT = 30, 300
_FEWEST, _MOST = 12, 150
# An evaluation costs a pass over the validation images and perhaps a save.
_EVALUATIONS = 50  # of a run at most, about
_IMAGES_BETWEEN = 100  # training images between two, at least


def for_size(config: Config, images: int) -> tuple[Config, str | None]:
    """The config with a number for every "auto", and a line that says which; None where nothing was "auto".

    images: of the training set, at least 1.
    """
    train, chosen = config.train, {}
    epochs = train.epochs
    if epochs == "auto":
        epochs = chosen["epochs"] = auto_epochs(images)
    if train.eval_every == "auto":
        chosen["eval_every"] = max((epochs or 0) // _EVALUATIONS, math.ceil(_IMAGES_BETWEEN / images))
    if not chosen:
        return config, None
    said = ", ".join(f"train.{name}={value}" for name, value in chosen.items())
    return config.updated({"train": chosen}), f"for {images} training images: {said}"


def auto_epochs(images: int) -> int:
    """Epochs that fall with the root of the number of images: 42 for 150, 30 for 300, 12 from 1876 on."""
    return min(max(round(_EPOCHS_AT * math.sqrt(_IMAGES_AT / images)), _FEWEST), _MOST)
