"""The demo: generate images of handwritten digits on photographs, train from random weights, evaluate on held-out data.

The digits and photographs are part of scikit-learn and scikit-image, so nothing is downloaded. The validation images
use the last fifth of the digits, written by other people, and three photographs that are not in the training images.
"""

import json
import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from .config import presets
from .config.schema import Config
from .utils.errors import UserError
from .utils.progress import progress_bar

MIN_AP50 = 0.70
MARKER = "demo.json"  # identifies a folder that the demo may overwrite

TRAIN_PHOTOS = (
    "brick", "camera", "china", "coffee", "coins", "flower", "grass", "gravel", "hubble_deep_field", "retina", "rocket",
    "stereo_motorcycle",
)  # fmt: skip
VAL_PHOTOS = ("astronaut", "chelsea", "moon")
NEXT_STEPS = """
Use your own images: put them into DATA/train and DATA/valid, each with boxes in _annotations.coco.json:
  deformable-detr train DATA --out runs/mine
  deformable-detr evaluate runs/mine DATA
  deformable-detr predict runs/mine IMAGE --out pictures"""
SIDES = (128, 144, 160)  # pixels
DIGIT_HEIGHTS = (28, 64)  # pixels
MAX_DIGITS = 4


def demo_config() -> Config:
    """Return the preset `small` reduced further: 128-pixel images, a backbone with random weights, six minutes."""
    model = {"backbone": "test_resnet", "backbone_weights": "none"}  # timm's smallest ResNet: 0.4 million parameters
    model |= {"image_size": 128, "max_size": 160, "num_feature_levels": 3, "num_queries": 20}
    model |= {"encoder_layers": 1, "decoder_layers": 2, "ffn_dim": 256}
    data = {"train_scales": [0.9, 1.0], "crop_prob": 0.0, "workers": 1}
    data["hflip_prob"] = 0.0  # a mirrored digit is not a digit
    train = {"epochs": None, "minutes": 6, "batch_size": 8, "eval_every": 4}
    train |= {"lr": 8e-4, "backbone_lr_mult": 1.0, "num_denoising": 40}
    return presets.config("small").updated({"model": model, "data": data, "train": train})


def run(out: Path) -> dict[str, Any]:
    """Generate the data, train, evaluate and draw, all inside the folder `out`, and print the results.

    Returns:
        The metrics of the evaluation.

    Raises:
        UserError: The folder cannot be used or a package is missing.
        SystemExit: AP50 is below 0.70 (exit code 1).
    """
    from .detector import DeformableDETR
    from .evaluation import evaluate
    from .training.trainer import train_model

    _claim_folder(out)
    data, run_dir = out / "data", out / "run"
    print(f"Generating images of handwritten digits in {data}")
    make_data(data)
    print(f"Training from random weights in {run_dir}")
    train_model(data, run_dir, demo_config())
    model = DeformableDETR.from_pretrained(run_dir)
    metrics = evaluate(model, data)
    pictures = draw_examples(model, sorted((data / "valid").glob("*.jpg"))[:24], out)
    ap50 = metrics["AP50"]
    print(f"\nValidation images: AP50 {ap50:.3f}, AP {metrics['AP']:.3f}")
    print(f"Detections: {pictures}\n{NEXT_STEPS}")
    if not ap50 >= MIN_AP50:
        print(f"error: AP50 {ap50:.3f} is below {MIN_AP50}: training did not converge", file=sys.stderr)
        raise SystemExit(1)
    return metrics


