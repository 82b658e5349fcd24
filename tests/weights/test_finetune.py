"""Fine-tuning: the weights copied from another model and the transfer report."""

import math

import pytest
import torch

from deformable_detr import DeformableDETR, UserError
from deformable_detr.config import presets
from deformable_detr.weights.finetune import finetune_config, load_for_finetuning, transfer_weights
from deformable_detr.weights.load import read_checkpoint
from tests.support.parity import batch
from tests.support.weights import TINY_FIELDS, tiny_model

PRIOR = -math.log(99)


@pytest.fixture
def source(native_model, native_folder):
    """A two-stage model of cat, dog and cow, and its folder."""
    return native_model, native_folder


def new_model(variant=presets.two_stage, **changes) -> DeformableDETR:
    torch.manual_seed(1)
    return DeformableDETR(variant(**{**TINY_FIELDS, **changes}))


def transfer(model, source, log=lambda line: None):
    checkpoint = read_checkpoint(source)
    report = transfer_weights(model, checkpoint)
    for line in report.lines(checkpoint.path):
        log(line)
    return report


def test_same_network_and_classes_copy_all_tensors(source):
    model, folder = source
    new = new_model()
    lines = []
    report = transfer(new, folder, lines.append)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in new.state_dict().items())
    assert not report.partial
    assert not report.initialized
    count = len(report.loaded)
    assert lines == [f"loaded {count} of {count} tensors from {folder / 'model.safetensors'}"]


def test_class_rows_are_matched_by_name_and_others_start_at_the_prior(source):
    model, folder = source
    new = new_model(class_names=("sheep", "Cow", "cat", "duck"), category_ids=(), num_classes=4)
    before = {name: value.clone() for name, value in new.state_dict().items()}
    lines = []
    transfer(new, folder, lines.append)
    for layer in range(2):
        head, old = new.decoder.heads.classes[layer], model.decoder.heads.classes[layer]
        assert torch.equal(head.weight[1], old.weight[2])
        assert torch.equal(head.weight[2], old.weight[0])
        assert torch.equal(head.bias[[1, 2]], old.bias[[2, 0]])
        assert head.bias[[0, 3]].tolist() == pytest.approx([PRIOR, PRIOR])
        assert torch.equal(head.weight[0], before[f"decoder.heads.classes.{layer}.weight"][0])
    # Column 0 of the encoder head is class-agnostic.
    encoder, old = new.decoder.heads.classes[2], model.decoder.heads.classes[2]
    assert torch.equal(encoder.weight[0], old.weight[0])
    assert encoder.bias[1:].tolist() == pytest.approx([PRIOR] * 3)
    other_names = [name for name in before if "heads.classes" not in name]
    assert all(torch.equal(new.state_dict()[name], model.state_dict()[name]) for name in other_names)
    assert len(lines) == 3
    assert "partial" in lines[1]
    assert "kept 2 of the same name" in lines[1]
    assert "score of 'object'" in lines[2]
    assert new(*batch())["pred_logits"].isfinite().all()


def test_no_class_in_common(source):
    model, folder = source
    new = new_model(presets.two_stage, class_names=("a", "b", "c"), category_ids=())
    report = transfer(new, folder)
    assert torch.allclose(new.decoder.heads.classes[0].bias, torch.full((3,), PRIOR))
    assert new.decoder.heads.classes[0].weight.ne(model.decoder.heads.classes[0].weight).all()
    assert "none of the same name" in report.initialized["decoder.heads.classes.0.bias"]


def test_placeholder_names_do_not_match(tmp_path):
    tiny_model(class_names=("N/A", "LABEL_1", "dog"), category_ids=()).save_pretrained(tmp_path)
    new = new_model(class_names=("N/A", "LABEL_1", "dog", "cat"), category_ids=(), num_classes=4)
    assert "kept 1 of the same name" in transfer(new, tmp_path).partial["decoder.heads.classes.0.bias"]


def test_other_variants_copy_shared_tensors(source, tmp_path):
    model, folder = source
    new = new_model(presets.multi_scale)
    report = transfer(new, folder)
    assert "query_embedding.weight" in report.initialized
    assert "proposals.memory_proj.weight" in report.unused
    assert torch.equal(new.decoder.heads.boxes[0].layers[0].weight, model.decoder.heads.boxes[1].layers[0].weight)

    plain = tiny_model(presets.multi_scale)
    plain.save_pretrained(tmp_path / "plain")
    refined = new_model(presets.refine)
    report = transfer(refined, tmp_path / "plain")
    assert not report.initialized
    for head in refined.decoder.heads.boxes:  # copied from the shared head
        assert torch.equal(head.layers[2].bias, plain.decoder.heads.boxes[0].layers[2].bias)

    deeper = new_model(decoder_layers=3)
    report = transfer(deeper, folder)
    assert torch.equal(deeper.decoder.heads.classes[3].bias, model.decoder.heads.classes[2].bias)
    assert "decoder.heads.classes.2.bias" in report.initialized
    assert "decoder.layers.2.norm1.weight" in report.initialized


