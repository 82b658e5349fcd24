"""RF-DETR with masks: equal outputs and masks, saved and optimized models, training with transformers' own loss."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tests.support.training import write_dataset
from tests.support.transformers_models import MASKS, NAMES, pictures, write_repository

from deformable_detr import UserError, evaluate
from deformable_detr.adapters.detector import TransformersDetector
from deformable_detr.adapters.finetune import finetune_config, load_for_finetuning
from deformable_detr.config.schema import DataConfig, TrainConfig
from deformable_detr.data.dataloader import collate, pad_images
from deformable_detr.data.dataset import open_dataset
from deformable_detr.data.transforms import train_transform
from deformable_detr.detector import load_detector
from deformable_detr.model.mask_ops import content_ratios, paste_masks
from deformable_detr.model.postprocess import postprocess
from deformable_detr.structures import ImageBatch, Target
from deformable_detr.training.matcher import PackedTargets
from deformable_detr.training.step import TrainStep
from deformable_detr.training.trainer import train_model
from deformable_detr.utils.rle import decode_masks

transformers = pytest.importorskip("transformers", reason="needs transformers")
if not hasattr(transformers, "RfDetrForInstanceSegmentation"):
    pytest.skip(f"transformers {transformers.__version__} has no RF-DETR with masks", allow_module_level=True)
KEYS = {"pred_logits": "logits", "pred_boxes": "pred_boxes", "pred_masks": "pred_masks"}


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=["fp32", "fp64"])
def dtype(request):
    return request.param


@pytest.fixture(scope="module", params=MASKS)
def saved(request, dtype, tmp_path_factory):
    """Folder, transformers' network and image processor."""
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "-"))
    return folder, *write_repository(folder, request.param, dtype)


def random_batch(detector, dtype, padded=True):
    """Return a batch of images of different sizes, in multiples that the network takes."""
    side, step = detector.config.image_size, detector.config.size_divisor
    shapes = [(side, side), (side, side - step), (side - step, side)] if padded else [(side, side)] * 3
    generator = torch.Generator().manual_seed(5)
    coarse = [torch.randint(0, 256, (1, 3, 6, 7), generator=generator).float() for _ in shapes]
    images = [F.interpolate(x, shape, mode="bilinear")[0] for x, shape in zip(coarse, shapes, strict=True)]
    batch = pad_images([image.to(torch.uint8) for image in images])
    pixels = batch.normalize(detector.pixel_mean.to(dtype), detector.pixel_std.to(dtype)).pixels
    return ImageBatch(pixels, batch.padding_mask)


@pytest.mark.parametrize("padded", [False, True], ids=["one size", "different sizes"])
def test_outputs_equal_transformers(saved, dtype, padded):
    folder, network, _ = saved
    detector = load_detector(folder, "cpu")
    assert detector.config.masks
    assert detector.config.class_names == NAMES
    batch = random_batch(detector, dtype, padded)
    with torch.no_grad():
        actual = detector(batch.pixels, batch.padding_mask)
        expected = network(pixel_values=batch.pixels, pixel_mask=(~batch.padding_mask).long())
    assert actual.keys() == KEYS.keys()
    for name, theirs in KEYS.items():
        assert (actual[name] - expected[theirs]).abs().max() <= (1e-5 if dtype == torch.float32 else 1e-10), name
    size = detector.config.image_size // network.config.mask_downsample_ratio
    assert actual["pred_masks"].shape == (3, detector.config.num_queries, size, size)


def test_masks_equal_those_of_the_processor(saved, dtype):
    """With the queries that `post_process_instance_segmentation` takes: every pixel, but those at a logit of 0."""
    folder, network, processor = saved
    detector = load_detector(folder, "cpu")
    batch = random_batch(detector, dtype, padded=False)
    with torch.no_grad():
        outputs = network(pixel_values=batch.pixels)
    sizes, top_k = [(96, 131), (200, 60), (33, 35)], detector.config.num_queries
    theirs = processor.post_process_instance_segmentation(
        outputs, threshold=0.0, target_sizes=sizes, return_binary_maps=True, top_k=top_k
    )
    ours = {name: outputs[key] for name, key in KEYS.items()}
    ours["content_ratios"] = content_ratios(batch.padding_mask)
    compared = 0
    for scored, expected, size in zip(postprocess(ours, sizes, top_k), theirs, sizes, strict=True):
        masks = decode_masks(scored.masks.to_rle(size), size)
        kept = masks.flatten(1).any(1)  # the processor leaves out empty masks
        infos = expected["segments_info"]
        assert [info["label_id"] for info in infos] == scored.labels[kept].tolist()
        torch.testing.assert_close(
            torch.tensor([info["score"] for info in infos]), scored.scores[kept].float(), atol=1e-5, rtol=0
        )
        if len(infos):
            assert (masks[kept] != expected["segmentation"].bool()).float().mean() < 1e-3
        compared += int(kept.sum())
    assert compared > 6


