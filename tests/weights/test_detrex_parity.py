"""Outputs equal those of detrex's code (a checkout of IDEA-Research/detrex in DEFORMABLE_DETR_DETREX).

detectron2 is not needed: its ResNet stands here with its names, and what training needs of it is left out.
"""

import importlib
import types

import pytest
import torch
from torch import nn

from deformable_detr import DeformableDETR, UserError
from tests.support.authors_code import Stub, bare_package, checkout, importable, stub, tall_batch
from tests.support.parity import randomized

QUERIES = 60
PROJECTS = {  # prefix of the transformer's classes, class of the model
    "dino": ("DINO", "DINO"),
    "deformable_detr": ("DeformableDetr", "DeformableDETR"),
    "dab_deformable_detr": ("DabDeformableDetr", "DabDeformableDETR"),
}
_STUBS = (
    "detectron2", "detectron2.utils", "detectron2.utils.comm", "detectron2.utils.events", "detectron2.modeling",
    "detectron2.structures", "detectron2.data", "detectron2.data.detection_utils", "detectron2.layers", "fairscale",
    "fairscale.nn", "fairscale.nn.checkpoint", "fvcore", "fvcore.nn", "wandb", "omegaconf",
)  # fmt: skip


class Block(nn.Module):
    def __init__(self, inputs, width, outputs, stride):
        super().__init__()
        self.shortcut = normed(inputs, outputs, 1, stride) if inputs != outputs else None
        self.conv1, self.conv2 = normed(inputs, width, 1), normed(width, width, 3, stride)
        self.conv3 = normed(width, outputs, 1)

    def forward(self, x):
        y = x
        for layer in (self.conv1, self.conv2):
            y = layer.norm(layer(y)).relu()
        shortcut = x if self.shortcut is None else self.shortcut.norm(self.shortcut(x))
        return (self.conv3.norm(self.conv3(y)) + shortcut).relu()


def normed(inputs, outputs, size, stride=1):
    layer = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
    layer.norm = nn.BatchNorm2d(outputs)
    return layer


class ResNet50(nn.Module):
    """detectron2's, by its names."""

    def __init__(self, maps):
        super().__init__()
        self.maps, self.stem = maps, nn.Module()
        self.stem.conv1 = normed(3, 64, 7, 2)
        channels = 64
        for stage, (depth, width) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True), 2):
            blocks = []
            for index in range(depth):
                blocks.append(Block(channels, width, 4 * width, 2 if index == 0 and stage > 2 else 1))
                channels = 4 * width
            setattr(self, f"res{stage}", nn.Sequential(*blocks))

    def forward(self, x):
        x = torch.max_pool2d(self.stem.conv1.norm(self.stem.conv1(x)).relu(), 3, 2, 1)
        maps = {}
        for stage in (2, 3, 4, 5):
            x = maps[f"res{stage}"] = getattr(self, f"res{stage}")(x)
        return {name: maps[name] for name in self.maps}


@pytest.fixture(scope="module")
def build():
    """`build(project, finest, transformer options, model options)` with detrex's classes."""
    folder = checkout("DEFORMABLE_DETR_DETREX", "detrex/layers/multi_scale_deform_attn.py")
    with importable(folder, "detrex", "projects", "detectron2", "fairscale", "fvcore") as patch:
        stub(patch, *_STUBS)
        bare_package(patch, folder, "detrex", "detrex.modeling", "detrex.modeling.neck", "projects")
        bare_package(patch, folder, *(f"projects.{name}{part}" for name in PROJECTS for part in ("", ".modeling")))
        importlib.import_module("detrex")._C = Stub("detrex._C")
        stub(patch, "detrex._C")
        yield build_detrex


