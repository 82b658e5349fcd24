"""Upload to the Hugging Face Hub."""

import shutil

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard

from deformable_detr import DeformableDETR, UserError
from deformable_detr.detector import load_detector
from deformable_detr.weights.model_card import ModelCardData
from tests.support.transformers_models import write_repository
from tests.support.weights import equal_weights


@pytest.fixture
def uploaded(tmp_path, monkeypatch):
    """What the hub gets; its files are copied to `tmp_path / "uploaded"`."""
    uploaded = {}

    class Hub:
        def __init__(self, token=None):
            uploaded["token"] = token

        def create_repo(self, name, private, exist_ok):
            uploaded.update(name=name, private=private)

        def upload_folder(self, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, tmp_path / "uploaded")
            return f"https://hub/{repo_id}"

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    return uploaded


@pytest.mark.parametrize("to", ["native", "transformers"])
def test_upload(to, native_model, uploaded, tmp_path):
    url = native_model.push_to_hub("me/detector", to=to, private=True, token="secret")
    assert url == "https://hub/me/detector"
    assert uploaded == {"token": "secret", "name": "me/detector", "private": True}
    assert equal_weights(native_model, DeformableDETR.from_pretrained(tmp_path / "uploaded"))
    card = (tmp_path / "uploaded" / "README.md").read_text()
    assert "'me/detector'" in card
    assert ("AutoModelForObjectDetection" in card) == (to == "transformers")
    assert "secret" not in card


def test_upload_of_other_families(uploaded, tmp_path):
    pytest.importorskip("transformers")
    write_repository(tmp_path / "model", "d_fine")
    detector = load_detector(tmp_path / "model", "cpu")
    card = ModelCardData("pets", {"AP": 0.4567}, license="apache-2.0")
    assert detector.push_to_hub("me/detector", private=True, token="secret", card_data=card).endswith("me/detector")
    assert uploaded == {"token": "secret", "name": "me/detector", "private": True}
    again = load_detector(tmp_path / "uploaded", "cpu")
    assert again.config == detector.config
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in detector.state_dict().items())
    card = ModelCard((tmp_path / "uploaded/README.md").read_text())
    assert (card.data.library_name, card.data.license, card.data.pipeline_tag) == (
        "transformers", "apache-2.0", "object-detection",
    )  # fmt: skip
    for words in (
        "# D-FINE\n",
        "pets",
        "| AP | 0.4567 |",
        "| 1 | dog |",
        "load_detector('me/detector')",
        "Queries: 12.",
    ):
        assert words in card.content
    assert "Deformable DETR" not in card.content
    assert "secret" not in card.content
    with pytest.raises(UserError, match="owner/name"):
        detector.push_to_hub("detector")


def test_failed_upload_is_reported_in_one_line(native_model, monkeypatch):
    def fail(*arguments, **options):
        raise OSError("401: log in first\nlong explanation")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", fail)
    with pytest.raises(UserError, match=r"^hub repository me/detector: 401: log in first$"):
        native_model.push_to_hub("me/detector")
    with pytest.raises(UserError, match="owner/name"):
        native_model.push_to_hub("detector")
