"""YOLO rows with keypoints and without `kpt_shape`, which may look like polygons."""

import random

import pytest

from tests.support.data_problems import check_report
from tests.support.datasets import write_yolo_dataset


def boxes_and_issues(root, rows):
    """Return the boxes of the training split as cx cy w h in 0..1, and the issues of keypoints."""
    write_yolo_dataset(root)
    for labels in (root / "labels/train").iterdir():
        labels.unlink()
    image = min((root / "images/train").iterdir())
    (root / f"labels/train/{image.stem}.txt").write_text("".join(f"{row}\n" for row in rows))
    report = check_report(root)
    split = report.splits[0]
    height, width = split.images[0].size
    boxes = [((x + w / 2) / width, (y + h / 2) / height, w / width, h / height) for x, y, w, h in split.boxes.tolist()]
    return boxes, [issue for issue in report.issues if issue.code == "label-keypoints"]


def random_boxes(count, smallest, largest):
    numbers = random.Random(count)
    for _ in range(count):
        w, h = numbers.uniform(smallest, largest), numbers.uniform(smallest, largest)
        yield numbers.uniform(w / 2, 1 - w / 2), numbers.uniform(h / 2, 1 - h / 2), w, h, numbers


@pytest.mark.parametrize(("keypoints", "size"), [(1, 2), (2, 2), (3, 2), (5, 2), (17, 2), (2, 3)])
def test_keypoints_are_recognized_by_all_rows(tmp_path, keypoints, size):
    rows, expected = [], []
    for x, y, w, h, numbers in random_boxes(20, 0.1, 0.3):
        points = [(x + numbers.uniform(-w, w) / 2, y + numbers.uniform(-h, h) / 2) for _ in range(keypoints)]
        points[0] = points[0] if numbers.random() < 0.8 else (0, 0)  # not labeled
        values = [value for px, py in points for value in (px, py, numbers.choice((0, 1)))[:size]]
        rows.append(f"0 {x} {y} {w} {h} {' '.join(map(str, values))}")
        expected.append((x, y, w, h))
    boxes, (issue,) = boxes_and_issues(tmp_path, rows)
    for box, values in zip(boxes, expected, strict=True):
        assert box == pytest.approx(values, abs=1e-5)
    assert issue.message == f"has 20 rows that fit a box with {keypoints} keypoints of {size} values, read as such"
    assert issue.hint == f"set kpt_shape: [{keypoints}, {size}] in data.yaml"


def polygon_rows(kind):
    for x, y, w, h, numbers in random_boxes(20, 0.02, 0.2):
        x0, y0, x1, y1 = x - w / 2, y - h / 2, x + w / 2, y + h / 2
        points = {
            "rectangle": [x0, y0, x1, y0, x1, y1, x0, y1],
            "closed": [x0, y0, x1, y0, x1, y1, x0, y1, x0, y0],
            "rotated": [x, y0, x1, y, x, y1, x0, y],
            "triangle": [x, y0, x1, y1, x0, y1],
            "octagon": [v for px, py in ((0, -1), (1, -1), (1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1))
                        for v in (x + px * w / 2, y + py * h / 2)],
            "contour": [v for _ in range(numbers.randint(3, 12)) for v in (numbers.uniform(x0, x1), y)],
            "corner of the image": [0, 0, x1, 0, x1, y1, 0, y1, 0, 0],
        }[kind]  # fmt: skip
        yield "0 " + " ".join(map(str, points))


@pytest.mark.parametrize(
    "kind", ["rectangle", "closed", "rotated", "triangle", "octagon", "contour", "corner of the image"]
)
def test_polygons_are_no_keypoints(tmp_path, kind):
    boxes, issues = boxes_and_issues(tmp_path, polygon_rows(kind))
    assert len(boxes) == 20
    assert not issues


def test_a_warning_where_the_rows_leave_a_doubt(tmp_path):
    boxes, (issue,) = boxes_and_issues(tmp_path, ["0 0.5 0.5 0.6 0.5 0.4 0.45 0.6 0.65"] * 3)
    assert boxes[0] == pytest.approx((0.5, 0.55, 0.2, 0.2), abs=1e-5), "a polygon"
    assert issue.message == "has 3 rows that fit a box with 2 keypoints of 2 values, read as polygons"
    assert issue.hint == "set kpt_shape: [2, 2] in data.yaml if they are keypoints"
