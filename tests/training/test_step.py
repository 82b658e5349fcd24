import pytest
import torch

from deformable_detr.config.image_size import ShortestEdge
from deformable_detr.data.dataloader import collate
from deformable_detr.data.dataset import open_dataset
from deformable_detr.data.transforms import EvalTransform
from deformable_detr.detector import DeformableDETR
from deformable_detr.structures import ImageBatch
from deformable_detr.training.matcher import PackedTargets
from deformable_detr.training.signals import NonFiniteLoss
from deformable_detr.training.step import TrainStep
from tests.support.training import tiny_config, write_dataset


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    dataset = open_dataset(
        write_dataset(tmp_path_factory.mktemp("set")), transform=EvalTransform(ShortestEdge(64, 128))
    )
    return [dataset[index] for index in range(8)]


def make(**train):
    torch.manual_seed(0)
    config = tiny_config(**train)
    return TrainStep(DeformableDETR(config.model).train(), config.train)


def weights(train_step):
    return {name: value.clone() for name, value in train_step.model.state_dict().items() if "running" not in name
            and "num_batches" not in name}  # fmt: skip


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def test_overfits_eight_images_in_60_steps(samples):
    train_step = make(lr=2e-3)
    batches = [collate(samples[:4]), collate(samples[4:])]
    losses = []
    for number in range(60):
        stats = train_step.step([batches[number % 2]], global_step=number, progress=0.0)
        losses.append(stats and stats.values["loss"])
    last = train_step.flush_pending_metrics()
    assert last is not None
    assert last.step == 60
    assert losses[0] is None
    first, final = losses[1], last.values["loss"]
    assert final < first / 3, (first, final)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_updates_weights(samples, precision):
    train_step = make(precision=precision)
    before = weights(train_step)
    for number in range(3):
        train_step.step([collate(samples[:2])], global_step=number, progress=0.0)
    assert train_step.flush_pending_metrics() is not None
    after = weights(train_step)
    assert not same(before, after)
    assert all(value.isfinite().all() for value in after.values())


def test_gradients_are_freed_before_the_forward_pass(samples):
    train_step = make()
    train_step.step([collate(samples[:2])], global_step=0, progress=0.0)
    assert any(parameter.grad is not None for parameter in train_step.model.parameters())
    gradients = []
    train_step.model.encoder.register_forward_hook(
        lambda *_: gradients.extend(parameter.grad for parameter in train_step.model.parameters())
    )
    train_step.step([collate(samples[:2])], global_step=1, progress=0.0)
    assert gradients
    assert all(gradient is None for gradient in gradients)


def test_batch_without_objects(tmp_path):
    dataset = open_dataset(write_dataset(tmp_path, train=2, empty=2), transform=EvalTransform(ShortestEdge(64, 128)))
    train_step = make()
    train_step.step([collate([dataset[0], dataset[1]])], global_step=0, progress=0.0)
    stats = train_step.flush_pending_metrics()
    assert stats is not None
    assert stats.values["loss_bbox"] == 0
    assert stats.values["grad_norm"] > 0


def test_nan_loss_leaves_weights_unchanged(samples):
    train_step = make()
    train_step.step([collate(samples[:4])], global_step=0, progress=0.0)
    with torch.no_grad():
        train_step.model.level_embedding.fill_(float("nan"))
    before = weights(train_step)
    with pytest.raises(NonFiniteLoss) as caught:
        train_step.step([collate(samples[:4])], global_step=1, progress=0.0)
    assert caught.value.step == 2
    assert caught.value.image_ids == [100, 101, 102, 103]
    assert caught.value.losses["loss"] != caught.value.losses["loss"]
    before.pop("level_embedding")
    assert same(before, weights(train_step))


