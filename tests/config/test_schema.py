"""The config: one clear line per error, and the YAML round trip."""

import pytest
import yaml

from deformable_detr import Config, ModelConfig, TrainConfig, UserError
from deformable_detr.config import presets
from deformable_detr.config.image_size import FixedSize
from deformable_detr.config.resolve import parse_overrides, read_config_file
from deformable_detr.config.section import merge


@pytest.mark.parametrize("name", presets.PRESETS)
def test_yaml_round_trip(name):
    config = presets.config(name)
    assert Config.from_dict(yaml.safe_load(config.to_yaml())) == config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trian": {}}, ["unknown key 'trian'", "did you mean 'train'?"]),
        ({"train": {"learning_rat": 1}}, ["unknown key 'train.learning_rat'"]),
        ({"train": {"epoch": 1}}, ["unknown key 'train.epoch'", "did you mean 'epochs'?"]),
        ({"train": {"zzz": 1}}, ["unknown key 'train.zzz'", "valid keys: ", "weight_decay"]),
        ({"train": {"epochs": 0}}, ["train.epochs", "greater than 0", "0"]),
        (
            {"train": {"epochs": "many"}},
            ["train.epochs: input should be a valid integer", " or 'auto' (got 'many')"],
        ),
        ({"train": {"lr": float("nan")}}, ["train.lr", "finite", "nan"]),
        ({"train": {"precision": "fp8"}}, ["train.precision", "fp32", "'fp8'"]),
        ({"train": 3}, ["train", "3"]),
        ({"data": {"hflip_prob": 1.5}}, ["data.hflip_prob", "1.5"]),
        ({"data": {"train_scales": [1.0, 0.5]}}, ["train_scales", "smallest"]),
        ({"model": {"hidden_dim": 100}}, ["hidden_dim 100", "num_heads 8"]),
        ({"model": {"two_stage": True}}, ["two_stage requires refine"]),
        ({"model": {"class_names": ["a"]}}, ["class_names has 1 entries, but num_classes is 91"]),
        ({"model": {"num_classes": 2, "category_ids": [1, 1]}}, ["category_ids has duplicates"]),
        ({"train": {"dice_weight": 1}}, ["train.dice_weight is not used without model.masks: true"]),
        ({"model": {"masks": True}, "train": {"mask_points": 4}}, ["train.mask_points", "greater than or equal to 8"]),
        ({"train": {"epochs": 0, "lr": 0}}, ["train.epochs", "(and 1 more)"]),
    ],
)
def test_invalid_values_are_reported_in_one_line(changes, words):
    with pytest.raises(UserError) as caught:
        Config().updated(changes, "here")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("here: ")
    for word in words:
        assert word in message


def test_config_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        TrainConfig().epochs = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_replace_validates():
    assert ModelConfig().replace(num_queries=7).num_queries == 7
    with pytest.raises(UserError, match="num_queries"):
        ModelConfig().replace(num_queries=0)


def test_long_side_defaults_to_the_ratio_of_the_paper():
    assert ModelConfig().long_side == 1333
    assert ModelConfig(image_size=480).long_side == round(480 * 1333 / 800)
    assert ModelConfig(image_size=480, max_size=500).long_side == 500


def test_fixed_resize():
    rule = ModelConfig(resize="fixed", image_size=640, size_divisor=32).resize_rule
    assert rule == FixedSize(640, 640)
    assert rule(100, 333) == (640, 640)
    config = ModelConfig(resize="fixed", image_size=320, image_width=512)
    assert config.resize_rule(7, 7) == (320, 512)
    assert (config.resize_rule.short, config.long_side) == (320, 512)
    for changes, message in (
        ({"resize": "fixed", "max_size": 900}, "resize: fixed has no max_size; set image_width"),
        ({"image_width": 640}, "image_width requires resize: fixed"),
        (
            {"resize": "fixed", "image_size": 650, "size_divisor": 32},
            "image_size and image_width must be multiples",
        ),
        ({"resize": "fixed", "image_size": 640, "image_width": 650, "size_divisor": 32}, "must be multiples of 32"),
    ):
        with pytest.raises(UserError, match=message):
            ModelConfig().replace(**changes)


def test_merge_does_not_modify_its_arguments():
    base, changes = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 5}, "e": 4}
    assert merge(base, changes) == {"a": {"b": 5, "c": 2}, "d": 3, "e": 4}
    assert base == {"a": {"b": 1, "c": 2}, "d": 3}
    assert changes == {"a": {"b": 5}, "e": 4}


def test_overrides_are_yaml_values_at_dotted_keys():
    read = parse_overrides(
        ["train.lr=1e-4", "train.epochs=3", "model.refine=true", "data.images=a=b", "model.max_size="]
    )
    assert read == {
        "train": {"lr": "1e-4", "epochs": 3},
        "model": {"refine": True, "max_size": None},
        "data": {"images": "a=b"},
    }
    assert Config().updated({"train": read["train"]}).train.lr == 1e-4


@pytest.mark.parametrize("text", ["lr", "=3", "train.lr=[1"])
def test_invalid_override_is_reported_in_one_line(text):
    with pytest.raises(UserError, match="--set") as caught:
        parse_overrides(text.split())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"), [("a: [", "not valid YAML"), ("- 1", "must contain keys"), ("\x00", "YAML")]
)
def test_invalid_config_file_is_reported_in_one_line(tmp_path, content, words):
    file = tmp_path / "mine.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match=r"mine\.yaml") as caught:
        read_config_file(file)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_empty_config_files(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.yaml: No such file"):
        read_config_file(tmp_path / "nothing.yaml")
    (tmp_path / "empty.yaml").touch()
    assert read_config_file(tmp_path / "empty.yaml") == {}


@pytest.mark.parametrize(("text", "check"), [("off", "off"), ("'off'", "off"), ("full", "full"), ("auto", "auto")])
def test_check_off_is_read_as_a_string(text, check):
    assert Config().updated(parse_overrides([f"data.check={text}"])).data.check == check


def test_check_on_is_rejected():
    with pytest.raises(UserError, match=r"data.check"):
        Config().updated(parse_overrides(["data.check=on"]))


SIZES = [
    name for name, field in ModelConfig.model_fields.items()
    if field.annotation is int or type(field.default) is int or name in ("image_width", "max_size", "category_ids")
]  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_sizes_of_foreign_configs_are_bounded(name):
    """Such a size would fill the memory before any tensor is compared with it."""
    value = (2**63,) if name == "category_ids" else 2**31
    with pytest.raises(UserError, match=rf"^config\.json: {name}.*: input should be ") as caught:
        ModelConfig.from_dict({name: value, "resize": "shortest_edge"}, "config.json")
    assert "\n" not in str(caught.value)


def test_all_sizes_of_the_network_are_tested():
    assert set(SIZES) >= {"num_classes", "num_queries", "image_size", "hidden_dim", "encoder_layers", "num_heads"}


@pytest.mark.parametrize(("field", "value"), [("depths", (2**31,)), ("widths", (2**31,)), ("stem", 2**31)])
def test_sizes_of_foreign_backbones_are_bounded(field, value):
    shape = {"depths": (1,), "widths": (8,), field: value}
    with pytest.raises(UserError, match=rf"backbone_shape\.{field}.*: input should be less than"):
        ModelConfig.from_dict({"backbone_shape": shape, "backbone_weights": "none"})