def test_more_queries_and_more_levels(tmp_path):
    plain = tiny_model(presets.refine, num_feature_levels=3)
    plain.save_pretrained(tmp_path)
    new = new_model(presets.refine, num_feature_levels=5, num_queries=25)
    before = {name: value.clone() for name, value in new.state_dict().items()}
    report = transfer(new, tmp_path)
    assert torch.equal(new.query_embedding.weight[:20], plain.query_embedding.weight)
    assert torch.equal(new.query_embedding.weight[20:], before["query_embedding.weight"][20:])
    assert torch.equal(new.level_embedding[:3], plain.level_embedding)
    name = "decoder.layers.0.cross_attn.attention_weights.weight"
    weight, old = new.state_dict()[name].view(4, 5, 4, -1), plain.state_dict()[name].view(4, 3, 4, -1)
    assert torch.equal(weight[:, :3], old)
    assert torch.equal(weight[:, 3:], before[name].view(4, 5, 4, -1)[:, 3:])
    assert report.partial["query_embedding.weight"] == "new: queries from 21 on"
    assert report.partial["level_embedding"] == "new: stride 64, stride 128"
    assert "projections.levels.4.0.weight" in report.initialized
    assert new(*batch())["pred_logits"].isfinite().all()


def test_single_level_is_matched_by_stride(tmp_path):
    plain = tiny_model(presets.single_scale)
    plain.save_pretrained(tmp_path)
    new = new_model(presets.multi_scale)
    transfer(new, tmp_path)
    assert torch.equal(new.level_embedding[2], plain.level_embedding[0])
    assert torch.equal(new.projections.levels[2][0].weight, plain.projections.levels[0][0].weight)


def test_another_backbone_is_not_overwritten(source):
    _, folder = source
    new = new_model(backbone="resnet10t")
    before = new.backbone.body.conv1[0].weight.clone()
    report = transfer(new, folder)
    assert torch.equal(new.backbone.body.conv1[0].weight, before)
    assert any("the source's backbone is test_resnet, not resnet10t" in reason for reason in report.unused.values())
    assert "in the source (" in report.initialized["projections.levels.0.0.weight"]
    assert "encoder.layers.0.norm1.weight" in report.loaded


def test_norm_statistics_are_copied_between_frozen_and_trained_norms(source):
    model, folder = source
    new = new_model(backbone_norm="frozen")
    transfer(new, folder)
    name = "backbone.body.bn1.running_var"
    assert torch.equal(new.state_dict()[name], model.state_dict()[name])


def test_no_matching_tensors_is_an_error(source):
    _, folder = source
    with pytest.raises(UserError, match=r"no weights of .* fit this model: their hidden_dim is 64"):
        transfer(new_model(hidden_dim=32, ffn_dim=32, backbone="resnet10t"), folder)
    with pytest.raises(UserError, match="no such folder"):
        transfer(new_model(), folder / "gone")


def test_config_from_a_source(source, tmp_path):
    _, folder = source
    config = finetune_config(folder)
    assert (config.preset, config.model.hidden_dim, config.model.backbone) == ("two-stage", 64, "test_resnet")
    assert (config.model.class_names, config.model.category_ids, config.model.backbone_weights) == ((), (), "none")
    assert config.train == presets.config("two-stage").train
    tiny_model(presets.small).save_pretrained(tmp_path / "small")
    assert finetune_config(tmp_path / "small").train == presets.config("small").train


@pytest.mark.parametrize(
    "change",
    [
        {"num_feature_levels": 3},
        {"iterative_query_pos": False},
        {"query_init": "learned"},
        {"class_aware_proposals": False},
    ],
)
def test_preset_of_a_modified_network_is_recognized(tmp_path, change):
    tiny_model(presets.small, **change).save_pretrained(tmp_path / "small")
    assert finetune_config(tmp_path / "small").preset == "small"


def test_small_to_small_portable(tmp_path):
    """Tensors that only one of the presets has keep their initial values."""
    small = tiny_model(presets.small)
    small.save_pretrained(tmp_path / "small")
    tiny_model(presets.small_portable).save_pretrained(tmp_path / "portable")
    assert finetune_config(tmp_path / "small").preset == "small"
    assert finetune_config(tmp_path / "portable").preset == "small-portable"
    new = new_model(presets.small_portable)
    before = {name: value.clone() for name, value in new.state_dict().items()}
    lines = []
    report = transfer(new, tmp_path / "small", lines.append)
    assert sorted(report.initialized) == [
        "decoder.heads.classes.2.bias", "decoder.heads.classes.2.weight", "proposals.query_norm.bias",
        "proposals.query_norm.weight", "proposals.query_proj.bias", "proposals.query_proj.weight",
    ]  # fmt: skip
    assert all(name.startswith(("decoder.position_head.", "roi_head.")) for name in report.unused)
    assert "the source has class_aware_proposals True" in report.initialized["decoder.heads.classes.2.weight"]
    for name, value in new.state_dict().items():
        assert torch.equal(value, before[name] if name in report.initialized else small.state_dict()[name]), name
    assert torch.equal(new.decoder.heads.classes[2].bias, torch.full((3,), PRIOR))