def make_data(folder: Path, train_images: int = 1500, val_images: int = 200, seed: int = 0) -> None:
    """Write the folders `train` and `valid` with JPEGs and `_annotations.coco.json`, reproducible by the seed.

    Raises:
        UserError: scikit-learn or scikit-image is not installed.
    """
    try:
        from sklearn.datasets import load_digits

        photos = {name: _photo(name) for name in TRAIN_PHOTOS + VAL_PHOTOS}
    except ImportError as error:
        raise UserError(f"the demo needs {error.name}: pip install 'deformable-detr[demo]'") from None
    digits: Any = load_digits()
    glyphs, values = digits.images / 16.0, digits.target  # (1797, 8, 8), 0 = paper, 1 = ink; (1797,)
    held_out = len(glyphs) * 4 // 5
    splits = {
        "train": (glyphs[:held_out], values[:held_out], TRAIN_PHOTOS, train_images),
        "valid": (glyphs[held_out:], values[held_out:], VAL_PHOTOS, val_images),
    }
    for number, (split, (images, labels, names, count)) in enumerate(splits.items()):
        (folder / split).mkdir(parents=True, exist_ok=True)
        _write_split(folder / split, images, labels, [photos[name] for name in names], count, (seed, number))


def draw_examples(model: Any, images: Sequence[Path], out: Path, columns: int = 6) -> Path:
    """Draw the detections of each image into `out`/pictures, and all in one grid, whose path is returned."""
    from .utils.files import replace_file
    from .visualize.draw import draw

    drawn = []
    for image in images:
        detections = model.predict(image, threshold=0.4)
        detections.save(out / "pictures" / f"{image.stem}.png")
        drawn.append(draw(detections))
    width, height = (max(sizes) + 8 for sizes in zip(*(picture.size for picture in drawn), strict=True))
    sheet = Image.new("RGB", (columns * width, math.ceil(len(drawn) / columns) * height), "white")
    for number, picture in enumerate(drawn):
        row, column = divmod(number, columns)
        sheet.paste(picture, (column * width, row * height))
    path = out / "pictures.png"
    replace_file(path, lambda temporary: sheet.save(temporary, "PNG"))
    return path


@dataclass(frozen=True)
class _Glyph:
    """A digit to be placed. `ink` and `halo` are opacities 0..1 of one shape; `box` encloses the ink."""

    ink: np.ndarray
    halo: np.ndarray
    box: tuple[int, int, int, int]  # x1, y1, x2, y2 in pixels


