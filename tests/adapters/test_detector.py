"""transformers' detectors through the adapter: equal outputs, detections, saved files, and one-line errors."""

import copy
import json
import os
import shutil

import pytest
import torch
from packaging.version import Version
from tests.support.commands import run_command
from tests.support.special_files import needs_pipes, replace_by_pipe
from tests.support.training import write_dataset
from tests.support.transformers_models import CONFIGS, NAMES, pictures, write_repository
from tests.support.weights import tiny_model
from torch import Tensor

from deformable_detr import DeformableDETR, UserError
from deformable_detr.adapters import families
from deformable_detr.adapters.config_checks import check_config
from deformable_detr.adapters.detector import TransformersDetector
from deformable_detr.config.image_size import FixedSize, ShortestEdge
from deformable_detr.data.dataloader import pad_images
from deformable_detr.data.transforms import resize
from deformable_detr.detector import load_detector
from deformable_detr.utils.images import read_image

transformers = pytest.importorskip("transformers", reason="needs transformers")


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=["fp32", "fp64"])
def dtype(request):
    return request.param


@pytest.fixture(scope="module", params=CONFIGS)
def saved(request, dtype, tmp_path_factory):
    """Folder, transformers' network and image processor."""
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "-"))
    return folder, *write_repository(folder, request.param, dtype)


def outputs_of(network, inputs):
    with torch.no_grad():
        return network(**inputs)


def test_outputs_and_detections_equal_transformers(saved, dtype):
    folder, network, processor = saved
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    detector = load_detector(folder, "cpu")
    assert detector.config.class_names == NAMES
    assert detector.pixel_mean.dtype == dtype
    for images in (*([image] for image in pictures()), pictures()):
        inputs = processor(images=images, return_tensors="pt")
        inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
        expected = outputs_of(network, inputs)
        mask = inputs.get("pixel_mask")
        with torch.no_grad():
            actual = detector(inputs["pixel_values"], None if mask is None else mask == 0)
        assert (actual["pred_logits"] - expected.logits).abs().max() <= tolerance
        assert (actual["pred_boxes"] - expected.pred_boxes).abs().max() <= tolerance
        if len(images) > 1:
            continue
        (image,) = images
        size = torch.tensor([[image.height, image.width]])
        (theirs,) = processor.post_process_object_detection(expected, threshold=0.0, target_sizes=size)
        if detector.config.family == "rf_detr":  # it resizes floats, we round to 8 bits
            if Version(transformers.__version__) < Version("5.18"):  # these releases smooth images that they shrink
                continue
            batch = pad_images([resize(read_image(image), detector.resize_rule)])
            pixels = batch.normalize(detector.pixel_mean, detector.pixel_std).pixels
            assert (pixels - inputs["pixel_values"]).abs().max() < 1.01 / 255 / detector.pixel_std.min()
            continue
        ours = detector.predict(image, threshold=0.0, top_k=len(theirs["scores"]))
        torch.testing.assert_close(ours.scores.to(dtype), theirs["scores"], atol=1e-4, rtol=0)
        clipped = torch.minimum(theirs["boxes"].clamp(min=0), size.flip(1).repeat(1, 2))
        for label, score, box in zip(theirs["labels"], theirs["scores"], clipped, strict=True):
            near = (ours.labels == label) & ((ours.scores - score).abs() < 1e-4)
            assert ((ours.boxes - box).abs().amax(1) < 0.05)[near].any()


def test_batches_equal_single_images(saved, dtype):
    folder, *_ = saved
    detector = load_detector(folder, "cpu")
    if detector.config.resize != "fixed":
        pytest.skip("the backbone reads the padding of a batch")
    single = [detector.predict(image, 0.0, 5) for image in pictures()]
    for one, many in zip(single, detector.predict(pictures(), 0.0, 5, batch_size=3), strict=True):
        torch.testing.assert_close(one.scores, many.scores, atol=1e-4 if dtype == torch.float32 else 1e-5, rtol=0)
        torch.testing.assert_close(one.boxes, many.boxes, atol=1e-2, rtol=0)


