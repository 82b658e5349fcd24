"""Every shell and Python snippet of README and docs runs, page by page, with a tiny model on a few images.

A snippet below `<!-- not run: REASON -->` is only checked: its commands and options must exist.
"""

import contextlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deformable_detr import DeformableDETR
from deformable_detr.config.schema import Config, ModelConfig
from deformable_detr.training import trainer
from tests.support import snippets
from tests.support.models import randomized
from tests.support.snippets import ROOT, read_snippets
from tests.support.training import tiny_config, write_dataset
from tests.support.videos import write_video

SNIPPETS = {page.relative_to(ROOT).as_posix(): read_snippets(page) for page in snippets.PAGES}
RUNNABLE = {page: [s for s in found if s.reason is None] for page, found in SNIPPETS.items()}
SLOW_PAGES = {
    "README.md", "docs/benchmarks.md", "docs/export/index.md", "docs/export/onnx.md", "docs/export/openvino.md",
    "docs/export/pt2.md", "docs/migrate/transformers.md", "docs/predict-dataset.md", "docs/quickstart.md",
    "docs/serve.md", "docs/troubleshooting.md", "docs/weights.md",
}  # fmt: skip
RESNET50 = ModelConfig(
    backbone_weights="none", hidden_dim=32, num_heads=4, encoder_layers=1, decoder_layers=2, ffn_dim=64, num_classes=3,
    class_names=("red", "green", "blue"), category_ids=(10, 20, 30), num_queries=12, image_size=64,
)  # fmt: skip
train_model = trainer.train_model


def tiny(config: Config) -> Config:
    """Return a config that trains in seconds, with the other settings of `config`."""
    changes = {"masks": config.model.masks, "decoder_layers": 3}
    model = {} if config.train.weights else tiny_config().model.model_dump() | changes
    train = {"epochs": 1, "minutes": None, "eval_every": 1, "device": "cpu", "num_denoising": 0}
    return config.updated({"model": model, "train": train, "data": {"workers": 0}})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with everything that the snippets name: data, models, images and videos."""
    folder = tmp_path_factory.mktemp("snippets")
    write_dataset(folder / "DATA", train=8, val=3, mask_every=1)
    train_model(folder / "DATA", folder / "runs/cards", tiny(tiny_config()))
    model = randomized(DeformableDETR.from_pretrained(folder / "runs/cards"))
    with torch.no_grad():
        for head in model.decoder.heads.classes:
            head.bias += 4  # scores above 0.5
    model.save_pretrained(folder / "runs/cards")
    shutil.copytree(folder / "DATA/train", folder / "EXPORT")
    DeformableDETR(RESNET50).save_pretrained(folder / "SOURCE")
    for name in ("MODEL", "OTHER", "runs/small", "runs/cells", "runs/cars"):
        shutil.copytree(folder / "runs/cards", folder / name)
    noise = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)
    for name in ("table.jpg", "photo.jpg", "a.jpg", "b.jpg", "more/1.png", "photos/2.png", "images/3.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(noise).save(folder / name)
    shutil.copy(folder / "table.jpg", folder / "IMAGE")
    Image.fromarray(np.tile(noise, (6, 6, 1))).save(folder / "aerial.tif")
    for name in ("film.mp4", "street.mp4"):
        write_video(folder / name, frames=6)
    return folder


@pytest.mark.parametrize("page", SNIPPETS)
def test_commands_exist(page):
    for snippet in SNIPPETS[page]:
        if snippet.language == "bash":
            snippets.check_commands(snippet.text)
        else:
            compile(snippet.text, snippet.name, "exec")


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.slow] * (page in SLOW_PAGES)) for page in RUNNABLE if RUNNABLE[page]]
)
def test_page(page, folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True, copy_function=os.link)  # files are replaced, not changed
    monkeypatch.chdir(tmp_path)

    def train(data, out, config, resume=False, **options):
        if not resume:
            shutil.rmtree(out, ignore_errors=True)
        result = train_model(data, out, config if resume else tiny(config), resume=resume, **options)
        if str(out) == "runs/cards" and not config.model.masks:  # the model of `folder` finds something
            for name in ("config.json", "model.safetensors"):
                shutil.copy(folder / "MODEL" / name, Path(out, name))
        return result

    monkeypatch.setattr(trainer, "train_model", train)
    monkeypatch.setattr("deformable_detr.training.api.train_model", train)
    with contextlib.closing(snippets.Runner()) as runner:
        for snippet in RUNNABLE[page]:
            runner.run(snippet)


@pytest.mark.parametrize(
    "command",
    [
        "deformable-detr train DATA --epoch 3",
        "deformable-detr train DATA --set train.epoch=3",
        "deformable-detr tran DATA",
        "pip install '.[exprot]'",
        "make tests",
        "python benchmarks/x.py",
        "python benchmarks/op.py --thread 2",
        "torchrun --nproc-per-nod8 8 -m deformable_detr train DATA",
        "torchrun --max-restarts x -m deformable_detr train DATA",
        "torchrun --nproc-per-node 2 -m deformable_detr train DATA --effective-bath 3",
    ],
)
def test_errors_are_found(command):
    with pytest.raises((Exception, SystemExit)):
        snippets.check_commands(f"cd here\n{command}")
