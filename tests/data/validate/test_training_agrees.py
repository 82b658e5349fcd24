"""Training on every faulty dataset: it completes or fails in one line with exit code 2, never with a traceback."""

import pytest

from deformable_detr.cli import main
from deformable_detr.config.image_size import ShortestEdge
from deformable_detr.config.schema import DataConfig
from deformable_detr.data import coco
from deformable_detr.data.validate import ISSUE_TYPES, check_for_training
from deformable_detr.utils.errors import UserError
from tests.support.annotation_files import COCO, VOC, YOLO
from tests.support.data_problems import ALWAYS_REPORTED, check_report
from tests.support.datasets import write_coco_dataset, write_voc_dataset, write_yolo_dataset
from tests.support.image_files import FILES
from tests.support.unusual_inputs import DATASETS, IMAGES

TINY = (
    "--backbone test_resnet --backbone-weights none --image-size 64 --workers 0 --epochs 1 --device cpu --batch-size 2"
)
SMALL_MODEL = "model.hidden_dim=32 model.ffn_dim=32 model.num_queries=5 model.encoder_layers=1 model.decoder_layers=1"
OPTIONS = [*TINY.split(), *(word for key in SMALL_MODEL.split() for word in ("--set", key))]

CASES = {
    **{f"image: {name}": (write_coco_dataset, content, expected) for name, (content, expected) in FILES.items()},
    **{f"coco: {name}": (write_coco_dataset, change, expected) for name, (change, expected, _) in COCO.items()},
    **{f"yolo: {name}": (write_yolo_dataset, change, expected) for name, (change, expected, _) in YOLO.items()},
    **{f"voc: {name}": (write_voc_dataset, change, expected) for name, (change, expected, _) in VOC.items()},
    **{f"unusual {name}": (make, change, expected) for name, (make, change, expected, _) in DATASETS.items()},
}
QUICK_CASES = ("image: PNG: half", "yolo: too few values", "voc: entity expansion")


def train(case, root, out, capsys, *options):
    """Return exit code and standard error of a training on the faulty dataset."""
    make, change, _ = CASES[case]
    make(root)
    if callable(change):
        change(root)
    else:
        (root / "train/a.png").write_bytes(change)
    capsys.readouterr()
    try:
        main(["train", str(root), "--out", str(out), *OPTIONS, *options])
        code = 0
    except SystemExit as end:
        code = end.code
    return code, capsys.readouterr().err


def assert_trained_or_rejected(case, tmp_path, capsys):
    code, err = train(case, tmp_path / "set", tmp_path / "run", capsys)
    if any(ISSUE_TYPES[code_name].severity == "error" for code_name in CASES[case][2]):
        assert code == 2
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert not (tmp_path / "run/config.yaml").exists()
    else:
        assert code == 0, err
        assert (tmp_path / "run/model.safetensors").is_file()


@pytest.mark.parametrize("case", QUICK_CASES)
def test_quick_cases(tmp_path, capsys, case):
    assert_trained_or_rejected(case, tmp_path, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case not in QUICK_CASES])
def test_remaining_cases(tmp_path, capsys, case):
    assert_trained_or_rejected(case, tmp_path, capsys)


def test_every_issue_type_has_a_case():
    assert len(FILES) >= 40
    assert len(COCO) + len(YOLO) + len(VOC) >= 30
    assert len(FILES) + len(IMAGES) >= 70
    assert len(CASES) >= 250
    covered = {kind for _, _, expected in CASES.values() for kind in expected}
    tested_elsewhere = {"leak", "image-copy", "image-missing", "dataset-rejected", "too-many-objects", "small-objects"}
    tested_elsewhere |= {code for code in ISSUE_TYPES if code.startswith("mask")}  # test_mask_checks.py
    assert ISSUE_TYPES.keys() - covered - ALWAYS_REPORTED - tested_elsewhere == set(), "issue types without a case"


def test_training_parses_each_annotation_file_once(tmp_path, monkeypatch):
    root = write_coco_dataset(tmp_path / "set")
    parsed = []
    original = coco.CocoSource.parse
    monkeypatch.setattr(coco.CocoSource, "parse", lambda self, masks: parsed.append(self.file) or original(self, masks))
    main(["train", str(root), "--out", str(tmp_path / "run"), *OPTIONS])
    assert sorted(parsed) == [root / "train/_annotations.coco.json", root / "valid/_annotations.coco.json"]


def test_faults_in_the_validation_split_stop_training(tmp_path):
    root = write_coco_dataset(tmp_path)
    (root / "valid/c.png").write_bytes(b"")
    assert [finding.split for finding in check_report(root).errors] == ["val"]
    with pytest.raises(UserError, match=r"valid/c\.png"):
        check_for_training(root, DataConfig(), ShortestEdge(64, 107))


def test_faults_in_the_test_split_do_not_stop_training(tmp_path):
    root = write_coco_dataset(tmp_path)
    write_coco_dataset(root, {"test": {"d": [(0, (4, 2, 16, 10))]}}, folders=("test",))
    (root / "test/d.png").unlink()
    assert [(finding.code, finding.split) for finding in check_report(root).errors] == [("image-missing", "test")]
    lines = check_for_training(root, DataConfig(), ShortestEdge(64, 107))
    assert not [line for line in lines if "/test/" in line]
    (root / "test/d.png").write_bytes((root / "train/a.png").read_bytes())
    assert any(
        line.startswith("warning leak: ") for line in check_for_training(root, DataConfig(), ShortestEdge(64, 107))
    )
    (root / "test/d.png").unlink()
    with pytest.raises(UserError, match="d\\.png"):
        check_for_training(root, DataConfig(val_split="test"), ShortestEdge(64, 107))
