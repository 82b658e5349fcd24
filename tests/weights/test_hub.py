"""Upload to the Hugging Face Hub."""

import shutil

import huggingface_hub
import pytest

from deformable_detr import DeformableDETR, UserError
from tests.support.weights import equal_weights


@pytest.mark.parametrize("to", ["native", "transformers"])
def test_upload(to, native_model, tmp_path, monkeypatch):
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
    url = native_model.push_to_hub("me/detector", to=to, private=True, token="secret")
    assert url == "https://hub/me/detector"
    assert uploaded == {"token": "secret", "name": "me/detector", "private": True}
    assert equal_weights(native_model, DeformableDETR.from_pretrained(tmp_path / "uploaded"))
    card = (tmp_path / "uploaded" / "README.md").read_text()
    assert "'me/detector'" in card
    assert ("AutoModelForObjectDetection" in card) == (to == "transformers")
    assert "secret" not in card


def test_failed_upload_is_reported_in_one_line(native_model, monkeypatch):
    def fail(*arguments, **options):
        raise OSError("401: log in first\nlong explanation")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", fail)
    with pytest.raises(UserError, match=r"^hub repository me/detector: 401: log in first$"):
        native_model.push_to_hub("me/detector")
    with pytest.raises(UserError, match="owner/name"):
        native_model.push_to_hub("detector")