def test_source_with_the_same_backbone_needs_no_download(source, monkeypatch):
    import timm

    model, folder = source
    create = timm.create_model

    def offline(*names, pretrained=False, **options):
        assert not pretrained
        return create(*names, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    new = load_for_finetuning(model.config.replace(backbone_weights="hub"), folder, lambda line: None, DeformableDETR)
    assert type(new) is DeformableDETR
    assert torch.equal(new.level_embedding, model.level_embedding)
    assert not new.backbone.body.conv1[0].weight.requires_grad


def test_training_from_weights(tmp_path, capsys):
    from deformable_detr import train
    from tests.support.training import write_dataset

    folder = tmp_path / "source"
    tiny_model(class_names=("cat", "Green", "red")).save_pretrained(folder)
    data = write_dataset(tmp_path / "set")
    settings = {"epochs": 1, "batch_size": 4, "image_size": 64, "workers": 0, "device": "cpu"}
    metrics = train(data, tmp_path / "run", weights=str(folder), **settings)
    assert metrics["step"] > 0
    out = capsys.readouterr().out
    assert f"tensors from {folder / 'model.safetensors'}" in out
    assert "kept 2 of the same name" in out
    assert "its score of 'object'" in out
    config = DeformableDETR.from_pretrained(tmp_path / "run").config
    assert (config.backbone, config.hidden_dim, config.image_size) == ("test_resnet", 64, 64)
    assert config.class_names == ("red", "green", "blue")
    text = (tmp_path / "run" / "README.md").read_text()
    assert "## Data\n\nset\n" in text
    assert "AP50" in text or "Not measured" in text
    train(data, tmp_path / "run", resume=True, epochs=2)  # resumes with the run's own weights
    assert "tensors from" not in capsys.readouterr().out


def test_print_config_includes_the_network_of_the_weights(source, capsys):
    import yaml

    from deformable_detr import cli

    model, folder = source
    cli.main(["train", "--weights", str(folder), "--image-size", "96", "--print-config"])
    config = yaml.safe_load(capsys.readouterr().out)
    assert (config["train"]["weights"], config["preset"]) == (str(folder), "two-stage")
    assert (config["model"]["hidden_dim"], config["model"]["image_size"]) == (model.config.hidden_dim, 96)
    cli.main(["train", "--weights", str(folder), "--preset", "refine", "--print-config"])
    assert yaml.safe_load(capsys.readouterr().out)["model"]["hidden_dim"] == 256


def test_boxes_to_masks_and_back(source, tmp_path):
    model, folder = source
    lines = []
    masks = new_model(masks=True, num_classes=3, class_names=model.config.class_names)
    initial = {name: value.clone() for name, value in masks.state_dict().items()}
    report = transfer(masks, folder, lines.append)
    assert list(report.initialized) == [name for name in initial if name.startswith("mask_head.")]
    for name, value in masks.state_dict().items():
        expected = initial if name in report.initialized else model.state_dict()
        assert torch.equal(value, expected[name]), name
    assert any("new: mask_head." in line and "not in the source" in line for line in lines)

    masks.save_pretrained(tmp_path / "masks")
    loaded = DeformableDETR.from_pretrained(tmp_path / "masks")
    assert loaded.config.masks
    assert all(torch.equal(value, masks.state_dict()[name]) for name, value in loaded.state_dict().items())
    boxes, lines = new_model(num_classes=3, class_names=model.config.class_names), []
    report = transfer(boxes, tmp_path / "masks", lines.append)
    assert not report.initialized
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in boxes.state_dict().items())
    assert any("unused: mask_head." in line and "not in this model" in line for line in lines)


def test_masks_are_inherited_and_can_be_changed(source, tmp_path, capsys):
    import yaml

    from deformable_detr import cli

    def masks(*options):
        cli.main(["train", *options, "--print-config"])
        return yaml.safe_load(capsys.readouterr().out)["model"]["masks"]

    _, folder = source
    new_model(masks=True).save_pretrained(tmp_path / "masks")
    assert not masks("--weights", str(folder))
    assert masks("--weights", str(folder), "--masks")
    assert masks("--weights", str(tmp_path / "masks"))
    assert not masks("--weights", str(tmp_path / "masks"), "--no-masks")
    assert not masks()
    assert masks("--masks")
    assert masks("--preset", "single-scale", "--masks")
    assert masks("--preset", "small-masks")


def test_small_masks_is_the_preset_of_a_small_network_with_masks(tmp_path):
    options = {"backbone_weights": "none", "num_classes": 3}
    DeformableDETR(presets.small_masks(**options)).save_pretrained(tmp_path / "masks")
    assert finetune_config(tmp_path / "masks").preset == "small-masks"
    DeformableDETR(presets.small(**options)).save_pretrained(tmp_path / "boxes")
    assert finetune_config(tmp_path / "boxes").preset == "small"