def test_saved_model_loads_in_transformers_and_here(saved, dtype, tmp_path):
    folder, network, processor = saved
    detector = load_detector(folder, "cpu")
    detector.config = detector.config.replace(category_ids=(7, 1, 90))
    detector.save_pretrained(tmp_path / "out")
    again = load_detector(tmp_path / "out", "cpu")
    assert again.config == detector.config
    theirs = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path / "out", dtype=dtype).eval()
    their_processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert theirs.config.id2label == dict(enumerate(NAMES))
    image, tolerance = pictures()[1], 1e-5 if dtype == torch.float32 else 1e-10
    inputs = processor(images=image, return_tensors="pt")
    assert torch.equal(their_processor(images=image, return_tensors="pt")["pixel_values"], inputs["pixel_values"])
    inputs = {"pixel_values": inputs["pixel_values"].to(dtype)}
    expected = outputs_of(network, inputs)
    for logits in (
        outputs_of(theirs, inputs).logits,
        outputs_of(again, {"pixels": inputs["pixel_values"]})["pred_logits"],
    ):
        torch.testing.assert_close(logits, expected.logits, atol=tolerance, rtol=0)


def test_overridden_fields_are_saved(rt_detr, tmp_path):
    changes = {"class_names": ("x", "y", "z"), "category_ids": (5, 6, 7), "image_size": 128}
    model = TransformersDetector.from_pretrained(rt_detr, **changes)
    model.save_pretrained(tmp_path)
    config = load_detector(tmp_path, "cpu").config
    assert config == model.config.replace(processor=config.processor)
    described = transformers.AutoConfig.from_pretrained(tmp_path)
    assert described.id2label == {0: "x", 1: "y", 2: "z"}
    assert described.label2id == {"x": 0, "y": 1, "z": 2}


def test_processor_config(rt_detr, tmp_path):
    """The file that transformers prefers is read, and does not outlive the model that it belongs to."""
    shutil.copytree(rt_detr, tmp_path, dirs_exist_ok=True)
    stale = {"image_processor": {"size": {"height": 64, "width": 32}, "image_processor_type": "RTDetrImageProcessor"}}
    (tmp_path / "processor_config.json").write_text(json.dumps(stale))
    assert load_detector(tmp_path, "cpu").resize_rule == FixedSize(64, 32)
    load_detector(rt_detr, "cpu").save_pretrained(tmp_path)
    assert transformers.AutoImageProcessor.from_pretrained(tmp_path).size["height"] == 96
    assert load_detector(tmp_path, "cpu").resize_rule == FixedSize(96, 96)


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"size": {"shortest_edge": 96, "longest_edge": 160}, "do_pad": True}, 2),
        ({"do_rescale": False, "do_normalize": True, "image_mean": [120, 110, 100], "image_std": [60.1, 58, 57]}, 1),
        ({"size": {"max_height": 101, "max_width": 101}}, 1),
    ],
)
def test_the_image_processor_is_kept(rt_detr, tmp_path, settings, count):
    shutil.copytree(rt_detr, tmp_path / "a")
    path = tmp_path / "a/preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    model = TransformersDetector.from_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    assert load_detector(tmp_path / "b", "cpu").config == model.config
    before, after = (
        transformers.AutoImageProcessor.from_pretrained(tmp_path / name)(pictures(count), return_tensors="pt")
        for name in "ab"
    )
    assert torch.equal(before["pixel_values"], after["pixel_values"])
    model.config = model.config.replace(resize="fixed", image_size=128, max_size=None)
    model.save_pretrained(tmp_path / "c")
    changed = json.loads((tmp_path / "c/preprocessor_config.json").read_text())
    with pytest.raises(UserError, match=r"^model.processor: size .* must be 1 to 32768"):
        TransformersDetector(model.config.replace(processor={"size": 70000}))
    with pytest.raises(UserError, match=r"^model.processor: size .* must be 1 to 32768"):
        TransformersDetector(model.config.replace(processor={"size": 70000}))
    assert changed == {**json.loads(path.read_text()), "size": {"height": 128, "width": 128}}