def test_saved_model_loads_in_transformers_and_here(saved, dtype, tmp_path):
    folder, network, _ = saved
    detector = load_detector(folder, "cpu")
    detector.save_pretrained(tmp_path)
    again = load_detector(tmp_path, "cpu")
    assert again.config == detector.config
    theirs = transformers.AutoModelForInstanceSegmentation.from_pretrained(tmp_path, dtype=dtype).eval()
    batch = random_batch(detector, dtype)
    mask = (~batch.padding_mask).long()
    with torch.no_grad():
        expected = network(pixel_values=batch.pixels, pixel_mask=mask).pred_masks
        assert torch.equal(theirs(pixel_values=batch.pixels, pixel_mask=mask).pred_masks, expected)
        assert torch.equal(again(batch.pixels, batch.padding_mask)["pred_masks"], expected)
    card = (tmp_path / "README.md").read_text()
    assert "AutoModelForInstanceSegmentation.from_pretrained" in card
    assert "AutoModelForObjectDetection" not in card
    assert "pipeline_tag: image-segmentation" in card


def test_optimized_outputs_are_equal(saved, dtype):
    if dtype != torch.float32:
        pytest.skip("optimized models are fp32")
    detector = load_detector(saved[0], "cpu")
    batch = random_batch(detector, dtype)
    with torch.no_grad():
        expected = detector(batch.pixels, batch.padding_mask)
    actual = detector.optimize()(batch.pixels, batch.padding_mask)
    for name in KEYS:
        assert (actual[name] - expected[name]).abs().max() < 1e-4, name


def test_predictions_have_masks(saved):
    detector = load_detector(saved[0], "cpu")
    image = pictures()[0]
    detections = detector.predict(image, threshold=0.0, top_k=5)
    assert detections.masks.shape == (5, image.height, image.width)
    explained = detector(*vars(random_batch(detector, detector.pixel_mean.dtype)).values(), return_attention=True)
    assert {"layer_logits", "decoder_attention"} <= explained.keys()


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    """Folders of small models without and with masks."""
    folders = {name: tmp_path_factory.mktemp(name.replace(" ", "-")) for name in ("rf_detr", "rf_detr masks")}
    for name, folder in folders.items():
        write_repository(folder, name)
    return folders


@pytest.mark.parametrize("masks", [True, False])
def test_weights_fit_models_with_and_without_masks(repositories, masks):
    source = repositories["rf_detr" if masks else "rf_detr masks"]
    config = finetune_config(source).model.replace(num_classes=3, class_names=NAMES, masks=masks)
    lines = []
    model = load_for_finetuning(config, source, lines.append)
    before, after = load_detector(source, "cpu").eval(), model.eval()
    batch = random_batch(before, torch.float32)
    with torch.no_grad():
        expected, actual = (part(batch.pixels, batch.padding_mask) for part in (before, after))
    assert ("pred_masks" in actual) == masks
    for name in ("pred_logits", "pred_boxes"):
        torch.testing.assert_close(actual[name], expected[name])
    (line,) = [line for line in lines if "segmentation_bias" in line]
    assert ("not in this model" in line) != masks


def test_other_families_have_no_masks(repositories, rt_detr):
    config = finetune_config(rt_detr).model.replace(masks=True)
    with pytest.raises(UserError, match=r"^model.masks: transformers' RT-DETR has no masks; set model.masks=false$"):
        TransformersDetector(config)


def write_masked_dataset(root):
    """Write colored rectangles whose masks are their upper left half, but some have none."""
    write_dataset(root)
    for path in root.rglob("_annotations.coco.json"):
        content = json.loads(path.read_text())
        for number, annotation in enumerate(content["annotations"]):
            x, y, w, h = annotation["bbox"]
            if number % 4:
                annotation["segmentation"] = [[x, y, x + w, y, x, y + h]]
        path.write_text(json.dumps(content))
    return root


def batch_of(data, model):
    dataset = open_dataset(data, "train", transform=train_transform(model.resize_rule, PLAIN), masks=True)
    return collate([dataset[index] for index in range(8)])


PLAIN = DataConfig(hflip_prob=0.0, crop_prob=0.0, zoom_out_prob=0.0, color_jitter_prob=0.0)


def test_targets_cover_the_canvas(tmp_path, repositories):
    """Each cell of the grid has the part that the triangle covers, also beside padding."""
    masks = torch.zeros(1, 112, 112, dtype=torch.uint8)
    rows, columns = torch.meshgrid(torch.arange(112), torch.arange(112), indexing="ij")
    masks[0, rows + columns < 112] = 255
    boxes, ratios = torch.tensor([[0.4, 0.5, 0.4, 0.6]]), torch.tensor([[0.75, 0.5]])
    pasted = paste_masks(masks, boxes, ratios, (32, 40))
    y, x = torch.meshgrid((torch.arange(320) + 0.5) / 320, (torch.arange(400) + 0.5) / 400, indexing="ij")
    u, v = (x / 0.5 - 0.2) / 0.4, (y / 0.75 - 0.2) / 0.6
    inside = ((u >= 0) & (v >= 0) & (u + v <= 1)).float()
    expected = F.avg_pool2d(inside[None], 10)
    assert (pasted - expected).abs().max() < 0.15
    assert (pasted - expected).abs().mean() < 0.003
    assert float(pasted.sum()) == pytest.approx(float(expected.sum()), rel=0.02)


