"""The model card: contents, metadata that the hub parses, and preservation of a user's own card."""

import yaml
from huggingface_hub import ModelCard

from deformable_detr import Config, ModelConfig
from deformable_detr.weights.model_card import ModelCardData, model_card

HOSTILE_NAME = 'a|b</td>\n---\n# "x": {y}'


def metadata(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_card_contents():
    model = ModelConfig(
        num_classes=2, class_names=("cat", HOSTILE_NAME), category_ids=(7, 9), refine=True, image_size=640
    )
    config = Config(model=model).updated({"train": {"epochs": 3}})
    data = ModelCardData("pets: 2018", {"AP": 0.4567, "AP50": None}, config, license="apache-2.0")
    text = model_card(model, data)
    assert metadata(text)["license"] == "apache-2.0"
    assert metadata(text)["pipeline_tag"] == "object-detection"
    result = metadata(text)["model-index"][0]["results"][0]
    assert result["metrics"] == [{"type": "AP", "name": "AP", "value": 0.4567}]
    assert result["dataset"]["name"] == "pets: 2018"
    assert "| 0 | cat | 7 |" in text
    assert '| 1 | a\\|b&lt;/td> --- # "x": {y} | 9 |' in text
    assert "| AP | 0.4567 |" in text
    assert "epochs: 3" in text
    assert "refine: true" in text
    assert "DeformableDETR.from_pretrained" in text


def test_metadata_is_parsed_by_the_hub_library():
    metrics = {"AP": 0.4567, "AP50": 0.7, "AP_small": None}
    for dataset, library in (("pets: 2018", "deformable-detr"), (None, "transformers")):
        data = ModelCard(model_card(ModelConfig(), ModelCardData(dataset, metrics, library=library))).data
        assert (data.license, data.library_name, data.pipeline_tag) == ("unknown", library, "object-detection")
        assert data.eval_results is not None
        results = [(result.metric_type, result.metric_value) for result in data.eval_results]
        assert results == [("AP", 0.4567), ("AP50", 0.7)]
        assert {result.dataset_name for result in data.eval_results} == {dataset or "custom data"}


def test_card_without_data():
    text = model_card(ModelConfig(), ModelCardData())
    assert metadata(text)["license"] == "unknown"
    assert "model-index" not in metadata(text)
    assert "Not measured." in text
    assert "| 90 | class 90 | 90 |" in text


def test_generated_card_is_replaced_but_a_users_own_is_kept(native_model, tmp_path):
    path = tmp_path / "README.md"
    for dataset in ("first", "second"):
        native_model.save_pretrained(tmp_path, ModelCardData(dataset))
        assert dataset in path.read_text()
    path.write_text("my own words")
    native_model.save_pretrained(tmp_path, ModelCardData("third"))
    assert path.read_text() == "my own words"


def test_run_export_keeps_a_users_own_card(native_model, tmp_path):
    from deformable_detr.training.run_dir import RunDir

    path = tmp_path / "README.md"
    for before, after in (
        ("my own words", "my own words"),
        (model_card(ModelConfig(), ModelCardData()), "## Data\n\nsecond"),
    ):
        path.write_text(before)
        RunDir(tmp_path).export(native_model, ModelCardData("second"))
        assert after in path.read_text()
