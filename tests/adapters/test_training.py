"""Training of transformers' detectors: loss, exact resume, kept classes, and the commands on the result."""

import sys

import pytest
import torch
from safetensors.torch import load_file
from tests.support.training import train_until_signal, write_dataset
from tests.support.transformers_models import CONFIGS, write_repository

from deformable_detr import UserError
from deformable_detr.adapters.detector import TransformersDetector
from deformable_detr.adapters.families import FAMILIES as FAMILIES_BY_NAME
from deformable_detr.adapters.finetune import finetune_config, load_for_finetuning
from deformable_detr.config.schema import TrainConfig
from deformable_detr.data.dataloader import collate
from deformable_detr.data.dataset import open_dataset
from deformable_detr.data.multi_scale import MultiScaleBatches
from deformable_detr.data.transforms import EvalTransform
from deformable_detr.detector import load_detector
from deformable_detr.training.optimizer import parameter_groups, scaled_lr
from deformable_detr.training.run_dir import run_config
from deformable_detr.training.step import BatchStats, TrainStep
from deformable_detr.training.trainer import train_model

transformers = pytest.importorskip("transformers", reason="needs transformers")
FAMILIES = [name for name in CONFIGS if " " not in name]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("set") / "set")


@pytest.fixture(scope="module", params=FAMILIES)
def repository(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write_repository(folder, request.param)
    return folder


def samples_of(data, model):
    dataset = open_dataset(data, "train", transform=EvalTransform(model.resize_rule))
    return [dataset[index] for index in range(len(dataset))]


def tiny(folder, **train):
    config = finetune_config(folder)
    settings = {"epochs": 2, "eval_every": 1, "batch_size": 4, "warmup_steps": 0, "weights": str(folder), "seed": 3}
    return config.updated({"train": {**settings, "log_every": 1, **train}, "data": {"workers": 0}})


def weights_of(run):
    (path,) = sorted((run / "checkpoints").rglob("model.safetensors"))[-1:]
    return load_file(path)


def test_resumed_run_equals_an_uninterrupted_one(data, repository, tmp_path, monkeypatch):
    reference, run = tmp_path / "reference", tmp_path / "run"
    draw, drawn = MultiScaleBatches.size, []
    monkeypatch.setattr(MultiScaleBatches, "size", lambda scales, step: drawn.append(draw(scales, step)) or drawn[-1])

    expected = train_model(data, reference, tiny(repository))
    sizes = drawn.copy()

    train_until_signal(monkeypatch, data, run, tiny(repository), 3)
    metrics = train_model(data, run, run_config(run), resume=True)
    assert metrics["step"] == expected["step"] == 4
    assert drawn[len(sizes) :] == sizes
    if tiny(repository).model.resize == "fixed":
        assert len(set(sizes)) > 1, "control: the size does change"
    first, second = (load_file(folder / "model.safetensors") for folder in (reference, run))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    start = load_file(repository / "model.safetensors")
    changed = [name for name, value in first.items() if name in start and not torch.equal(value, start[name])]
    assert len(changed) > len(first) / 3, "control: training does change the weights"
    card = (run / "README.md").read_text()
    assert f"# {FAMILIES_BY_NAME[finetune_config(repository).model.family].title}\n" in card
    assert "| 1 | green | 20 |" in card
    assert "epochs: 2" in card
    assert "AP50" in card
    detector = load_detector(run)
    assert detector.config.class_names == ("red", "green", "blue")
    assert detector.config.category_ids == (10, 20, 30)
    theirs = transformers.AutoModelForObjectDetection.from_pretrained(run)
    assert theirs.config.id2label == {0: "red", 1: "green", 2: "blue"}


def test_loss_falls(data, repository):
    torch.manual_seed(0)
    detector = load_detector(repository).train()
    samples = samples_of(data, detector)
    step = TrainStep(detector, TrainConfig(lr=2e-3, backbone_lr_mult=0.5, sampling_lr_mult=1.0, clip_max_norm=1.0))
    losses = []
    for number in range(40):
        metrics = step.step([collate(samples[:8])], global_step=number, progress=0.0)
        losses += [metrics.values["loss"]] if metrics else []
    assert losses[-1] < 0.75 * losses[0], losses
    assert {"loss_class", "loss_bbox", "loss_giou", "cardinality_error"} <= metrics.values.keys()


def test_learning_rates_of_the_recipe(data, repository):
    config = finetune_config(repository)
    detector = load_detector(repository)
    groups = {group["name"]: group["names"] for group in parameter_groups(detector, config.train)}
    backbone = set(groups["backbone"])
    assert all(".backbone." in name or ".conv_encoder." in name for name in backbone)
    assert not any(("proj" in name and "encoder_input_proj" in name) or "projector" in name for name in backbone)
    images = sum(parameter.numel() for name, parameter in detector.named_parameters() if name in backbone)
    assert images > 5_000
    lr, _ = scaled_lr(config.train, config.train.batch_size)
    assert lr == pytest.approx(config.train.lr * (4 / config.train.base_batch_size) ** 0.5)


def test_micro_batches_have_the_gradient_of_the_batch(data, rt_detr):
    gradients = []
    for sizes in ((8,), (3, 5)):
        detector = load_detector(rt_detr).train()
        detector.network.config.num_denoising = 0  # its noise differs
        detector.network.model.config.num_denoising = 0
        for module in detector.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()  # their statistics are those of a micro-batch
        samples = samples_of(data, detector)
        step = TrainStep(detector, TrainConfig())
        starts = [sum(sizes[:index]) for index in range(len(sizes))]
        batches = [collate(samples[start : start + size]) for start, size in zip(starts, sizes, strict=True)]
        objects = [len(target.labels) for _, target in samples]
        step.backward(batches, 0, BatchStats(8, sum(objects), max(objects)))
        head = detector.network.model.decoder.bbox_embed[0].layers[0].weight
        gradients.append(head.grad.clone())
    difference = (gradients[0] - gradients[1]).abs().max() / gradients[0].abs().max()
    assert difference < 1e-4, difference
    assert gradients[0].abs().max() > 0


def test_images_without_objects(data, repository, tmp_path):
    empty = write_dataset(tmp_path / "set", empty=8)
    detector = load_detector(repository).train()
    step = TrainStep(detector, TrainConfig())
    step.step([collate(samples_of(empty, detector)[:2])], global_step=0, progress=0.0)
    assert step.flush_pending_metrics() is not None


def test_rows_of_classes_with_the_same_name_are_kept(repository):
    config = finetune_config(repository).model.replace(num_classes=2, class_names=("Dog", "new"), category_ids=())
    lines = []
    model = load_for_finetuning(config, repository, lines.append)
    source = TransformersDetector.from_pretrained(repository)
    heads = [name for name, _ in source.network.named_parameters() if "class_embed" in name and name.endswith("weight")]
    assert heads
    objectness = "model.decoder.class_embed.2.weight"  # of Deformable DETR: no class
    for name in [name for name in heads if (source.config.family, name) != ("deformable_detr", objectness)]:
        assert torch.equal(model.network.state_dict()[name][0], source.network.state_dict()[name][1]), name
    assert any("kept 1 of the same name" in line for line in lines)
    assert model.config.num_classes == 2


def test_wrong_families_are_reported(rt_detr, repository, tmp_path):
    config = finetune_config(rt_detr).model
    if config.family == finetune_config(repository).model.family:
        pytest.skip("the same family")
    with pytest.raises(UserError, match="not a RT-DETR; give the weights of the same family"):
        load_for_finetuning(config, repository)


def test_commands_on_a_trained_model(data, rt_detr, tmp_path, capsys):
    from deformable_detr.cli.app import app

    run = tmp_path / "run"
    train_model(data, run, tiny(rt_detr, epochs=1))
    app(["train", str(data), "--out", str(run), "--epochs", "2", "--resume"], result_action="return_value")
    assert run_config(run).model.family == "rt_detr"
    assert "epoch 2/2" in capsys.readouterr().err
    image = str(data / "valid/0.png")
    for words in (
        ["evaluate", str(run), str(data), "--report", str(tmp_path / "report.html"), "--workers", "0"],
        ["predict", str(run), image, "--threshold", "0", "--json", str(tmp_path / "results.json")],
    ):
        app(words, result_action="return_value", exit_on_error=False)
    assert "AP50" in capsys.readouterr().out
    assert (tmp_path / "report.html").is_file()
    assert (tmp_path / "results.json").is_file()


def test_processes_do_not_average_their_divisors(data, repository, monkeypatch):
    """`AdapterObjective.losses` divides by the objects of all processes itself."""
    detector = load_detector(repository).train()
    batch = collate(samples_of(data, detector)[:2])
    torch.manual_seed(0)
    expected = TrainStep(detector, TrainConfig()).backward([batch])[1].values[0]
    code = sys.modules[detector.network.loss_function.__module__]
    if hasattr(code, "_is_torch_distributed_initialized"):
        monkeypatch.setattr(code, "_is_torch_distributed_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, **options: tensor.mul_(3))
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    torch.manual_seed(0)
    assert TrainStep(detector, TrainConfig()).backward([batch])[1].values[0] == expected