def test_non_finite_loss_names_only_the_affected_image(samples):
    train_step = make()
    batch, targets = collate(samples[:3])
    targets[1].boxes[0, 0] = float("nan")
    try:
        with pytest.raises(NonFiniteLoss, match="images 101;"):
            train_step.step([(batch, targets)], global_step=0, progress=0.0)
    finally:
        targets[1].boxes[0, 0] = 0.5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_non_finite_gradient_skips_the_update_and_is_reported_one_step_later(samples, precision):
    train_step = make(precision=precision)
    train_step.step([collate(samples[:4])], global_step=0, progress=0.0)
    before = weights(train_step)
    hook = train_step.model.level_embedding.register_hook(lambda gradient: gradient * float("nan"))
    train_step.step([collate(samples[:4])], global_step=1, progress=0.0)
    hook.remove()
    assert same(before, weights(train_step))
    with pytest.raises(NonFiniteLoss, match="gradient of the loss is not finite at step 2"):
        train_step.flush_pending_metrics()


def test_without_found_inf_the_weights_become_nan(samples, monkeypatch):
    train_step = make()
    train_step.step([collate(samples[:4])], global_step=0, progress=0.0)
    original = train_step.optimizer.step

    def unguarded():
        train_step.optimizer.found_inf = torch.zeros(())
        original()

    monkeypatch.setattr(train_step.optimizer, "step", unguarded)
    train_step.model.level_embedding.register_hook(lambda gradient: gradient * float("nan"))
    train_step.step([collate(samples[:4])], global_step=1, progress=0.0)
    assert not all(value.isfinite().all() for value in weights(train_step).values())


def test_fp16_tolerates_a_limited_number_of_overflows(samples):
    train_step = make(precision="fp16")
    hook = train_step.model.level_embedding.register_hook(lambda gradient: gradient * float("inf"))
    before = weights(train_step)
    train_step.step([collate(samples[:2])], global_step=0, progress=0.0)
    stats = train_step.flush_pending_metrics()
    assert stats is not None
    assert not stats.values["grad_norm"] < float("inf")
    assert same(before, weights(train_step))
    assert train_step.scaler.get_scale() < 2.0**16
    train_step._overflows = 49
    train_step.step([collate(samples[:2])], global_step=1, progress=0.0)
    with pytest.raises(NonFiniteLoss, match="gradient"):
        train_step.flush_pending_metrics()
    hook.remove()


def test_gradients_are_clipped_and_the_unclipped_norm_is_logged(samples, monkeypatch):
    train_step = make(clip_max_norm=0.1)
    norms = []

    def measure():
        gradients = [parameter.grad for parameter in train_step.model.parameters() if parameter.grad is not None]
        norms.append(torch.stack([gradient.norm() for gradient in gradients]).norm())

    monkeypatch.setattr(train_step.optimizer, "step", measure)
    train_step.step([collate(samples[:4])], global_step=0, progress=0.0)
    stats = train_step.flush_pending_metrics()
    assert stats is not None
    assert norms[0].item() == pytest.approx(0.1, rel=1e-3)
    assert stats.values["grad_norm"] > 1


def test_batch_is_not_modified(samples):
    batch, targets = collate(samples[:2])
    copy = ImageBatch(batch.pixels.clone(), batch.padding_mask.clone())
    make().step([(batch, targets)], global_step=0, progress=0.0)
    assert torch.equal(batch.pixels, copy.pixels)
    assert torch.equal(batch.padding_mask, copy.padding_mask)


def test_targets_are_packed_once_per_micro_batch(samples, monkeypatch):
    """Not once per layer, loss or denoising group."""
    packed, pack = [], PackedTargets.pack
    monkeypatch.setattr(PackedTargets, "pack", lambda targets: packed.append(targets) or pack(targets))
    train_step = make(num_denoising=20)
    batch, targets = collate(samples[:4])
    counted_targets = [_ReadCounter(target) for target in targets]
    train_step.step([(batch, counted_targets)], global_step=0, progress=0.0)
    assert packed == [counted_targets]
    assert {target.boxes_read for target in counted_targets} == {1}, "nothing else reads the boxes"
    train_step.step([collate(samples[:2]), collate(samples[2:4])], global_step=1, progress=0.0)
    assert len(packed) == 3


class _ReadCounter:
    """A target that counts reads of its boxes."""

    def __init__(self, target):
        self.target, self.boxes_read = target, 0

    def __getattr__(self, name):
        self.boxes_read += name == "boxes"
        return getattr(self.target, name)
