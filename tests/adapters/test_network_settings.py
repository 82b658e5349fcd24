"""Settings of transformers' network that a user changes: applied, or refused in one line."""

import re

import pytest
import torch
from tests.support.transformers_models import CONFIGS, write_repository

from deformable_detr.adapters.detector import TransformersDetector
from deformable_detr.adapters.finetune import finetune_config, load_for_finetuning
from deformable_detr.config.resolve import resolve_config
from deformable_detr.config.schema import TrainConfig
from deformable_detr.detector import finetune_config as config_of
from deformable_detr.detector import load_detector
from deformable_detr.structures import ImageBatch, Target
from deformable_detr.training.step import TrainStep
from deformable_detr.utils.errors import UserError

pytest.importorskip("transformers", reason="needs transformers")


@pytest.mark.parametrize("name", [name for name in CONFIGS if " " not in name])
def test_num_queries(name, tmp_path):
    write_repository(tmp_path / "repository", name)
    config = finetune_config(tmp_path / "repository").updated(
        {"model": {"num_queries": 5, "num_classes": 2, "class_names": ("a", "b")}}
    )
    model = load_for_finetuning(config.model, tmp_path / "repository", lambda line: None).eval()
    side = model.config.image_size
    assert model(torch.zeros(1, 3, side, side))["pred_boxes"].shape == (1, 5, 4)
    model.save_pretrained(tmp_path / "saved")
    assert load_detector(tmp_path / "saved", "cpu").config == model.config


def test_unknown_settings(rt_detr):
    settings = {"num_queries=5": "network.num_queries is not used; set num_queries", "num_labels=5": "set num_classes"}
    for setting, message in settings.items():
        with pytest.raises(UserError, match=message):
            resolve_config(
                overrides=[f"model.network.{setting}"],
                options={"train.weights": str(rt_detr)},
                config_of_weights=config_of,
            )
    config = finetune_config(rt_detr).updated({"model": {"network": {"d_modle": 5}}})
    with pytest.raises(UserError, match=r"^model.network.d_modle: RT-DETR has no such setting; did you mean 'd_model'"):
        load_for_finetuning(config.model, rt_detr)


def test_settings_of_the_other_loss(rt_detr):
    config = finetune_config(rt_detr)
    assert config.updated({"train": {"ema_decay": 0.5, "focal_alpha": 0.25}}).train.ema_decay == 0.5
    for name, value in {"class_cost": 5, "auxiliary_loss": False, "label_noise": 0.1}.items():
        with pytest.raises(UserError, match=rf"train.{name} is not used: transformers' networks have their own loss$"):
            config.updated({"train": {name: value}})


def test_valid_keys_are_those_of_the_section(rt_detr):
    with pytest.raises(UserError, match=r"unknown key 'model.hidden_dim'; valid keys: class_names, .*, processor$"):
        finetune_config(rt_detr).updated({"model": {"hidden_dim": 64}})


def test_misspelled_setting_of_the_backbone(rt_detr):
    config = finetune_config(rt_detr).updated({"model": {"network": {"backbone_config": {"depthz": 3}}}})
    message = r"^model.network.backbone_config.depthz: rt_detr_resnet has no such setting; did you mean 'depths'\?$"
    with pytest.raises(UserError, match=message):
        load_for_finetuning(config.model, rt_detr)


def test_other_width_makes_new_class_heads(rt_detr):
    network = {"d_model": 64, "encoder_hidden_dim": 64, "decoder_in_channels": [64, 64, 64]}
    classes = {"num_classes": 2, "class_names": ("dog", "new"), "network": network}
    lines = []
    load_for_finetuning(finetune_config(rt_detr).updated({"model": classes}).model, rt_detr, lines.append)
    assert any("new: " in line and "shape (2, 64), in the source (3, 32)" in line for line in lines), lines


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_score_of_objects_is_kept_for_any_classes(layers, tmp_path):
    write_repository(tmp_path / "source", "deformable_detr")
    classes = {"num_classes": 2, "class_names": ("new", "cat"), "network": {"decoder_layers": layers}}
    config = finetune_config(tmp_path / "source").updated({"model": classes}).model
    lines = []
    model = load_for_finetuning(config, tmp_path / "source", lines.append)
    source = TransformersDetector.from_pretrained(tmp_path / "source")
    heads, theirs = (detector.network.model.decoder for detector in (model, source))
    assert torch.equal(heads.class_embed[layers].weight[0], theirs.class_embed[2].weight[0])
    assert torch.equal(heads.class_embed[layers].bias[0], theirs.class_embed[2].bias[0])
    assert torch.equal(heads.bbox_embed[layers].layers[0].weight, theirs.bbox_embed[2].layers[0].weight)
    assert torch.equal(heads.class_embed[0].weight[1], theirs.class_embed[0].weight[0]), "control: a class"
    assert any("kept its score of 'object'" in line for line in lines), lines


@pytest.mark.parametrize("name", [name for name in CONFIGS if " " not in name])
def test_more_queries_than_positions(name, tmp_path):
    write_repository(tmp_path, name)
    config = finetune_config(tmp_path).model
    model = load_for_finetuning(config.replace(num_queries=5000), tmp_path, lambda line: None)
    images = torch.zeros(1, 3, config.image_size, config.image_size)
    with pytest.raises(UserError, match=r"has 5000 queries, but .* only \d+ .*--set model.num_queries=") as error:
        model.eval()(images)
    count = int(re.findall(r"only (\d+)", str(error.value))[0])
    target = Target(torch.tensor([0]), torch.tensor([[0.5, 0.5, 0.2, 0.2]]), 1, (96, 96))
    batch = ImageBatch(torch.zeros_like(images, dtype=torch.uint8), torch.zeros_like(images[:, 0], dtype=torch.bool))
    with pytest.raises(UserError, match=f"only {count} positions"):
        TrainStep(model.train(), TrainConfig()).backward([(batch, [target])])
    with pytest.raises(UserError, match=r"only \d+ positions"):  # Deformable DETR folds its norms at a larger size
        model.eval().optimize()(images)
    model = load_for_finetuning(config.replace(num_queries=count), tmp_path, lambda line: None)
    assert model.eval()(images)["pred_boxes"].shape == (1, count, 4)