@pytest.mark.parametrize("native", [False, True])
def test_an_interrupted_save_is_no_model(rt_detr, tmp_path, native, monkeypatch):
    source = tiny_model() if native else TransformersDetector.from_pretrained(rt_detr)
    source.save_pretrained(tmp_path)
    changed = source.config.replace(class_names=tuple(f"x{label}" for label in range(source.config.num_classes)))
    source.config, replace = changed, os.replace

    def interrupted(temporary, path):
        replace(temporary, path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            source.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"has no config\.json"):
        load_detector(tmp_path)


def matched_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[key] - b[key]).abs().max()) for key in ("pred_logits", "pred_boxes"))


def test_optimized_outputs_are_equal(saved, dtype):
    if dtype != torch.float32:
        pytest.skip("optimized models are fp32")
    folder, *_ = saved
    detector = load_detector(folder, "cpu")
    optimized = detector.optimize()
    left = [type(module).__name__ for module in optimized.modules()]
    assert not [name for name in left if "BatchNorm" in name]
    side = detector.config.image_size
    pixels = torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = detector(pixels)
    assert matched_difference(optimized(pixels), expected) < 1e-4
    assert optimized.optimize() is optimized
    assert len(optimized.predict(pictures(), 0.0, 4)) == 3


def test_resize_rules(rt_detr, tmp_path):
    assert load_detector(rt_detr).resize_rule == FixedSize(96, 96)
    shutil.copytree(rt_detr, tmp_path / "wide")
    processor = tmp_path / "wide/preprocessor_config.json"
    for size, rule in (
        ({"height": 64, "width": 128}, FixedSize(64, 128)),
        ({"shortest_edge": 96, "longest_edge": 160}, ShortestEdge(96, 160, 32, exact_ratio=True)),
    ):
        processor.write_text(json.dumps({**json.loads(processor.read_text()), "size": size}))
        assert load_detector(tmp_path / "wide").resize_rule == rule
    processor.unlink()
    assert load_detector(tmp_path / "wide").resize_rule == FixedSize(640, 640)
    assert TransformersDetector.from_pretrained(rt_detr, image_size=128).resize_rule == FixedSize(128, 128)


@pytest.mark.parametrize(("short", "long"), [(800, 1333), (64, 107), (480, 640), (96, 96)])
def test_sides_equal_transformers(short, long):
    from transformers.image_transforms import get_size_with_aspect_ratio

    rule = ShortestEdge(short, long, exact_ratio=True)
    plain = ShortestEdge(short, long)
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(3, 3000, (3000, 2), generator=generator).tolist()
    for height, width in [*sizes, (short, long), (long, short), (short, 3 * long), (short, short)]:
        theirs = get_size_with_aspect_ratio((height, width), short, long)
        assert rule(height, width) == tuple(max(1, side) for side in theirs), (height, width)
    assert any(rule(*size) != plain(*size) for size in sizes), "control: the official code rounds otherwise"


