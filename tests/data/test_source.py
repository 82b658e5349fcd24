"""Sources and the cache: each annotation file is read once for check, both splits and ground truth."""

import collections
from pathlib import Path

import defusedxml.ElementTree
import pytest

from deformable_detr.config.image_size import ShortestEdge
from deformable_detr.config.schema import DataConfig
from deformable_detr.data import coco, source
from deformable_detr.data.dataset import open_dataset
from deformable_detr.data.source import AnnotationCache, remap_category_ids
from deformable_detr.data.validate import check_for_training
from deformable_detr.structures import Category
from tests.support.datasets import write_coco_dataset, write_voc_dataset, write_yolo_dataset


@pytest.fixture
def reads(monkeypatch):
    """Count how often each annotation file is read."""
    counts = collections.Counter()

    def counted(function):
        def wrapper(path, *args, **options):
            content = function(path, *args, **options)  # raises for an image without a label file
            path = path if isinstance(path, Path) else path.name
            if Path(path).suffix in (".json", ".xml", ".txt") and "ImageSets" not in str(path):
                counts[str(path)] += 1
            return content

        return wrapper

    for module in (coco, source):
        monkeypatch.setattr(module, "read_regular", counted(module.read_regular))
    monkeypatch.setattr(defusedxml.ElementTree, "parse", counted(defusedxml.ElementTree.parse))
    return counts


@pytest.mark.parametrize(("make", "files"), [(write_coco_dataset, 2), (write_yolo_dataset, 3), (write_voc_dataset, 4)])
def test_training_reads_each_annotation_file_once(tmp_path, reads, make, files):
    root = make(tmp_path)
    cache, data = AnnotationCache(), DataConfig(check="full")
    reads.clear()
    check_for_training(root, data, ShortestEdge(64, 107), cache)
    train = open_dataset(root, "train", data, cache=cache)
    val = open_dataset(root, "val", data, train.categories, cache=cache)
    truth = val.load_ground_truth(cache)
    assert val.ground_truth is truth
    assert len(truth["annotations"]) == 2
    assert train.fingerprint != val.fingerprint
    assert len(reads) == files
    assert set(reads.values()) == {1}, reads

    uncached = open_dataset(root, "val", data, train.categories)
    assert uncached.fingerprint == val.fingerprint
    assert uncached.ground_truth == truth, "equal without the cache"
    assert max(reads.values()) > 1, "without the cache, the files are read again"


def test_categories_are_matched_by_name_only_if_unique_and_known():
    cats = (Category(0, "cat"), Category(1, "dog"))
    assert remap_category_ids((Category(1, "cat"), Category(2, "dog")), cats, {1, 2}) == {1: 0, 2: 1}
    assert remap_category_ids((Category(1, "cat"), Category(2, "fox")), cats, {1, 2}) == {}
    assert remap_category_ids((Category(1, "cat"), Category(2, "fox")), cats, {1}) == {1: 0}
    assert remap_category_ids((Category(1, "cat"), Category(2, "cat")), cats, {1}) == {}
    assert remap_category_ids(cats, cats, {0, 1}) == {}
