import math

import pytest
import torch
from torch import nn

from deformable_detr.config.schema import TrainConfig
from deformable_detr.detector import DeformableDETR
from deformable_detr.training.optimizer import (
    build_optimizer,
    load_optimizer_tensors,
    lr_factor,
    optimizer_tensors,
    parameter_groups,
    scaled_lr,
    set_learning_rate,
    total_batch_size,
)
from deformable_detr.utils.errors import UserError
from tests.support.training import tiny_config

CONFIG = TrainConfig(lr=1e-3, backbone_lr_mult=0.1, sampling_lr_mult=0.2)


@pytest.fixture(scope="module")
def model():
    return DeformableDETR(tiny_config().model.replace(two_stage=False))


def test_every_trainable_parameter_is_in_exactly_one_group(model):
    groups = parameter_groups(model, CONFIG)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad)
    assert {group["name"]: group["lr"] for group in groups} == {
        "base": 1e-3,
        "sampling": pytest.approx(2e-4),
        "backbone": pytest.approx(1e-4),
    }


def test_parameters_with_reduced_learning_rate(model):
    names = {group["name"]: group["names"] for group in parameter_groups(model, CONFIG)}
    assert any("sampling_offsets" in name for name in names["sampling"])
    assert any(name.startswith("reference_points") for name in names["sampling"])
    assert all(name.startswith("backbone.") for name in names["backbone"])
    assert not any("sampling_offsets" in name or "backbone" in name for name in names["base"])
    assert any(name.startswith("decoder.") for name in names["base"])


def test_weight_decay_is_equal_in_all_groups(model):
    assert {group["weight_decay"] for group in build_optimizer(model, CONFIG).param_groups} == {1e-4}


def test_model_without_trainable_parameters_is_rejected():
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(UserError, match="no trainable parameter"):
        parameter_groups(frozen, CONFIG)


def test_warmup_rises_to_one():
    config = CONFIG.replace(warmup_steps=4)
    assert [lr_factor(config, step, 0.0) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert lr_factor(CONFIG, 0, 0.0) == 1


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("step", [1, 1, 0.1, 0.1]), ("cosine", [1, 0.5, 0.5 * (1 + math.cos(0.8 * math.pi)), 0])],
)
def test_schedules(schedule, expected):
    config = CONFIG.replace(lr_schedule=schedule)
    assert [lr_factor(config, 9, at) for at in (0.0, 0.5, 0.8, 1.0)] == pytest.approx(expected)


def test_learning_rate_keeps_group_factors(model):
    optimizer = build_optimizer(model, CONFIG)
    set_learning_rate(optimizer, CONFIG, step=9, progress=0.9)
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == pytest.approx({"base": 1e-4, "sampling": 2e-5, "backbone": 1e-5})


def _take_steps(model, optimizer, count):
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()


def test_optimizer_state_round_trip_by_name():
    torch.manual_seed(0)
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizers = [build_optimizer(item, CONFIG) for item in (first, second)]
    _take_steps(first, optimizers[0], 3)
    tensors = {name: value.clone() for name, value in optimizer_tensors(optimizers[0]).items()}
    assert tensors.keys() >= {"weight/exp_avg", "bias/exp_avg_sq", "weight/step"}
    second.load_state_dict(first.state_dict())
    load_optimizer_tensors(optimizers[1], tensors)
    _take_steps(first, optimizers[0], 2)
    _take_steps(second, optimizers[1], 2)
    assert torch.equal(first.weight, second.weight)

    third = nn.Linear(3, 2)
    third.load_state_dict(first.state_dict())
    _take_steps(third, build_optimizer(third, CONFIG), 2)  # differs without optimizer state
    _take_steps(first, optimizers[0], 2)
    assert not torch.equal(first.weight, third.weight)


def test_mismatched_state_is_reported():
    optimizer = build_optimizer(nn.Linear(3, 2), CONFIG)
    with pytest.raises(UserError, match="weight/exp_avg"):
        load_optimizer_tensors(optimizer, {"weight/exp_avg": torch.zeros(7)})
    load_optimizer_tensors(optimizer, {"frozen_since/exp_avg": torch.zeros(7)})
    assert not optimizer.state, "frozen parameters have no state"


@pytest.mark.parametrize(
    ("settings", "processes", "batch", "rate"),
    [
        ({}, 1, 4, 1e-3),
        ({"batch_size": 8}, 1, 8, 1e-3),  # the per-process batch size alone does not scale it
        ({"total_batch_size": 4, "batch_size": 2}, 1, 4, 1e-3),
        ({"total_batch_size": 16}, 1, 16, 2e-3),
        ({"total_batch_size": 16}, 8, 16, 2e-3),
        ({"total_batch_size": 16, "base_batch_size": 16}, 1, 16, 1e-3),
        ({"batch_size": 2}, 8, 16, 1e-3 * math.sqrt(8)),
    ],
)
def test_learning_rate_scales_with_the_total_batch_size(settings, processes, batch, rate):
    config = CONFIG.replace(**settings)
    assert total_batch_size(config, processes) == batch
    lr, note = scaled_lr(config, batch)
    assert lr == pytest.approx(rate)
    assert note.startswith(f"{rate:.3g}")


def test_the_mask_head_learns_at_the_full_rate():
    config = tiny_config(backbone_lr_mult=0.1, sampling_lr_mult=0.1).updated({"model": {"masks": True}})
    groups = {group["name"]: group for group in parameter_groups(DeformableDETR(config.model), config.train)}
    names = [name for name in groups["base"]["names"] if name.startswith("mask_head.")]
    assert len(names) == 16
    assert not any("mask_head" in name for group in ("backbone", "sampling") for name in groups[group]["names"])
