"""Datasets as real tools write them: `../shared/cases`, with the right number of objects and issues of each."""

import pytest

from deformable_detr.config.schema import DataConfig
from deformable_detr.data.dataset import open_dataset
from tests.support.data_problems import check_report

# case → objects of the training and validation split, objects left out, and issue codes
CASES = {
    "01-ls-yolo-hash-prefix": ([24], 0, {"label-name"}),
    "02-ls-yolo-twins-part": ([24], 0, {"label-name"}),
    "04-yolo-case-of-names": ([16, 8], 0, {"label-name"}),
    "06-yolo-heic-among-jpeg": ([12, 8], 6, {"image-format"}),
    "09-ls-coco-same-names": ([16], 0, {"image-in-parts"}),
    "19-voc-swapped-corners": ([16, 8], 0, {"box-swapped"}),
    "21-yolo-confidence-column": ([24, 12], 0, {"label-confidence"}),
    "22-yolo-lists-of-windows": ([12, 6], 0, {"path-moved", "image-name"}),
}


@pytest.mark.parametrize("name", CASES)
def test_case(shared, name):
    root = shared / "cases" / name / "set"
    objects, left_out, codes = CASES[name]
    report = check_report(root)
    assert [len(split.positions) for split in report.splits] == objects
    assert report.left_out == left_out
    assert codes <= {issue.code for issue in report.issues}
    assert not {"label-unmatched", "box-degenerate", "label-row"} & {issue.code for issue in report.issues}
    if not {"09", "01", "02"} & {name[:2]}:  # these have no validation split, or two pictures with one name
        assert sum(len(target.boxes) for _, target in open_dataset(root, "train", DataConfig())) == objects[0]