def _write_split(
    folder: Path, glyphs: np.ndarray, values: np.ndarray, photos: list[Image.Image], count: int, seed: tuple[int, int]
) -> None:
    rng = np.random.default_rng(seed)
    images, annotations = [], []
    with progress_bar(count, "images", f"generate {folder.name}", keep=False) as bar:
        for image_id in range(1, count + 1):
            picture = _background(photos[rng.integers(len(photos))], rng)
            height, width = picture.shape[:2]
            for index, (x, y, w, h) in _place_digits(picture, glyphs, rng):
                annotation = {"id": len(annotations) + 1, "image_id": image_id, "category_id": int(values[index]) + 1}
                annotations.append({**annotation, "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0})
            name = f"{image_id:05d}.jpg"
            Image.fromarray(picture.round().astype(np.uint8)).save(folder / name, quality=92)
            images.append({"id": image_id, "file_name": name, "width": width, "height": height})
            bar.update()
    categories = [{"id": digit + 1, "name": str(digit)} for digit in range(10)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "_annotations.coco.json").write_text(json.dumps(content), encoding="utf-8")


def _photo(name: str) -> Image.Image:
    if name in ("china", "flower"):
        from sklearn.datasets import load_sample_image

        return Image.fromarray(load_sample_image(f"{name}.jpg"))
    import skimage.data

    pixels = getattr(skimage.data, name)()
    return Image.fromarray(pixels[0] if isinstance(pixels, tuple) else pixels).convert("RGB")


def _background(photo: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """Return a random crop of the photograph, (H, W, 3) float32 in 0..255, with sides from SIDES."""
    width, height = (int(side) for side in rng.choice(SIDES, 2))
    zoom = rng.uniform(1.0, min(photo.width / width, photo.height / height, 3.5))
    left = rng.uniform(0, photo.width - zoom * width)
    top = rng.uniform(0, photo.height - zoom * height)
    box = (left, top, left + zoom * width, top + zoom * height)
    pixels = np.asarray(photo.resize((width, height), Image.Resampling.BILINEAR, box=box), dtype=np.float32)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    return (pixels * rng.uniform(0.7, 1.15)).clip(0, 255)


def _place_digits(
    picture: np.ndarray, glyphs: np.ndarray, rng: np.random.Generator
) -> list[tuple[int, tuple[int, int, int, int]]]:
    """Draw 1 to 4 digits without overlap; return their indices and boxes (x, y, w, h) in pixels."""
    height, width = picture.shape[:2]
    placed: list[tuple[int, tuple[int, int, int, int]]] = []
    for _ in range(rng.integers(1, MAX_DIGITS + 1)):
        index = int(rng.integers(len(glyphs)))
        glyph = _glyph(glyphs[index], rng)
        rows, columns = glyph.ink.shape
        x1, y1, x2, y2 = glyph.box
        for _attempt in range(20):
            left, top = int(rng.integers(width - columns + 1)), int(rng.integers(height - rows + 1))
            box = (left + x1, top + y1, x2 - x1, y2 - y1)
            if not any(_overlap(box, other, gap=4) for _, other in placed):
                _paint(picture[top : top + rows, left : left + columns], glyph, rng)
                placed.append((index, box))
                break
    return placed


def _glyph(pixels: np.ndarray, rng: np.random.Generator) -> _Glyph:
    """Enlarge a digit (8, 8), rotate it slightly, sharpen its edges and add a halo."""
    size = float(rng.uniform(*DIGIT_HEIGHTS))
    margin = 3  # cells of the 8 × 8 grid, for the rotation and the halo
    cells = 8 + 2 * margin
    side = round(size * cells / 8)
    image = Image.fromarray(np.pad(pixels * 255, margin).astype(np.uint8))
    image = image.resize((side, side), Image.Resampling.BICUBIC)
    image = image.rotate(rng.uniform(-10, 10), Image.Resampling.BICUBIC)
    ink = ((np.asarray(image, dtype=np.float32) / 255 - 0.4) / 0.25).clip(0, 1)
    blurred = Image.fromarray((ink * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(size / 18))
    halo = (np.asarray(blurred, dtype=np.float32) / 255 * 3).clip(0, 1)
    y1, x1, y2, x2 = _extent(ink > 0.5)
    top, left, bottom, right = _extent(halo > 0.02)
    part = slice(top, bottom), slice(left, right)
    return _Glyph(ink[part], halo[part], (x1 - left, y1 - top, x2 - left, y2 - top))


def _paint(region: np.ndarray, glyph: _Glyph, rng: np.random.Generator) -> None:
    """Paint dark ink with a light halo, or the reverse, in random colors, into a region of the image."""
    dark, light = rng.uniform(0, 80, 3), rng.uniform(185, 255, 3)
    ink, halo = (dark, light) if rng.random() < 0.5 else (light, dark)
    for opacity, color in ((glyph.halo * rng.uniform(0.5, 0.95), halo), (glyph.ink, ink)):
        region += opacity[..., None] * (color.astype(np.float32) - region)


def _extent(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return the first row and column with True values, and the row and column after the last."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int], gap: int) -> bool:
    return all(a[i] < b[i] + b[i + 2] + gap and b[i] < a[i] + a[i + 2] + gap for i in (0, 1))


def _claim_folder(out: Path) -> None:
    """Create the folder, or clear that of an earlier demo. Raises UserError if it holds other files."""
    marker = out / MARKER
    try:
        if out.exists() and any(out.iterdir()) and not marker.exists():
            raise UserError(f"--out {out}: contains other files; choose another folder")
        out.mkdir(parents=True, exist_ok=True)
        marker.write_text(json.dumps({"made by": "deformable-detr demo"}) + "\n", encoding="utf-8")
        for name in ("data", "run", "pictures"):
            if (out / name).exists():
                shutil.rmtree(out / name)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror or error}") from None
