"""Every family overfits eight images; backbones of timm load, train, save and optimize."""

import json
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file
from tests.support.transformers_models import CONFIGS

from deformable_detr.adapters.finetune import finetune_config, load_for_finetuning
from deformable_detr.data.dataloader import collate
from deformable_detr.data.dataset import open_dataset
from deformable_detr.data.transforms import EvalTransform
from deformable_detr.detector import build_detector, load_detector
from deformable_detr.evaluation.evaluator import evaluate_dataset
from deformable_detr.structures import ImageBatch, Target
from deformable_detr.training.optimizer import parameter_groups
from deformable_detr.training.setup import with_classes
from deformable_detr.training.step import TrainStep

transformers = pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("timm", reason="needs timm")

# Frozen by timm: transformers' frozen norms (freeze_backbone_batch_norms) leave out the activations of this network.
LITE0 = {
    "model_type": "timm_backbone", "backbone": "tf_efficientnet_lite0", "out_indices": [2, 3, 4],
    "freeze_batch_norm_2d": True,
}  # fmt: skip
HYBRID = {
    "encoder_in_channels": [40, 112, 320], "backbone_config": LITE0, "num_queries": 20, "num_denoising": 0,
    **dict.fromkeys(("encoder_hidden_dim", "d_model", "hidden_size"), 64), "decoder_in_channels": [64] * 3,
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 128),
}  # fmt: skip
VIT = {"d_model": 64, "decoder_ffn_dim": 128, "num_queries": 20, "group_detr": 5}
CHANGES = {name: HYBRID if name in ("rt_detr", "rt_detr_v2", "d_fine", "deimv2") else VIT for name in CONFIGS}
SETTINGS = {  # learning rate and backbone multiplier
    **dict.fromkeys(("rt_detr", "rt_detr_v2", "d_fine", "deimv2"), (2e-3, 0.2)),
    "lw_detr": (3e-3, 1.0),  # random backbones
    "rf_detr": (2e-3, 0.3),
}
FAMILIES = list(SETTINGS)


def write_repository(folder, family, weights=None):
    """Save a detector with random weights, or with the ImageNet weights of a backbone of timm."""
    config = {**CONFIGS[family], **CHANGES[family]}
    if family in ("lw_detr", "rf_detr"):
        depth = {"num_hidden_layers": 2, "out_indices": [1, 2]} if family == "rf_detr" else {}
        config["backbone_config"] = {**config["backbone_config"], "hidden_size": 64, **depth}
    torch.manual_seed(0)
    described = transformers.CONFIG_MAPPING[family].from_dict({**config, "id2label": {0: "a"}, "label2id": {"a": 0}})
    network = transformers.AutoModelForObjectDetection.from_config(described)
    if weights is not None:
        backbone = next(module for module in network.modules() if type(module).__name__ == "TimmBackbone")._backbone
        state = load_file(weights)
        backbone.load_state_dict({name: state[name] for name in backbone.state_dict()})
    network.save_pretrained(folder)
    name = {"lw_detr": "DeformableDetr", "rf_detr": "RfDetr"}.get(family, "RTDetr")
    side = 160 if config["backbone_config"] is LITE0 else 128
    size, mean, std = {"height": side, "width": side}, [127 / 255] * 3, [128 / 255] * 3
    processor = getattr(transformers, f"{name}ImageProcessor")
    processor(size=size, do_normalize=True, image_mean=mean, image_std=std).save_pretrained(folder)


def eight_images(folder, source):
    """Copy the first eight images of a dataset; return their number of objects."""
    content = json.loads((source / "train" / "_annotations.coco.json").read_text())
    images = content["images"][:8]
    ids = {image["id"] for image in images}
    annotations = [annotation for annotation in content["annotations"] if annotation["image_id"] in ids]
    (folder / "train").mkdir(parents=True)
    for image in images:
        shutil.copy(source / "train" / image["file_name"], folder / "train")
    content |= {"images": images, "annotations": annotations}
    (folder / "train" / "_annotations.coco.json").write_text(json.dumps(content))


def prepare(tmp_path, family, shared):
    """Return a detector with the classes of eight playing cards, the cards, and its training config."""
    has_timm = CHANGES[family] is HYBRID
    weights = shared / "weights" / "tf_efficientnet_lite0.timm.fp32.safetensors" if has_timm else None
    write_repository(tmp_path / "source", family, weights)
    eight_images(tmp_path / "cards", shared / "data" / "playing_cards")
    config = finetune_config(tmp_path / "source")
    dataset = open_dataset(tmp_path / "cards", "train", transform=EvalTransform(config.model.resize_rule))
    config = with_classes(config, dataset)
    torch.manual_seed(0)
    return load_for_finetuning(config.model, tmp_path / "source", lambda line: None), dataset, config.train


def test_backbone_of_timm_is_loaded_trained_and_saved(tmp_path):
    write_repository(tmp_path / "source", "rt_detr")
    config = finetune_config(tmp_path / "source")
    model = config.model.replace(num_classes=2, class_names=("b", "c"))
    detector = load_for_finetuning(model, tmp_path / "source", lambda line: None)
    groups = {group["name"]: group["names"] for group in parameter_groups(detector, config.train)}
    assert len(groups["backbone"]) == len([name for name in groups["backbone"] if "._backbone." in name]) > 40
    before = detector.network.state_dict()["model.backbone.model._backbone.conv_stem.weight"].clone()
    images = ImageBatch(torch.randint(0, 256, (2, 3, 160, 160), dtype=torch.uint8), torch.zeros(2, 160, 160) > 0)
    target = Target(torch.tensor([1]), torch.tensor([[0.5, 0.5, 0.4, 0.3]]), 1, (160, 160))
    TrainStep(detector.train(), config.train.replace(lr=1e-2)).step([(images, [target] * 2)], 0, 0.0)
    assert not torch.equal(detector.network.state_dict()["model.backbone.model._backbone.conv_stem.weight"], before)
    detector.save_pretrained(tmp_path / "saved")
    pixels = torch.rand(2, 3, 160, 160)
    saved, built = load_detector(tmp_path / "saved"), build_detector(detector.config)
    built.load_state_dict(detector.state_dict())
    with torch.no_grad():
        expected = detector.eval()(pixels)
        for other, tolerance in ((saved, 0.0), (built.eval(), 0.0), (saved.optimize(), 1e-4)):
            for name, value in other(pixels).items():
                torch.testing.assert_close(value, expected[name], atol=tolerance, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_family_overfits_eight_images(family, shared, tmp_path):
    detector, cards, train = prepare(tmp_path, family, shared)
    lr, mult = SETTINGS[family]
    train = train.replace(lr=lr, backbone_lr_mult=mult, warmup_steps=5, clip_max_norm=1.0, lr_schedule="step")
    step, samples = TrainStep(detector.train(), train), [cards[index] for index in range(8)]
    losses, ap50, start = [], 0.0, time.perf_counter()
    for number in range(400):
        metrics = step.step([collate(samples)], global_step=number, progress=number / 400)
        losses += [metrics.values["loss"]] if metrics else []
        if number + 1 in (100, 200, 300, 400):
            ap50 = evaluate_dataset(detector.eval(), cards, workers=0, progress=False).metrics["AP50"]
            detector.train()
            if ap50 > 0.5:
                break
    ratio, seconds = losses[59] / losses[0], time.perf_counter() - start
    print(f"{family}: loss {ratio:.2f} after 60 steps, AP50 {ap50:.2f} after {number + 1}, {seconds:.0f} s")
    assert ratio < 1 / 3
    assert ap50 > 0.5
