"""Sources of weights, created once per session."""

import shutil

import pytest

from deformable_detr.config import presets
from deformable_detr.weights import official_format
from tests.support.weights import tiny_model, tiny_transformers_model


@pytest.fixture(scope="session")
def shared_repo(tmp_path_factory):
    """A two-stage transformers repository; read-only."""
    folder = tmp_path_factory.mktemp("transformers") / "repo"
    tiny_transformers_model().save_pretrained(folder)
    return folder


@pytest.fixture
def repo(shared_repo, tmp_path):
    """A two-stage transformers repository that a test may change."""
    return shutil.copytree(shared_repo, tmp_path / "repo")


@pytest.fixture(scope="session")
def native_model():
    """A two-stage model of cat, dog and cow; read-only."""
    return tiny_model()


@pytest.fixture(scope="session")
def native_folder(native_model, tmp_path_factory):
    """The folder of `native_model`; read-only."""
    folder = tmp_path_factory.mktemp("native")
    native_model.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_backbone(monkeypatch):
    """Let the official format accept the tests' backbone; it otherwise supports ResNet-50 and larger."""
    monkeypatch.setattr(official_format, "BACKBONES", (*official_format.BACKBONES, "test_resnet"))


@pytest.fixture(scope="session")
def official_model():
    """A model with iterative refinement; read-only."""
    return tiny_model(presets.refine, num_heads=8)


@pytest.fixture(scope="session")
def shared_checkpoint(official_model, tmp_path_factory):
    """The official checkpoint of `official_model`; read-only."""
    folder = tmp_path_factory.mktemp("official")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(official_format, "BACKBONES", ("test_resnet",))
        official_format.save(official_model, folder)
    return folder / official_format.FILE