def change(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing tensor", "missing keys in the weights: model.decoder"),
        ("extra tensor", "unexpected keys in the weights: extra"),
        ("other shape", "cannot be loaded by transformers|mismatched keys"),
        ("truncated", "cannot be loaded by transformers"),
        ("size", "image_size and image_width must be multiples of 32"),
        ("resample", "resample 3 is not supported; only bilinear"),
        ("other family", "model_type 'grounding-dino'"),
    ],
)
def test_broken_repositories(rt_detr, tmp_path, kind, message):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(rt_detr, folder)
    weights, processor = folder / "model.safetensors", folder / "preprocessor_config.json"
    tensors, settings = load_file(weights), json.loads(processor.read_text())
    name = next(key for key in sorted(tensors) if key.startswith("model.decoder") and tensors[key].dim() > 1)
    if kind == "missing tensor":
        del tensors[name]
    elif kind == "extra tensor":
        tensors["extra"] = torch.zeros(3)
    elif kind == "other shape":
        tensors[name] = torch.zeros(1, 1)
    elif kind == "size":
        settings["size"] = {"height": 100, "width": 96}
    elif kind == "resample":
        settings["resample"] = 3
    elif kind == "other family":
        change(folder, model_type="grounding-dino")
    save_file(tensors, weights, metadata={"format": "pt"})
    processor.write_text(json.dumps(settings))
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=message) as error:
        load_detector(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_labels": 10**9, "id2label": None}, "num_labels 1000000000 is more than 2048"),
        ({"decoder_layers": 10**5}, r"decoder_layers 100000 is more than \d+"),
        ({"d_model": 10**9}, "d_model 1000000000"),
        ({"anchor_image_size": [10**6, 640]}, "anchor_image_size 1000000 is more than 32768"),
        ({"encoder_in_channels": [16, 24, 10**9]}, "encoder_in_channels 1000000000"),
        ({"backbone_config": {"model_type": "rt_detr_resnet", "depths": [1, 1, 9999, 1]}}, "backbone_config.depths"),
        ({"id2label": {"0": "a", "2": "b", "5": "c"}}, "id2label must map the labels 0, 1, …"),
        ({"id2label": ["a", "b", "c"]}, "id2label must map"),
        ({"return_dict": False}, "return_dict false is not supported"),
        ({"backbone": "evil/x", "backbone_config": None}, "backbone 'evil/x' needs a backbone_config"),
        (
            {"backbone": "resnet50", "backbone_config": None, "use_timm_backbone": True},
            "backbone 'resnet50' needs a backbone_config",
        ),
        ({"attn_implementation": "evil/kernel"}, "attn_implementation 'evil/kernel' is not supported"),
        ({"attn_implementation": {"": "evil/kernel"}}, "attn_implementation"),
    ],
)
def test_configs_that_transformers_is_not_to_build(rt_detr, tmp_path, changes, message, monkeypatch):
    shutil.copytree(rt_detr, tmp_path, dirs_exist_ok=True)
    change(tmp_path, **changes)
    for name in ("AutoConfig", "AutoModelForObjectDetection"):  # refused before it sees the config
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", None)
    with pytest.raises(UserError, match=message) as error:
        load_detector(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'config.json'}: ")
    assert "\n" not in str(error.value)


@needs_pipes
def test_configs_beside_other_weights_and_pipes(tmp_path):
    path = tmp_path / "config.json"
    check_config({"d_model": 100_000}, path)
    with pytest.raises(UserError, match="d_model 100001 is more than 100000"):
        check_config({"d_model": 100_001}, path)
    replace_by_pipe(tmp_path / "preprocessor_config.json")
    with pytest.raises(UserError, match=r"preprocessor_config\.json cannot be read: not a regular file"):
        check_config({}, path)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(rt_detr, tmp_path, native, value):
    source = tiny_model() if native else TransformersDetector.from_pretrained(rt_detr)
    name, parameter = next((name, each) for name, each in source.named_parameters() if "decoder" in name)
    with torch.no_grad():
        parameter.view(-1)[0] = value
    source.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"tensor {name.removeprefix('network.')} has values that are NaN"):
        load_detector(tmp_path)


@pytest.mark.parametrize("size", [[96, 96], "96", 96.0])
def test_sizes_of_other_types(rt_detr, tmp_path, size):
    shutil.copytree(rt_detr, tmp_path, dirs_exist_ok=True)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": size}))
    with pytest.raises(UserError, match=r"preprocessor_config.json: size .* must be a number of pixels"):
        load_detector(tmp_path)


def test_deformable_detr_names_the_family(rt_detr):
    with pytest.raises(UserError, match="is not a Deformable DETR but a RT-DETR: use load_detector"):
        DeformableDETR.from_pretrained(rt_detr)
    with pytest.raises(UserError, match="num_queries cannot be overridden; these can: image_size"):
        TransformersDetector.from_pretrained(rt_detr, num_queries=3)


