"""Fine-tuning: what a new model takes from another one, what not, and what is said about it."""

import math

import pytest
import torch

from deformable_detr import DeformableDETR, UserError
from deformable_detr.config import presets
from deformable_detr.weights.finetune import begin, load_for_training, starting_config
from tests.model.test_parity import batch
from tests.weights.test_load import OURS, ours

PRIOR = -math.log(99)


@pytest.fixture
def source(tmp_path):
    """A two-stage model of cat, dog and cow."""
    model = ours()
    model.save_pretrained(tmp_path / "source")
    return model, tmp_path / "source"


def fresh(variant=presets.two_stage, **changes) -> DeformableDETR:
    torch.manual_seed(1)
    return DeformableDETR(variant(**{**OURS, **changes}))


def quiet(line: str) -> None:
    """Nobody reads this."""


def test_the_same_network_and_classes_take_everything(source):
    model, folder = source
    new = fresh()
    said = []
    report = load_for_training(new, folder, said.append)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in new.state_dict().items())
    assert not report.partly
    assert not report.fresh
    assert said == [f"weights of {folder}: {len(report.loaded)} of {len(report.loaded)} tensors loaded"]


def test_other_classes_start_at_the_prior_and_namesakes_keep_their_rows(source):
    model, folder = source
    new = fresh(class_names=("sheep", "Cow", "cat", "duck"), category_ids=(), num_classes=4)
    before = {name: value.clone() for name, value in new.state_dict().items()}
    said = []
    report = load_for_training(new, folder, said.append)
    assert report.classes == ["Cow", "cat"]
    for layer in range(2):
        head, old = new.decoder.heads.classes[layer], model.decoder.heads.classes[layer]
        assert torch.equal(head.weight[1], old.weight[2])
        assert torch.equal(head.weight[2], old.weight[0])
        assert torch.equal(head.bias[[1, 2]], old.bias[[2, 0]])
        assert head.bias[[0, 3]].tolist() == pytest.approx([PRIOR, PRIOR])
        assert torch.equal(head.weight[0], before[f"decoder.heads.classes.{layer}.weight"][0])
    # The encoder's own head says "object" in column 0, whatever that class is called.
    encoder, old = new.decoder.heads.classes[2], model.decoder.heads.classes[2]
    assert torch.equal(encoder.weight[0], old.weight[0])
    assert encoder.bias[1:].tolist() == pytest.approx([PRIOR] * 3)
    everything_else = [name for name in before if "heads.classes" not in name]
    assert all(torch.equal(new.state_dict()[name], model.state_dict()[name]) for name in everything_else)
    assert len(said) == 3
    assert "partly" in said[1]
    assert "2 classes of the same name" in said[1]
    assert "score of 'object'" in said[2]
    assert new(*batch())["pred_logits"].isfinite().all()


def test_no_class_in_common(source):
    model, folder = source
    new = fresh(presets.two_stage, class_names=("a", "b", "c"), category_ids=())
    report = load_for_training(new, folder, quiet)
    assert report.classes == []
    assert torch.allclose(new.decoder.heads.classes[0].bias, torch.full((3,), PRIOR))
    assert new.decoder.heads.classes[0].weight.ne(model.decoder.heads.classes[0].weight).all()
    assert "none of the same name" in report.fresh["decoder.heads.classes.0.bias"]


def test_stand_ins_for_names_are_no_names(tmp_path):
    ours(class_names=("N/A", "LABEL_1", "dog"), category_ids=()).save_pretrained(tmp_path)
    new = fresh(class_names=("N/A", "LABEL_1", "dog", "cat"), category_ids=(), num_classes=4)
    assert load_for_training(new, tmp_path, quiet).classes == ["dog"]


