"""Short names: the catalog, where a name is looked up, downloads, and the page of the docs."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deformable_detr import DeformableDETR
from deformable_detr.detector import load_detector
from deformable_detr.weights import catalog
from deformable_detr.weights.checkpoint import coco_classes, coco_labels
from deformable_detr.weights.load import load_pretrained, locate_source, read_checkpoint
from tests.support.weights import equal_weights, load_error

PAGE = Path(__file__).resolve().parents[2] / "docs/models.md"


@pytest.fixture
def requests(monkeypatch, shared_repo):
    """Answer all hub downloads with one repository; return the requested ids."""
    import huggingface_hub

    names = []

    def fetch(name, revision=None, allow_patterns=None, **_):
        names.append((name, revision))
        return str(shared_repo)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    return names


@pytest.fixture
def releases(monkeypatch, tmp_path, shared_checkpoint, tiny_backbone):
    """Answer all downloads of release files with one checkpoint, into an empty cache; return the addresses."""
    addresses = []

    def fetch(url, path, progress=True):
        addresses.append(url)
        Path(path).write_bytes(shared_checkpoint.read_bytes())

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    return addresses


def test_rows_are_plausible():
    names = [model.name for model in catalog.CATALOG]
    assert len(set(names)) == len(names)
    for model in catalog.CATALOG:
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", model.name)
        assert re.fullmatch(r"[\w.-]+/[\w.-]+|https://(drive\.google\.com|github\.com)/\S+", model.source)
        assert model.ap is None if model.data == catalog.OBJECTS365 else 20 < model.ap < 65
        assert 0.4 < model.parameters < 250
        assert len(model.cells()) == len(catalog.HEADER)
    hub = [model.source for model in catalog.CATALOG if not model.is_manual]
    assert len(set(hub)) == len(hub)


def test_names_load_from_the_hub(requests, shared_repo, monkeypatch):
    expected = DeformableDETR.from_pretrained(shared_repo)
    assert equal_weights(expected, DeformableDETR.from_pretrained("deformable-detr-r50-two-stage"))
    assert equal_weights(expected, load_detector("deformable-detr-r50-two-stage", "cpu"))
    assert equal_weights(expected, load_pretrained("deformable-detr-r50-two-stage"))
    assert requests == 3 * [("SenseTime/deformable-detr-with-box-refine-two-stage", None)]
    read_checkpoint("dfine-l-obj2coco")
    assert requests[3:] == [("ustc-community/dfine-large-obj2coco-e25", None)]

    import huggingface_hub

    def fail(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    error = "model dfine-s (ustc-community/dfine-small-coco): no such folder, and the download failed: no network"
    assert load_error("dfine-s") == error


def test_revisions(requests, releases):
    load_pretrained("deformable-detr-r50@v1.0")
    assert requests == [("SenseTime/deformable-detr", "v1.0")]
    assert load_error("dino-r50@main") == "model dino-r50@main: a single file has no revisions; omit @main"
    assert "did you mean dfine-s?" in load_error("dfin-s@main")
    assert len(requests) == 1
    assert releases == []


def test_names_of_other_families_load(monkeypatch, tmp_path):
    pytest.importorskip("transformers")
    import huggingface_hub

    from tests.support.transformers_models import write_repository

    write_repository(tmp_path, "d_fine")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    assert load_detector("dfine-s", "cpu").config.family == "d_fine"
    assert load_error("dfine-s") == "dfine-s is not a Deformable DETR but a D-FINE: use load_detector"


def test_existing_paths_win(native_folder, requests, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dfine-s").symlink_to(native_folder, target_is_directory=True)
    assert locate_source("dfine-s") == Path("dfine-s")
    assert requests == []


def test_unknown_names_get_the_nearest(requests):
    assert "did you mean dfine-s? `deformable-detr models` lists" in load_error("dfin-s")
    assert "did you mean rtdetrv2-r18?" in load_error("RTDETRv2_R18")
    assert "did you mean" not in load_error("qqq")
    assert "`deformable-detr models` lists" in load_error("qqq")
    for path in ("gone.pth", "some/folder/dfin-s/", "/dfin-s"):
        assert "deformable-detr models" not in load_error(path)
    assert requests == []


def test_license_is_told_before_the_download(requests, monkeypatch, caplog, shared_repo):
    row = catalog.find_model("deformable-detr-r50")
    restricted, unstated = replace(row, name="free-x", license="PML-1.0"), replace(row, name="y", license=None)
    monkeypatch.setattr(catalog, "CATALOG", (row, restricted, unstated))
    locate_source("deformable-detr-r50")
    assert caplog.messages == []

    import huggingface_hub

    def fetch(*_, **__):
        assert len(caplog.messages) == 1
        return str(shared_repo)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    locate_source("free-x")
    assert "free-x: the weights have the license PML-1.0" in caplog.messages[0]
    locate_source("free-x")
    assert len(caplog.messages) == 1  # told once per process
    caplog.clear()
    locate_source("y")
    assert "state no license" in caplog.messages[0]


def test_release_files_are_downloaded_once(releases, official_model, monkeypatch, tmp_path):
    address = catalog.find_model("dino-r50").source
    assert equal_weights(official_model, DeformableDETR.from_pretrained("dino-r50"))
    assert equal_weights(official_model, DeformableDETR.from_pretrained("dino-r50"))
    assert releases == [address]
    assert locate_source("dino-r50") == tmp_path / "cache/deformable_detr/dino_r50_4scale_24ep.pth"
    assert catalog.untold_fields(locate_source("dino-r50")) == {"num_heads": 8}
    assert catalog.untold_fields(tmp_path / "dino_r50_4scale_24ep.pth") == {}  # another file of that name

    def fail(*_, **__):
        raise OSError("no network\nmore lines")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    assert load_error("dino-swin-l").endswith("_4scale_36ep.pth failed: no network")


def test_files_on_google_drive_are_refused(requests, releases):
    error = load_error("dino-r50-36ep")
    assert "by hand from https://drive.google.com/" in error
    assert "pass the path of the file" in error
    assert requests == releases == []


def test_labels_of_coco_get_its_ids():
    names, ids = coco_classes(80)
    voc = tuple({"tv": "tvmonitor", "couch": "sofa", "airplane": "aeroplane"}.get(name, name) for name in names)
    assert coco_labels(voc) == (voc, ids)
    assert ids[-1] == 90
    assert coco_labels(names[::-1]) == (names[::-1], ())
    assert coco_labels(coco_classes(91)[0]) == coco_classes(91)
    assert coco_labels(tuple(f"LABEL_{label}" for label in range(91))) == coco_classes(91)
    unnamed = tuple(f"LABEL_{label}" for label in range(80))
    assert coco_labels(unnamed) == (unnamed, ())
    assert coco_labels(("cat", "dog")) == (("cat", "dog"), ())


def test_page_of_the_docs_has_the_table():
    rows = [catalog.HEADER, ("---",) * len(catalog.HEADER), *(model.cells() for model in catalog.CATALOG)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    assert table in PAGE.read_text(encoding="utf-8"), f"replace the table in {PAGE} by:\n{table}"