def test_deformable_detr_by_either_network(tmp_path):
    """The own network where it can run a config, else transformers' code."""
    name = "deformable_detr odd"
    write_repository(tmp_path, name)
    path = tmp_path / "config.json"
    assert isinstance(load_detector(tmp_path, "cpu"), TransformersDetector)
    with pytest.raises(UserError, match="ffn_dim must be equal; load_detector uses transformers' network for it"):
        DeformableDETR.from_pretrained(tmp_path)
    values = json.loads(path.read_text())
    equal = {"decoder_ffn_dim": 48, "activation_function": "relu", "encoder_attention_heads": 4}
    for changes, message in (
        ({}, r"the backbone's out_indices are \[1, 3\]; supported are \[2, 3, 4\]"),
        ({"backbone_config": {**values["backbone_config"], "output_stride": 8}}, "output_stride is 8"),
        ({"backbone_config": {**values["backbone_config"], "backbone": "hf-hub:a/b"}}, "'hf-hub:a/b' is not a timm"),
        ({"two_stage": True}, "two_stage requires refine"),
    ):
        change(tmp_path, **{**values, **equal, **changes})
        with pytest.raises(UserError, match=message):
            DeformableDETR.from_pretrained(tmp_path)
    change(tmp_path, **{**values, "backbone_config": {**values["backbone_config"], "backbone": "hf-hub:a/b"}})
    with pytest.raises(UserError, match="backbone 'hf-hub:a/b' is not a timm model"):
        load_detector(tmp_path)


def test_without_transformers_the_own_loader_names_what_it_lacks(tmp_path, monkeypatch):
    write_repository(tmp_path, "deformable_detr")
    monkeypatch.setattr(families, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="attention_heads must be equal"):
        load_detector(tmp_path)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("grounding-dino", "which needs a text prompt"),
        ("mm-grounding-dino", "which needs a text prompt"),
        ("omdet-turbo", "which needs a text prompt"),
        ("owlvit", "which needs a text prompt"),
        ("mask2former", "which segments images"),
        ("detr", "which has no multi-scale deformable attention"),
        ("yolos", "which has no multi-scale deformable attention"),
        ("table-transformer", "which has no multi-scale deformable attention"),
        ("bert", "these are supported: rt_detr"),
    ],
)
def test_other_models_of_transformers_are_refused(model_type, reason, tmp_path, capsys):
    folder = tmp_path / "model"
    transformers.CONFIG_MAPPING[model_type]().save_pretrained(folder)
    image = tmp_path / "image.png"
    pictures()[0].save(image)
    with pytest.raises(UserError) as error:
        load_detector(folder)
    assert str(error.value).startswith(f"{folder / 'config.json'} is of model_type '{model_type}'")
    assert reason in str(error.value)
    data = write_dataset(tmp_path / "set")
    train = ("train", str(data), "--weights", str(folder), "--out", str(tmp_path / "run"))
    for words in (("predict", str(folder), str(image)), train):
        code, _, text = run_command(capsys, *words)
        assert code == 2
        assert text == f"error: {error.value}\n"
    assert not (tmp_path / "run/config.yaml").exists()


def test_evaluate(rt_detr, tmp_path):
    from deformable_detr.evaluation import evaluate

    metrics = evaluate(str(rt_detr), write_dataset(tmp_path / "set"), progress=False, workers=0)
    assert metrics["images"] == 4
    assert 0 <= metrics["AP"] <= 1


def test_labels_of_coco_get_its_category_ids(tmp_path):
    config = transformers.CONFIG_MAPPING["lw_detr"].from_dict({**copy.deepcopy(CONFIGS["lw_detr"]), "num_labels": 91})
    transformers.AutoModelForObjectDetection.from_config(config).save_pretrained(tmp_path)
    transformers.DeformableDetrImageProcessor(size={"height": 128, "width": 128}).save_pretrained(tmp_path)
    loaded = load_detector(tmp_path, "cpu").config
    assert loaded.category_ids == tuple(range(91))
    assert (loaded.class_names[1], loaded.class_names[90]) == ("person", "toothbrush")
