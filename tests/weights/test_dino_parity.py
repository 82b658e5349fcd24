"""Outputs equal those of the authors' code of DINO (a checkout of IDEA-Research/DINO in DEFORMABLE_DETR_DINO)."""

import argparse
import runpy
import types

import pytest
import torch

from deformable_detr import DeformableDETR
from tests.support.authors_code import checkout, importable, in_precision, tall_batch, use_python_op
from tests.support.parity import randomized


@pytest.fixture(scope="module")
def dino_code():
    """`build(name, changes)` of the authors' repository."""
    folder = checkout("DEFORMABLE_DETR_DINO", "models/dino/dino.py")
    with importable(folder, "models", "util") as patch:
        yield load_dino(folder, patch)


def load_dino(folder, patch):
    from models.dino import (  # type: ignore[import-not-found]
        backbone,
        deformable_transformer,
        dino,
        position_encoding,
        utils,
    )
    from models.dino.ops.functions import ms_deform_attn_func  # type: ignore[import-not-found]
    from models.dino.ops.modules import ms_deform_attn  # type: ignore[import-not-found]
    from util.misc import NestedTensor  # type: ignore[import-not-found]

    use_python_op(patch, ms_deform_attn_func, ms_deform_attn)

    def build(name, **changes):
        values = runpy.run_path(str(folder / "config/DINO" / f"{name}.py"))
        args = argparse.Namespace(**{key: value for key, value in values.items() if not key.startswith("_")})
        vars(args).update(changes)
        model = dino.DINO(
            backbone.build_backbone(args), deformable_transformer.build_deformable_transformer(args),
            num_classes=args.num_classes, num_queries=args.num_queries, aux_loss=True, iter_update=True, query_dim=4,
            num_feature_levels=args.num_feature_levels, nheads=args.nheads, two_stage_type=args.two_stage_type,
            dec_pred_class_embed_share=args.dec_pred_class_embed_share,
            dec_pred_bbox_embed_share=args.dec_pred_bbox_embed_share,
            two_stage_class_embed_share=args.two_stage_class_embed_share,
            two_stage_bbox_embed_share=args.two_stage_bbox_embed_share,
            dn_number=100, dn_labelbook_size=args.dn_labelbook_size,
        )  # fmt: skip
        return model, args

    modules = (backbone, deformable_transformer, position_encoding, utils)
    return types.SimpleNamespace(
        build=build, Nested=NestedTensor, precision=lambda dtype: in_precision(dtype, *modules)
    )


SMALL, FULL = (torch.float32, 1e-5, 50), (torch.float64, 1e-10, 900)
"""Type, tolerance and number of queries: of 900 in fp32, some have scores too close for a stable order."""


@pytest.mark.slow
@pytest.mark.parametrize("precision", [SMALL, FULL], ids=["fp32", "fp64"])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("DINO_4scale", {}),
        ("DINO_5scale", {}),
        ("DINO_4scale_swin", {"backbone": "swin_T_224_1k", "use_checkpoint": False}),
        ("DINO_4scale_swin", {"use_checkpoint": False}),
    ],
    ids=["R50 4 scales", "R50 5 scales", "Swin-T", "Swin-L"],
)
def test_authors_code_gives_equal_outputs(dino_code, name, changes, precision, tmp_path):
    dtype, tolerance, queries = precision
    theirs, args = dino_code.build(name, num_queries=queries, **changes)
    randomized(theirs).to(dtype)
    torch.save({"model": theirs.state_dict(), "args": args}, tmp_path / "dino.pth")
    ours = DeformableDETR.from_pretrained(tmp_path / "dino.pth")
    pixels, mask = tall_batch(dtype)
    with torch.no_grad(), dino_code.precision(dtype):
        expected = theirs(dino_code.Nested(pixels, mask))
    with torch.no_grad():
        actual = ours(pixels, mask)
    pairs = {"": (expected, actual["pred_logits"], actual["pred_boxes"])}
    for layer, outputs in enumerate(expected["aux_outputs"]):
        pairs[f" of layer {layer}"] = (outputs, actual["layer_logits"][layer], actual["layer_boxes"][layer])
    for which, (outputs, logits, boxes) in pairs.items():
        assert (outputs["pred_logits"] - logits).abs().max() <= tolerance, f"logits{which}"
        assert (outputs["pred_boxes"] - boxes).abs().max() <= tolerance, f"boxes{which}"
    assert expected["pred_logits"].std() > 0.1
    assert expected["pred_boxes"].std(dim=(0, 1)).max() > 0.005
    if dtype == torch.float32:
        optimized = ours.optimize()(pixels, mask)
        assert (optimized["pred_logits"] - actual["pred_logits"]).abs().max() <= 1e-4
        assert (optimized["pred_boxes"] - actual["pred_boxes"]).abs().max() <= 1e-4