def test_other_variants_take_what_they_share(source, tmp_path):
    model, folder = source
    new = fresh(presets.multi_scale)
    report = load_for_training(new, folder, quiet)
    assert "query_embedding.weight" in report.fresh
    assert "proposals.memory_proj.weight" in report.unused
    assert torch.equal(new.decoder.heads.boxes[0].layers[0].weight, model.decoder.heads.boxes[1].layers[0].weight)

    plain = ours(presets.multi_scale)
    plain.save_pretrained(tmp_path / "plain")
    refined = fresh(presets.refine)
    report = load_for_training(refined, tmp_path / "plain", quiet)
    assert not report.fresh
    for head in refined.decoder.heads.boxes:  # the one that all layers shared
        assert torch.equal(head.layers[2].bias, plain.decoder.heads.boxes[0].layers[2].bias)

    deeper = fresh(decoder_layers=3)
    report = load_for_training(deeper, folder, quiet)
    assert torch.equal(deeper.decoder.heads.classes[3].bias, model.decoder.heads.classes[2].bias)
    assert "decoder.heads.classes.2.bias" in report.fresh
    assert "decoder.layers.2.norm1.weight" in report.fresh


def test_more_queries_and_more_levels(tmp_path):
    plain = ours(presets.refine, num_feature_levels=3)
    plain.save_pretrained(tmp_path)
    new = fresh(presets.refine, num_feature_levels=5, num_queries=25)
    before = {name: value.clone() for name, value in new.state_dict().items()}
    report = load_for_training(new, tmp_path, quiet)
    assert torch.equal(new.query_embedding.weight[:20], plain.query_embedding.weight)
    assert torch.equal(new.query_embedding.weight[20:], before["query_embedding.weight"][20:])
    assert torch.equal(new.level_embedding[:3], plain.level_embedding)
    name = "decoder.layers.0.cross_attn.attention_weights.weight"
    here, old = new.state_dict()[name].view(4, 5, 4, -1), plain.state_dict()[name].view(4, 3, 4, -1)
    assert torch.equal(here[:, :3], old)
    assert torch.equal(here[:, 3:], before[name].view(4, 5, 4, -1)[:, 3:])
    assert report.partly["query_embedding.weight"] == "new: queries from 21 on"
    assert report.partly["level_embedding"] == "new: stride 64, stride 128"
    assert "projections.levels.4.0.weight" in report.fresh
    assert new(*batch())["pred_logits"].isfinite().all()


def test_one_level_is_the_third_of_four(tmp_path):
    plain = ours(presets.single_scale)
    plain.save_pretrained(tmp_path)
    new = fresh(presets.multi_scale)
    load_for_training(new, tmp_path, quiet)
    assert torch.equal(new.level_embedding[2], plain.level_embedding[0])
    assert torch.equal(new.projections.levels[2][0].weight, plain.projections.levels[0][0].weight)


def test_another_backbone_stays_as_it_was(source):
    _, folder = source
    new = fresh(backbone="resnet10t")
    before = new.backbone.body.conv1[0].weight.clone()
    report = load_for_training(new, folder, quiet)
    assert torch.equal(new.backbone.body.conv1[0].weight, before)
    assert any("its backbone is test_resnet, not resnet10t" in why for why in report.unused.values())
    assert "other shape" in report.fresh["projections.levels.0.0.weight"]
    assert "encoder.layers.0.norm1.weight" in report.loaded


def test_frozen_and_trained_norms_share_their_statistics(source):
    model, folder = source
    new = fresh(backbone_norm="frozen")
    load_for_training(new, folder, quiet)
    name = "backbone.body.bn1.running_var"
    assert torch.equal(new.state_dict()[name], model.state_dict()[name])


def test_where_nothing_fits(source):
    _, folder = source
    with pytest.raises(UserError, match=r"nothing of .* fits this model: hidden_dim 64"):
        load_for_training(fresh(hidden_dim=32, ffn_dim=32, backbone="resnet10t"), folder, quiet)
    with pytest.raises(UserError, match="no such folder"):
        load_for_training(fresh(), folder / "gone", quiet)


def test_the_sources_network_as_the_start_of_a_config(source, tmp_path):
    _, folder = source
    config = starting_config(folder)
    assert (config.preset, config.model.hidden_dim, config.model.backbone) == ("two-stage", 64, "test_resnet")
    assert (config.model.class_names, config.model.category_ids, config.model.backbone_weights) == ((), (), "none")
    assert config.train == presets.config("two-stage").train
    ours(presets.small).save_pretrained(tmp_path / "small")
    assert starting_config(tmp_path / "small").train == presets.config("small").train