@pytest.mark.parametrize(("scale", "rel"), [(4, 1e-5), (1, 0.1)], ids=["our masks", "masks of the input's size"])
def test_loss_equals_transformers(tmp_path, repositories, scale, rel):
    """The image processor makes masks of the input's size; a boundary cell of ours has the part that is covered."""
    detector = load_detector(repositories["rf_detr masks"], "cpu")  # without dropout, and one group of queries
    images, targets = batch_of(write_masked_dataset(tmp_path / "set"), detector)
    targets = [replace(t, has_mask=torch.ones_like(t.has_mask), masks=with_boxes(t)) for t in targets]
    images = images.normalize(detector.pixel_mean, detector.pixel_std)
    with torch.no_grad():
        torch.manual_seed(1)
        ours = detector.training_objective()(images, PackedTargets.pack(targets), 9, None)
        size = tuple(side // scale for side in images.pixels.shape[2:])
        labels = []
        for target in targets:
            masks = paste_masks(target.masks, target.boxes, torch.ones(len(target.labels), 2), size)
            masks = masks if scale > 1 else (masks > 0.5).float()
            labels.append({"class_labels": target.labels, "boxes": target.boxes, "masks": masks})
        torch.manual_seed(1)
        theirs = detector.network(pixel_values=images.pixels, labels=labels)
    assert float(ours["loss_mask"]) == pytest.approx(float(theirs.loss_dict["loss_mask_ce"]), rel=rel)
    assert float(ours["loss_dice"]) == pytest.approx(float(theirs.loss_dict["loss_mask_dice"]), rel=rel)
    assert float(ours["loss"]) == pytest.approx(float(theirs.loss), rel=rel)


def with_boxes(target):
    """Return a target's masks, whole boxes where there are none."""
    masks = target.masks.clone()
    masks[~target.has_mask] = 255
    return masks


def test_objects_without_masks_train_their_box_only(tmp_path, repositories):
    detector = load_detector(repositories["rf_detr masks"], "cpu")
    images, targets = batch_of(write_masked_dataset(tmp_path / "set"), detector)
    images = images.normalize(detector.pixel_mean, detector.pixel_std)
    objective = detector.training_objective()
    head = detector.network.query_features_proj.weight

    def gradient(changed):
        torch.manual_seed(1)
        detector.zero_grad()
        packed = PackedTargets.pack(changed)
        total, parts, finite = objective.losses(objective(images, packed, 9, None), packed, 1.0, 1.0)
        total.backward()
        assert all(finite)
        return None if head.grad is None else head.grad.clone(), parts

    none = [replace(target, has_mask=torch.zeros_like(target.has_mask)) for target in targets]
    for case in (none, [Target.empty(1, (64, 64))] * 8):
        grad, parts = gradient(case)
        assert grad is None or not grad.any()
        assert parts["loss_mask"] == parts["loss_dice"] == 0
    grad, parts = gradient(targets)
    assert grad is not None
    assert grad.abs().max() > 0
    assert min(parts["loss_mask"], parts["loss_dice"]) > 0


def test_a_fine_tuned_model_is_evaluated_on_masks(tmp_path, repositories):
    data, source = write_masked_dataset(tmp_path / "set"), repositories["rf_detr"]
    config = finetune_config(source).updated({
        "model": {"masks": True}, "data": {"workers": 0},
        "train": {"epochs": 2, "eval_every": 1, "warmup_steps": 0, "weights": str(source), "log_every": 1},
    })  # fmt: skip
    metrics = train_model(data, tmp_path / "run", config)
    assert metrics["segm"]["AP"] is not None
    assert metrics["best_AP"] >= metrics["segm"]["AP"]
    evaluated = evaluate(tmp_path / "run", data, workers=0, device="cpu")
    assert evaluated["segm"].keys() == metrics["segm"].keys()
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert {"loss_mask", "loss_dice"} <= rows[0].keys()
    assert "mask AP" in (tmp_path / "run/README.md").read_text()
    theirs = transformers.AutoModelForInstanceSegmentation.from_pretrained(tmp_path / "run")
    assert theirs.config.id2label == {0: "red", 1: "green", 2: "blue"}


def test_training_lowers_the_mask_losses(tmp_path, repositories):
    torch.manual_seed(0)
    detector = load_detector(repositories["rf_detr masks"], "cpu").train()
    batch = batch_of(write_masked_dataset(tmp_path / "set"), detector)
    step = TrainStep(detector, TrainConfig(lr=2e-3, backbone_lr_mult=0.5, sampling_lr_mult=1.0, clip_max_norm=1.0))
    history = [step.step([batch], global_step=number, progress=0.0) for number in range(30)]
    losses = [sum(row.values[name] for name in ("loss_mask", "loss_dice")) for row in history if row]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5]), losses
