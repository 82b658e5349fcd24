"""Pipes and links to devices among images and annotation files are reported; they block nothing."""

import json
import shutil
from contextlib import suppress

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deformable_detr.config.schema import DataConfig, ModelConfig
from deformable_detr.data.dataset import open_dataset
from deformable_detr.data.formats import find_source
from deformable_detr.data.validate import check_for_training
from deformable_detr.utils.errors import UserError
from tests.support.data_problems import check_report
from tests.support.datasets import write_coco_dataset, write_image, write_yolo_dataset
from tests.support.label_formats import WRITERS, write_task
from tests.support.special_files import needs_pipes, replace_by_device, replace_by_pipe, time_limit

pytestmark = needs_pipes
REPLACE = [replace_by_pipe, replace_by_device]


@pytest.mark.parametrize("replace", REPLACE)
def test_images_of_equal_size(tmp_path, replace):
    root = write_coco_dataset(tmp_path / "set")
    for name in ("a", "b"):
        replace(root / f"train/{name}.png")
    with time_limit():
        report = check_report(root)
        with pytest.raises(UserError, match=r"[ab]\.png: cannot be read as an image \(not a regular file\)"):
            check_for_training(root, DataConfig(), ModelConfig().resize_rule)
        with pytest.raises(UserError, match="not a regular file"):
            open_dataset(root, "train")[0]
    broken = {issue.file.name for issue in report.issues if issue.code == "image-unreadable"}
    assert broken == {"a.png", "b.png"}
    assert "image-copy" not in {issue.code for issue in report.issues}


@pytest.mark.parametrize("replace", REPLACE)
@pytest.mark.parametrize("name", WRITERS)
def test_annotation_files(tmp_path, name, replace):
    root = write_task(tmp_path / "set", WRITERS[name])
    files = [path for path in sorted(root.rglob("*")) if path.is_file() and path.suffix != ".jpg"]
    assert files
    for number, file in enumerate(files):
        copy = tmp_path / f"{number}"
        shutil.copytree(root, copy)
        replace(copy / file.relative_to(root))
        with time_limit(), suppress(UserError):
            assert check_report(copy).issues, file


@pytest.mark.parametrize("replace", REPLACE)
def test_named_annotation_files(tmp_path, replace):
    """Files that the user or another file names are not left out as others are."""
    coco, yolo, table = write_coco_dataset(tmp_path / "coco"), write_yolo_dataset(tmp_path / "yolo"), tmp_path / "table"
    for split in ("train", "val"):
        write_image(table / split / "a.jpg")
        record = {"file_name": "a.jpg", "objects": {"bbox": [[1, 1, 9, 9]], "categories": ["cat"]}}
        pq.write_table(pa.Table.from_pylist([record]), table / split / "metadata.parquet")
    assert open_dataset(table, "train")
    (coco / "train/_annotations.coco.json").rename(coco / "own.json")
    data = DataConfig(annotations="own.json", images="train")
    assert find_source(coco, "train", data).read()
    replace(coco / "own.json")
    replace(table / "train/metadata.parquet")
    replace(yolo / "data.yaml")
    with time_limit():
        with pytest.raises(UserError, match=r"own\.json: not a regular file; give"):
            find_source(coco, "train", data).read()
        with pytest.raises(UserError, match="no 'train' split"):
            open_dataset(table, "train")
        with pytest.raises(UserError):
            open_dataset(yolo, "train")


@pytest.mark.parametrize("replace", REPLACE)
def test_labeled_images_outside_of_the_splits(tmp_path, replace):
    root = write_yolo_dataset(tmp_path / "set")
    for name in ("x", "y"):
        write_image(root / f"more/images/{name}.png")
        (root / "more/labels").mkdir(exist_ok=True)
        (root / f"more/labels/{name}.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    assert "outside-splits" in {issue.code for issue in check_report(root).issues}
    replace(root / "more/images/x.png")
    replace(root / "more/labels/y.txt")
    replace(root / "images/train/a.png")
    (root / "more/other.json").write_text(json.dumps({"shapes": []}))
    replace(root / "more/other.json")
    with time_limit():
        assert check_report(root).errors