@pytest.mark.parametrize(
    "change",
    [
        {"num_feature_levels": 3},
        {"iterative_query_pos": False},
        {"query_init": "learned"},
        {"class_aware_proposals": False},
    ],
)
def test_a_network_close_to_a_preset_is_trained_as_that(tmp_path, change):
    ours(presets.small, **change).save_pretrained(tmp_path / "small")
    assert starting_config(tmp_path / "small").preset == "small"


def test_a_small_model_goes_on_as_one_for_other_tools(tmp_path):
    """The preset of a source is the one of most settings in common; what only one of the two kinds has starts anew."""
    small = ours(presets.small)
    small.save_pretrained(tmp_path / "small")
    ours(presets.small_portable).save_pretrained(tmp_path / "portable")
    assert starting_config(tmp_path / "small").preset == "small"
    assert starting_config(tmp_path / "portable").preset == "small-portable"
    new = fresh(presets.small_portable)
    before = {name: value.clone() for name, value in new.state_dict().items()}
    said = []
    report = load_for_training(new, tmp_path / "small", said.append)
    assert sorted(report.fresh) == [
        "decoder.heads.classes.2.bias", "decoder.heads.classes.2.weight", "proposals.query_norm.bias",
        "proposals.query_norm.weight", "proposals.query_proj.bias", "proposals.query_proj.weight",
    ]  # fmt: skip
    assert all(name.startswith("decoder.position_head.") for name in report.unused)
    assert "class_aware_proposals True in the source" in report.fresh["decoder.heads.classes.2.weight"]
    for name, value in new.state_dict().items():
        assert torch.equal(value, before[name] if name in report.fresh else small.state_dict()[name]), name
    assert torch.equal(new.decoder.heads.classes[2].bias, torch.full((3,), PRIOR))


def test_a_model_begun_from_a_source_fetches_no_backbone(source, monkeypatch):
    import timm

    model, folder = source
    create = timm.create_model

    def offline(*names, pretrained=False, **options):
        assert not pretrained
        return create(*names, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    new = begin(model.config.replace(backbone_weights="hub"), folder, quiet)
    assert torch.equal(new.level_embedding, model.level_embedding)
    assert not new.backbone.body.conv1[0].weight.requires_grad


def test_a_run_that_starts_from_weights(tmp_path, capsys):
    from deformable_detr import train
    from tests.support.training import write_dataset

    folder = tmp_path / "source"
    ours(class_names=("cat", "Green", "red")).save_pretrained(folder)
    data = write_dataset(tmp_path / "set")
    settings = {"epochs": 1, "batch_size": 4, "image_size": 64, "workers": 0, "device": "cpu"}
    metrics = train(data, tmp_path / "run", weights=str(folder), **settings)
    assert metrics["step"] > 0
    out = capsys.readouterr().out
    assert f"weights of {folder}:" in out
    assert "kept 2 classes of the same name" in out
    assert "its score of 'object'" in out
    found = DeformableDETR.from_pretrained(tmp_path / "run").config
    assert (found.backbone, found.hidden_dim, found.image_size) == ("test_resnet", 64, 64)
    assert found.class_names == ("red", "green", "blue")
    text = (tmp_path / "run" / "README.md").read_text()
    assert "## Data\n\nset\n" in text
    assert "AP50" in text or "None measured" in text
    train(data, tmp_path / "run", resume=True, epochs=2)  # goes on with its own weights
    assert "weights of" not in capsys.readouterr().out


def test_the_command_line_converts_and_names_the_network(source, tmp_path, capsys):
    import yaml

    from deformable_detr import cli

    model, folder = source
    cli.main(["convert", str(folder), "--to", "transformers", "--out", str(tmp_path / "out")])
    assert "AutoModelForObjectDetection" in capsys.readouterr().out
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()
    with pytest.raises(SystemExit) as stopped:
        cli.main(["convert", str(folder), "--to", "transformers", "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: --out")
    cli.main(["train", "--weights", str(folder), "--image-size", "96", "--print-config"])
    config = yaml.safe_load(capsys.readouterr().out)
    assert (config["train"]["weights"], config["preset"]) == (str(folder), "two-stage")
    assert (config["model"]["hidden_dim"], config["model"]["image_size"]) == (model.config.hidden_dim, 96)
    cli.main(["train", "--weights", str(folder), "--preset", "refine", "--print-config"])
    assert yaml.safe_load(capsys.readouterr().out)["model"]["hidden_dim"] == 256
