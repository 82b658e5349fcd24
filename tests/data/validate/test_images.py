"""Checks of image files: training rejects exactly those with errors, in one line."""

import os

import pytest
from PIL import Image

from tests.support.data_problems import assert_issues, check_report, issue_codes
from tests.support.datasets import write_coco_dataset, write_image
from tests.support.image_files import BROKEN, FILES, png_16bit


@pytest.mark.parametrize("case", FILES)
def test_image_file(tmp_path, case):
    content, expected = FILES[case]
    root = write_coco_dataset(tmp_path / "set")
    assert issue_codes(root) == set(), "valid without the fault"
    (root / "train/a.png").write_bytes(content)
    assert_issues(root, expected, "a.png")


def test_dark_16bit_image_is_reported_with_a_hint(tmp_path):
    root = write_coco_dataset(tmp_path)
    (root / "train/a.png").write_bytes(png_16bit(4095))
    (issue,) = (issue for issue in check_report(root).issues if issue.code == "image-dim")
    assert issue.line == (
        f"{root / 'train/a.png'}: has 16 bits, but its brightest pixel has the level 16 of 255, so it is almost black; "
        "scale its values to 0..65535, or save it with 8 bits"
    )


def test_replaced_image_files(tmp_path):
    for number, (make, expected) in enumerate([
        (os.unlink, {"image-missing"}),
        (lambda path: (os.unlink(path), path.mkdir()), BROKEN),
        (lambda path: (os.unlink(path), path.symlink_to("nowhere.png")), {"image-unreadable"}),
        (lambda path: (os.unlink(path), os.mkfifo(path)), BROKEN),
        (lambda path: path.rename(path.with_name("A.PNG")), {"image-name"}),
        (lambda path: write_image(path.with_name("new.png")), {"images-unlisted"}),
    ]):  # fmt: skip
        root = write_coco_dataset(tmp_path / str(number))
        make(root / "train/a.png")
        message = assert_issues(root, expected, "a.png")
        assert number != 4 or "'A.PNG' is read instead" in message


def test_copied_images(tmp_path):
    for name, copy, expected in [
        ("same file in both splits", lambda a, b, c: c.write_bytes(a.read_bytes()), {"leak"}),
        ("same pixels in both splits", lambda a, b, c: Image.open(a).save(c, compress_level=0), {"leak"}),
        ("link", lambda a, b, c: (c.unlink(), c.symlink_to(a)), {"leak"}),
        ("twice in training", lambda a, b, c: b.write_bytes(a.read_bytes()), {"image-copy"}),
        ("other pixels", lambda a, b, c: Image.open(a).rotate(180).save(c), set()),
    ]:
        root = write_coco_dataset(tmp_path / name)
        copy(root / "train/a.png", root / "train/b.png", root / "valid/c.png")
        assert_issues(root, expected, "a.png")
