"""Feature levels, freezing, weight loading and errors of the backbone."""

import pytest
import torch
from torch import nn

from deformable_detr import UserError
from deformable_detr.config import presets
from deformable_detr.model.backbone import Backbone, InputProjection


def backbone(**changes) -> Backbone:
    return Backbone(presets.multi_scale(**{"backbone": "resnet10t", "backbone_weights": "none", **changes}))


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 6])
def test_feature_levels_start_at_stride_8_and_halve(levels):
    body = backbone(num_feature_levels=levels)
    project = InputProjection(presets.multi_scale(hidden_dim=64, num_heads=4, num_feature_levels=levels), body.channels)
    sizes = [x.shape[-1] for x in project(body(torch.randn(1, 3, 256, 256)))]
    first = {1: 32, 2: 16}.get(levels, 8)
    assert sizes == [256 // (first * 2**i) for i in range(levels)]


def test_finest_stride_4_adds_a_level():
    changes = {"num_feature_levels": 5, "finest_stride": 4, "hidden_dim": 64, "num_heads": 4}
    body = backbone(**changes)
    maps = InputProjection(presets.multi_scale(**changes), body.channels)(body(torch.randn(1, 3, 128, 128)))
    assert [x.shape[-1] for x in maps] == [32, 16, 8, 4, 2]
    with pytest.raises(UserError, match="finest_stride 4 needs num_feature_levels"):
        presets.multi_scale(finest_stride=4, num_feature_levels=3)


def test_swin_takes_images_of_any_size_and_pads_before_the_shift():
    """Zeros at the lower right edge that complete windows do not change the maps: the images are padded with them."""
    torch.manual_seed(0)
    body = backbone(backbone="swin_tiny_patch4_window7_224", finest_stride=4).eval()
    pixels = torch.randn(1, 3, 97, 230)
    with torch.no_grad():
        maps = body(pixels)
        layer = body.body.get_submodule("layers_0").blocks[1]
        x = torch.randn(1, 25, 58, 96)
        attended = layer._attn(x)
        padded = layer._attn(torch.nn.functional.pad(x, (0, 0, 0, 5, 0, 3)))
    assert [tuple(x.shape) for x in maps] == [(1, 96, 25, 58), (1, 192, 13, 29), (1, 384, 7, 15), (1, 768, 4, 8)]
    assert any(layer.shift_size)
    assert torch.equal(attended, padded[:, :25, :58])


@pytest.mark.slow
def test_advice_about_backbones_whose_stages_have_no_module(tmp_path, capsys):
    """The option in the error makes the same command work, also for weights in transformers' format."""
    from deformable_detr.cli import main
    from deformable_detr.weights.load import load_pretrained
    from tests.support.training import write_dataset

    data = write_dataset(tmp_path / "set")
    sizes = ("hidden_dim=32", "num_heads=2", "ffn_dim=32", "num_queries=5", "image_size=64", "encoder_layers=1")
    options = [word for size in sizes for word in ("--set", f"model.{size}")]
    options += ["--epochs", "1", "--device", "cpu", "--preset", "small-portable", "--backbone", "hrnet_w18_small"]
    train = ["train", str(data), "--backbone-weights", "none", *options, "--set", "data.workers=0"]
    with pytest.raises(SystemExit, match="2"):
        main([*train, "--out", str(tmp_path / "run"), "--set", "model.frozen_stages=2"])
    advice = capsys.readouterr().err.strip().rpartition("; ")[2]
    assert advice == "--set model.frozen_stages=0"
    main([*train, "--out", str(tmp_path / "run"), *advice.split()])
    main(["convert", str(tmp_path / "run"), "--to", "transformers", "--out", str(tmp_path / "portable")])
    assert load_pretrained(tmp_path / "portable").config.frozen_stages == 0


def test_dc5_keeps_stride_16():
    body = Backbone(presets.single_scale_dc5(backbone="resnet18", backbone_weights="none"))
    assert body(torch.randn(1, 3, 128, 128))[0].shape[-1] == 8


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0", "mobilenetv4_conv_small_050", "convnext_atto"])
def test_only_unfrozen_stages_get_gradients(name):
    body = backbone(backbone=name, frozen_stages=2)
    sum(x.sum() for x in body(torch.randn(1, 3, 64, 64))).backward()
    frozen = [n for n, p in body.named_parameters() if not p.requires_grad]
    trainable = [n for n, p in body.named_parameters() if p.requires_grad]
    assert frozen
    assert trainable
    names = [n for n, _ in body.named_parameters()]
    assert names[: len(frozen)] == frozen  # a contiguous prefix
    assert all(p.grad is not None for p in body.parameters() if p.requires_grad)


def test_one_small_image_trains_without_batch_statistics():
    body = backbone().train()
    assert body(torch.randn(1, 3, 32, 20))[-1].shape[2:] == (1, 1)
    assert all(module.training for module in body.modules())


def test_shape_with_too_few_stages_is_reported():
    shape = {"depths": (1, 1), "widths": (8, 8), "stem": 8}
    assert backbone(backbone_shape=shape, num_feature_levels=1).channels == (8,)
    with pytest.raises(UserError, match="backbone_shape has 2 stages; num_feature_levels > 1 needs 4"):
        backbone(backbone_shape=shape)


def test_frozen_norm_keeps_its_statistics_in_training():
    trained = [m for m in backbone().modules() if isinstance(m, nn.BatchNorm2d)]
    assert trained
    frozen = backbone(backbone_norm="frozen").train()
    assert not [m for m in frozen.modules() if isinstance(m, nn.BatchNorm2d)]
    before = {k: v.clone() for k, v in frozen.state_dict().items()}
    frozen(torch.randn(2, 3, 64, 64))
    assert all(torch.equal(v, before[k]) for k, v in frozen.state_dict().items())


def test_backbone_weights_from_a_file(tmp_path):
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    source = timm.create_model("resnet10t")
    save_file(source.state_dict(), tmp_path / "resnet10t.safetensors")
    body = backbone(backbone_weights=str(tmp_path / "resnet10t.safetensors"))
    assert torch.equal(body.body.layer4[0].conv1.weight, source.layer4[0].conv1.weight)
    with pytest.raises(UserError, match=r"resnet10t\.safetensors for timm's 'resnet18'"):
        backbone(backbone="resnet18", backbone_weights=str(tmp_path / "resnet10t.safetensors"))
    with pytest.raises(UserError, match=r"resnet10t\.safetensors for .*size mismatch for bn1"):
        backbone(backbone="tf_efficientnet_lite0", backbone_weights=str(tmp_path / "resnet10t.safetensors"))
    save_file({"conv.weight": torch.ones(3, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"other\.safetensors do not fit timm's 'resnet10t': no values for conv1"):
        backbone(backbone_weights=str(tmp_path / "other.safetensors"))
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"broken\.safetensors"):
        backbone(backbone_weights=str(tmp_path / "broken.safetensors"))
    with pytest.raises(UserError, match=r"missing\.safetensors"):
        backbone(backbone_weights=str(tmp_path / "missing.safetensors"))


def test_shared_efficientnet_weights_load(shared):
    path = shared / "weights" / "tf_efficientnet_lite0.timm.fp32.safetensors"
    body = backbone(backbone="tf_efficientnet_lite0", backbone_weights=str(path))
    assert body.channels == (40, 112, 320)
    assert not any(p.requires_grad for p in body.body.conv_stem.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "resnet5000"}, "'resnet5000' is not a timm model"),
        ({"backbone": "vit_tiny_patch16_224"}, "strides|feature maps"),
        ({"frozen_stages": 9}, "frozen_stages 9"),
    ],
)
def test_invalid_backbone_is_reported(changes, message):
    with pytest.raises(UserError, match=message):
        backbone(**changes)


def test_downloads_are_announced(monkeypatch, capsys):
    """Only for weights from the hub that are not in its cache."""
    import huggingface_hub
    import timm

    create, cached = timm.create_model, []

    def without_download(name, pretrained=False, pretrained_cfg_overlay=None, **options):
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", without_download)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repository, file: cached and cached[0])
    backbone(backbone_weights="hub")
    assert capsys.readouterr().err == "download the backbone weights of resnet10t (timm/resnet10t.c3_in1k)\n"
    cached.append("/cache/model.safetensors")
    backbone(backbone_weights="hub")
    backbone(backbone_weights="none")
    assert capsys.readouterr().err == ""
