"""Outputs equal those of mmdetection's code (DEFORMABLE_DETR_MMDET: a folder with mmdet 3, mmengine and mmcv-lite).

`mmcv.ops`, which is compiled, is not needed: its attention layer stands here with its names.
"""

import importlib
import sys
import types
from importlib.machinery import ModuleSpec

import pytest
import torch
from torch import nn

from deformable_detr import DeformableDETR
from deformable_detr.ops.reference import sample_and_sum
from tests.support.authors_code import Stub, bare_package, checkout, importable, tall_batch
from tests.support.parity import randomized

QUERIES = 60
CONFIGS = "mmdet/.mim/configs"
_STUBS = ("shapely", "terminaltables", "seaborn", "lap", "motmetrics", "trackeval")
_SWIN_T = {
    "embed_dims": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7,
    "pretrain_img_size": 224, "with_cp": False,
}  # fmt: skip


class MultiScaleDeformableAttention(nn.Module):
    """That of `mmcv.ops`: its parameters, and its arithmetic in plain PyTorch."""

    def __init__(self, embed_dims=256, num_heads=8, num_levels=4, num_points=4, batch_first=False, **_):
        super().__init__()
        self.embed_dims, self.heads, self.batch_first = embed_dims, num_heads, batch_first
        self.levels, self.points, samples = num_levels, num_points, num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(embed_dims, samples * 2)
        self.attention_weights = nn.Linear(embed_dims, samples)
        self.value_proj, self.output_proj = nn.Linear(embed_dims, embed_dims), nn.Linear(embed_dims, embed_dims)

    def init_weights(self):
        pass

    def forward(
        self, query, key=None, value=None, identity=None, query_pos=None, key_padding_mask=None, reference_points=None,
        spatial_shapes=None, **_,
    ):  # fmt: skip
        assert self.batch_first
        value, identity = (query if x is None else x for x in (value, identity))
        query = query if query_pos is None else query + query_pos
        value = self.value_proj(value)
        if key_padding_mask is not None:
            value = value.masked_fill(key_padding_mask[..., None], 0.0)
        offsets = self.sampling_offsets(query).unflatten(-1, (self.heads, self.levels, self.points, 2))
        weights = self.attention_weights(query).unflatten(-1, (self.heads, -1)).softmax(-1)
        points = reference_points[:, :, None, :, None]
        if points.shape[-1] == 2:
            locations = points + offsets / spatial_shapes.flip(-1)[:, None]
        else:
            locations = points[..., :2] + offsets / self.points * points[..., 2:] * 0.5
        weights = weights.unflatten(-1, (self.levels, self.points))
        value = value.unflatten(-1, (self.heads, -1))
        return self.output_proj(sample_and_sum(value, spatial_shapes.tolist(), locations, weights)) + identity


class StubFinder:
    """Finds an empty module for every name in packages that are not installed."""

    def find_spec(self, name, path=None, target=None):
        stubbed = name.split(".")[0] in _STUBS or name.startswith("mmcv.ops")
        return ModuleSpec(name, self, is_package=True) if stubbed else None  # type: ignore[arg-type]

    def create_module(self, spec):
        module = Stub(spec.name)
        module.MultiScaleDeformableAttention = MultiScaleDeformableAttention
        return module

    def exec_module(self, module):
        pass


@pytest.fixture(scope="module")
def build():
    """`build(config file, change)` with mmdetection's classes."""
    folder = checkout("DEFORMABLE_DETR_MMDET", "mmdet/models/detectors/dino.py")
    with importable(folder, "mmdet", "mmcv", "mmengine", *_STUBS) as patch:
        patch.setattr(sys, "meta_path", [StubFinder(), *sys.meta_path])
        importlib.import_module("mmcv").__version__ = "2.1.0"
        importlib.import_module("mmdet")
        names = ("", ".detectors", ".dense_heads", ".backbones", ".necks")
        bare_package(patch, folder, *(f"mmdet.models{name}" for name in names))
        for name in (
            "layers", "losses", "utils", "data_preprocessors", "task_modules", "backbones.resnet", "backbones.swin",
            "necks.channel_mapper", "dense_heads.dino_head", "detectors.dino", "detectors.deformable_detr",
        ):  # fmt: skip
            importlib.import_module(f"mmdet.models.{name}")
        importlib.import_module("mmengine.registry").init_default_scope("mmdet")
        yield lambda file, change: build_mmdet(folder / CONFIGS / file, change)


def build_mmdet(path, change):
    """Return the model of a config file, and the text of its config."""
    config = importlib.import_module("mmengine.config").Config.fromfile(str(path))
    model = config.model
    model.num_queries = QUERIES
    change(model)
    model.backbone.init_cfg = model.train_cfg = model.data_preprocessor = None
    return importlib.import_module("mmdet.registry").MODELS.build(model), config.pretty_text


def swin_tiny(model):
    model.backbone.update(_SWIN_T)
    model.neck.in_channels = [96, 192, 384, 768]


def unchanged(model):
    pass


MODELS = {
    "DINO": ("dino/dino-4scale_r50_8xb2-12e_coco.py", unchanged),
    "DINO, 5 scales, Swin-T": ("dino/dino-5scale_swin-l_8xb2-12e_coco.py", swin_tiny),
    "Deformable DETR": ("deformable_detr/deformable-detr_r50_16xb2-50e_coco.py", unchanged),
    "refine": ("deformable_detr/deformable-detr-refine_r50_16xb2-50e_coco.py", unchanged),
    "two-stage": ("deformable_detr/deformable-detr-refine-twostage_r50_16xb2-50e_coco.py", unchanged),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_mmdetection_gives_equal_outputs(build, name, tmp_path):
    torch.manual_seed(0)
    theirs, config = build(*MODELS[name])
    randomized(theirs, seed=1)
    path = tmp_path / "model.pth"
    torch.save({"meta": {"cfg": config, "dataset_meta": None}, "state_dict": theirs.state_dict()}, path)
    stated = {"num_queries": QUERIES} if name == "two-stage" else {}
    ours = DeformableDETR.from_pretrained(path, **stated)  # every tensor has its place, or this is an error
    pixels, mask = tall_batch()
    samples = []
    for padding in mask:
        sizes = (int((~padding[:, 0]).sum()), int((~padding[0]).sum()))
        info = {"batch_input_shape": tuple(pixels.shape[-2:]), "img_shape": sizes}
        samples.append(types.SimpleNamespace(metainfo=info, **info))
    with torch.no_grad():
        states = theirs.forward_transformer(theirs.extract_feat(pixels), samples)
        logits, boxes = theirs.bbox_head.forward(states["hidden_states"], states["references"])
        actual = ours(pixels, mask)
    assert (logits - actual["layer_logits"]).abs().max() <= 1e-5
    assert (boxes - actual["layer_boxes"]).abs().max() <= 1e-5
    assert logits.std() > 0.1
    assert boxes.std(dim=(0, 1, 2)).max() > 0.005
