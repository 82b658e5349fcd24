"""The model card and the upload."""

import pytest
import yaml

from deformable_detr import Config, DeformableDETR, ModelConfig, UserError
from deformable_detr.weights.model_card import ModelCardData, card
from tests.weights.test_load import ours, same

NASTY = 'a|b</td>\n---\n# "x": {y}'


def fields(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_what_a_card_tells():
    config = ModelConfig(num_classes=2, class_names=("cat", NASTY), category_ids=(7, 9), refine=True, image_size=640)
    settings = Config(model=config).updated({"train": {"epochs": 3}})
    facts = ModelCardData(
        data="pets: 2018", figures={"AP": 0.4567, "AP50": None}, settings=settings, license="apache-2.0"
    )
    text = card(config, facts)
    found = fields(text)
    assert found["license"] == "apache-2.0"
    assert found["pipeline_tag"] == "object-detection"
    result = found["model-index"][0]["results"][0]
    assert result["metrics"] == [{"type": "AP", "name": "AP", "value": 0.4567}]
    assert result["dataset"]["name"] == "pets: 2018"
    assert "| 0 | cat | 7 |" in text
    assert '| 1 | a\\|b&lt;/td> --- # "x": {y} | 9 |' in text
    assert "| AP | 0.4567 |" in text
    assert "epochs: 3" in text
    assert "refine: true" in text
    assert "DeformableDETR.from_pretrained" in text


def test_the_hub_reads_the_fields_of_a_card():
    from huggingface_hub import ModelCard

    figures = {"AP": 0.4567, "AP50": 0.7, "AP_small": None}
    for data, library in (("pets: 2018", "deformable-detr"), (None, "transformers")):
        found = ModelCard(card(ModelConfig(), ModelCardData(data=data, figures=figures, library=library))).data
        assert (found.license, found.library_name, found.pipeline_tag) == ("unknown", library, "object-detection")
        assert found.eval_results is not None
        assert [(one.metric_type, one.metric_value) for one in found.eval_results] == [("AP", 0.4567), ("AP50", 0.7)]
        assert {one.dataset_name for one in found.eval_results} == {data or "custom data"}


def test_a_card_of_what_is_not_known():
    text = card(ModelConfig(), ModelCardData())
    assert fields(text)["license"] == "unknown"
    assert "model-index" not in fields(text)
    assert "None measured." in text
    assert "| 90 | class 90 | 90 |" in text


def test_the_card_lies_beside_the_weights_and_spares_that_of_others(tmp_path):
    model = ours()
    model.save_pretrained(tmp_path, ModelCardData(data="first"))
    assert "first" in (tmp_path / "README.md").read_text()
    model.save_pretrained(tmp_path, ModelCardData(data="second"))
    assert "second" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("my own words")
    model.save_pretrained(tmp_path, ModelCardData(data="third"))
    assert (tmp_path / "README.md").read_text() == "my own words"


def test_a_run_spares_the_card_of_others_too(tmp_path):
    from deformable_detr.training.run_dir import RunDir

    for words, kept in (("my own words", "my own words"), (card(ModelConfig(), ModelCardData()), "## Data\n\nsecond")):
        (tmp_path / "README.md").write_text(words)
        RunDir(tmp_path).export(ours(), ModelCardData(data="second"))
        assert kept in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("to", ["ours", "transformers"])
def test_upload(to, tmp_path, monkeypatch):
    import shutil

    import huggingface_hub

    made = {}

    class Hub:
        def __init__(self, token=None):
            made["token"] = token

        def create_repo(self, name, private, exist_ok):
            made.update(name=name, private=private)

        def upload_folder(self, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, tmp_path / "uploaded")
            return f"https://hub/{repo_id}"

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    model = ours()
    assert model.push_to_hub("me/detector", to=to, private=True, token="secret") == "https://hub/me/detector"
    assert made == {"token": "secret", "name": "me/detector", "private": True}
    assert same(model, DeformableDETR.from_pretrained(tmp_path / "uploaded"))
    text = (tmp_path / "uploaded" / "README.md").read_text()
    assert "'me/detector'" in text
    assert ("AutoModelForObjectDetection" in text) == (to == "transformers")
    assert "secret" not in text


def test_upload_that_fails(monkeypatch):
    import huggingface_hub

    def refuse(*arguments, **options):
        raise OSError("401: log in first\nlong explanation")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(UserError, match=r"^hub repository me/detector: 401: log in first$"):
        ours().push_to_hub("me/detector")
    with pytest.raises(UserError, match="owner/name"):
        ours().push_to_hub("detector")