def build_detrex(project, finest=3, transformer=types.MappingProxyType({}), model=types.MappingProxyType({})):
    layers = importlib.import_module("detrex.layers")
    mapper = importlib.import_module("detrex.modeling.neck.channel_mapper").ChannelMapper
    title, class_name = PROJECTS[project]
    name = "deformable_transformer" if project == "deformable_detr" else f"{project.removesuffix('_detr')}_transformer"
    code = importlib.import_module(f"projects.{project}.modeling.{name}")
    detector = importlib.import_module(f"projects.{project}.modeling.{project}")
    maps, levels = [f"res{stage}" for stage in range(finest, 6)], 7 - finest
    shapes = {name: types.SimpleNamespace(channels=128 << int(name[-1]) - 1) for name in maps}
    sizes = {
        "embed_dim": 256, "num_heads": 8, "feedforward_dim": 512, "attn_dropout": 0.0, "ffn_dropout": 0.0,
        "num_layers": 3, "num_feature_levels": levels,
    }  # fmt: skip
    encoder = getattr(code, f"{title}TransformerEncoder")(**sizes)
    plain = {"use_checkpoint": False} if project == "dino" else {}
    decoder = getattr(code, f"{title}TransformerDecoder")(**sizes, **plain)
    counts = {"num_feature_levels": levels, "two_stage_num_proposals": QUERIES}
    return getattr(detector, class_name)(
        backbone=ResNet50(maps),
        position_embedding=layers.PositionEmbeddingSine(128, temperature=10000, normalize=True, offset=-0.5),
        neck=mapper(shapes, maps, 256, num_outs=levels, kernel_size=1, norm_layer=nn.GroupNorm(32, 256)),
        transformer=getattr(code, f"{title}Transformer")(encoder, decoder, **counts, **transformer),
        embed_dim=256, num_classes=80, num_queries=QUERIES, criterion=None, pixel_mean=[0, 0, 0], pixel_std=[1, 1, 1],
        device="cpu", **model,
    )  # fmt: skip


def outputs_of(model, pixels, mask):
    """Run a detrex model with a padding mask, as it has one in training only."""
    seen = []
    model.inference = lambda logits, boxes, sizes: seen.append((logits, boxes)) or []

    class Pixels(torch.Tensor):
        def new_zeros(self, *_, **__):
            return mask.float()

    model.preprocess_image = lambda _: types.SimpleNamespace(tensor=pixels.as_subclass(Pixels), image_sizes=[])
    backbone = model.backbone.forward
    model.backbone.forward = lambda x: backbone(x.as_subclass(torch.Tensor))
    with torch.no_grad():
        model([])
    return seen[0]


TWO_STAGE = {"as_two_stage": True}
MODELS = {
    "DINO": ("dino", {}, {}, {}),
    "DINO, 5 scales": ("dino", {"finest": 2}, {}, {}),
    "Deformable DETR": ("deformable_detr", {}, {}, {"aux_loss": True}),
    "refine": ("deformable_detr", {}, {}, {"aux_loss": True, "with_box_refine": True}),
    "two-stage": ("deformable_detr", {}, TWO_STAGE, {"aux_loss": True, "with_box_refine": True, **TWO_STAGE}),
    "DAB": ("dab_deformable_detr", {}, {}, {}),
    "DAB two-stage": ("dab_deformable_detr", {}, TWO_STAGE, TWO_STAGE),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_detrex_gives_equal_outputs(build, name, tmp_path):
    project, shape, transformer, options = MODELS[name]
    torch.manual_seed(0)
    theirs = randomized(build(project, **shape, transformer=transformer, model=options), seed=1)
    path = tmp_path / "model.pth"
    torch.save({"model": theirs.state_dict(), "iteration": 1}, path)
    stated = {"num_heads": 8, **({"num_queries": QUERIES} if transformer else {})}
    with pytest.raises(UserError, match="does not tell num_heads"):
        DeformableDETR.from_pretrained(path)
    ours = DeformableDETR.from_pretrained(path, **stated)  # every tensor has its place, or this is an error
    pixels, mask = tall_batch()
    logits, boxes = outputs_of(theirs, pixels, mask)
    with torch.no_grad():
        actual = ours(pixels, mask)
    assert (logits - actual["pred_logits"]).abs().max() <= 1e-5
    assert (boxes - actual["pred_boxes"]).abs().max() <= 1e-5
    assert logits.std() > 0.1
    assert boxes.std(dim=(0, 1)).max() > 0.005
