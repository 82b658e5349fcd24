"""What `check` leaves behind: lines, JSON, a page, a repaired copy; and what it never touches."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deformable_detr.cli import main
from deformable_detr.config.schema import DataConfig
from deformable_detr.data.dataset import open_dataset
from deformable_detr.data.validate import KINDS, check_for_training
from deformable_detr.data.validate import images as pictures
from deformable_detr.data.validate.repair import _turned
from deformable_detr.utils.errors import UserError
from tests.support.data_problems import SIZES, as_training, codes, found
from tests.support.datasets import OBJECTS, SIZE, coco_set, picture, voc_set, yolo_set

ROOT = Path(__file__).parents[3]
TRAIN = "train/_annotations.coco.json"
VAL = "valid/_annotations.coco.json"


def call(capsys, *arguments):
    """Exit code, standard output, standard error of the command."""
    capsys.readouterr()
    try:
        main(["check", *map(str, arguments)])
        code = 0
    except SystemExit as end:
        code = end.code or 0
    written = capsys.readouterr()
    return code, written.out, written.err


def state(root):
    """Every file's content and time."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(root.rglob("*")) if path.is_file()}


def spoiled(root):
    """A set with most of what can be repaired."""
    coco_set(root)
    path = root / TRAIN
    content = json.loads(path.read_text())
    images, objects = content["images"], content["annotations"]
    for number, name in enumerate(["gone", "broken", "turned", "large", "leaked", "good"], start=11):
        images.append({"id": number, "file_name": f"{name}.png", "width": SIZE[0], "height": SIZE[1]})
        objects.append({"id": number, "image_id": number, "category_id": 1, "bbox": [4, 2, 16, 10]})
        picture(root / "train" / f"{name}.png")
    (root / "train/gone.png").unlink()
    (root / "train/broken.png").write_bytes(b"no image")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(root / "train/turned.png", exif=exif)
    picture(root / "train/large.png", (80, 40))
    (root / "train/leaked.png").write_bytes((root / "valid/c.png").read_bytes())
    base = {"image_id": 16, "category_id": 1}
    objects += [
        {**base, "id": 50, "bbox": [4, 2, 16, 10]},  # there twice
        {**base, "id": 51, "bbox": [1, 1, 0, 5]},  # no width
        {**base, "id": 52, "bbox": [50, 1, 5, 5]},  # outside
        {**base, "id": 53, "bbox": [20, 10, 30, 30], "segmentation": [[20, 10, 30, 10, 30, 20]]},  # over the border
        {**base, "id": 53, "bbox": [8, 8, 8, 8]},  # the id of another
        {**base, "id": 54, "bbox": [8, 8, "x", 8]},
        {**base, "id": 55, "category_id": 77, "bbox": [8, 8, 9, 8]},
        {**base, "id": 56, "image_id": 77, "bbox": [8, 8, 9, 8]},
        {**base, "id": 57, "bbox": [0, 0, 0, 0], "iscrowd": 1},
    ]
    content["info"] = {"year": 2024}
    path.write_text(json.dumps(content))
    return root


def test_the_repaired_copy(tmp_path, capsys):
    root, out = spoiled(tmp_path / "set"), tmp_path / "copy"
    before = state(root)
    code, printed, _ = call(capsys, root, "--fix", out, "--set", "model.image_size=64")
    assert state(root) == before, "the original is only read"
    assert code == 0, printed
    assert "still error" not in printed

    content = json.loads((out / TRAIN).read_text())
    assert content["info"] == {"year": 2024}
    images = {record["file_name"]: record for record in content["images"]}
    assert images.keys() == {"a.png", "b.png", "empty.png", "turned.png", "large.png", "good.png"}
    assert (images["turned.png"]["width"], images["turned.png"]["height"]) == SIZE[::-1]
    assert (images["large.png"]["width"], images["large.png"]["height"]) == (80, 40)
    assert all((out / "train" / name).is_file() for name in images)
    boxes = {}
    for record in content["annotations"]:
        boxes.setdefault(record["image_id"], []).append(record["bbox"])
    assert boxes[13] == [[8, 4, 10, 16]], "turned with its image: 20 - 2 - 10 from the left"
    assert boxes[14] == [[8, 4, 32, 20]], "scaled with its image"
    assert boxes[16] == [[4, 2, 16, 10], [20, 10, 20, 10], [8, 8, 8, 8], [0, 0, 0, 0]]
    ids = [record["id"] for record in content["annotations"]]
    assert len(set(ids)) == len(ids)
    cut = next(record for record in content["annotations"] if record["bbox"] == [20, 10, 20, 10])
    assert cut["segmentation"] == [[20, 10, 30, 10, 30, 20]], "masks stay"
    assert cut["area"] == 200

    changes = [json.loads(line) for line in (out / "changes.jsonl").read_text().splitlines()]
    assert f"lists {len(changes)} changes" in printed
    assert {change["code"] for change in changes} == {
        "image-missing", "image-unreadable", "image-size", "leak", "box-duplicate", "box-outside", "box-overhang",
        "annotation-id-duplicate", "annotation-record", "category-unknown", "image-unknown",
    }  # fmt: skip
    as_training(out)
    # Writing to a copy's JSON, or replacing its images, leaves the original alone.
    (out / TRAIN).write_text("")
    (out / "train/a.png").unlink()
    assert state(root) == before


def resized_set(root, box):
    """A set whose a.png is twice as large as its record says, with one object of that box, outlined too."""
    coco_set(root)
    path = root / TRAIN
    content = json.loads(path.read_text())
    picture(root / "train/a.png", (SIZE[0] * 2, SIZE[1] * 2))
    mine = next(record["id"] for record in content["images"] if record["file_name"] == "a.png")
    x, y, w, h = box
    polygon = [x, y, x + w, y, x + w, y + h]
    others = [record for record in content["annotations"] if record["image_id"] != mine]
    object_ = {"id": 99, "image_id": mine, "category_id": 1, "bbox": box, "segmentation": [polygon]}
    path.write_text(json.dumps(content | {"annotations": [*others, object_]}))
    return root


def repaired(root, out, capsys):
    """The box and the outline that `resized_set`'s object has in the copy."""
    call(capsys, root, "--fix", out)
    record = next(record for record in json.loads((out / TRAIN).read_text())["annotations"] if record["id"] == 99)
    return record["bbox"], record["segmentation"]


def test_outlines_are_scaled_with_their_boxes(tmp_path, capsys):
    root = resized_set(tmp_path / "set", [4, 2, 16, 10])
    assert repaired(root, tmp_path / "copy", capsys) == ([8, 4, 32, 20], [[8, 4, 40, 4, 40, 24]])


def test_boxes_that_fit_the_file_alone_stay(tmp_path, capsys):
    root = resized_set(tmp_path / "set", [50, 20, 20, 15])  # the record: 40 × 20, the file: 80 × 40
    assert repaired(root, tmp_path / "copy", capsys) == ([50, 20, 20, 15], [[50, 20, 70, 20, 70, 35]])
    content = json.loads((tmp_path / "copy" / TRAIN).read_text())
    assert {(record["width"], record["height"]) for record in content["images"] if record["file_name"] == "a.png"} == {
        (SIZE[0] * 2, SIZE[1] * 2)
    }


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_boxes_turn_with_their_image(tmp_path, orientation):
    pixels = np.zeros((20, 40), np.uint8)
    pixels[2:12, 4:20] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    from deformable_detr.utils.images import read_image

    rows, columns = np.nonzero(read_image(tmp_path / "a.png")[0].numpy())
    ((x, y, w, h),) = _turned(np.array([[4, 2, 16, 10.0]]), 20, 40, orientation)
    assert (x, y, x + w, y + h) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("boxes-normalized", lambda box: [box[0] / 40, box[1] / 20, box[2] / 40, box[3] / 20]),
        ("boxes-corners", lambda box: [box[0], box[1], box[0] + box[2], box[1] + box[3]]),
    ],
)
def test_boxes_in_another_form_come_back(tmp_path, capsys, kind, change):
    objects = {"train": {"a": [(0, (14, 6, 20, 12)), (1, (16, 8, 10, 10))]}, "val": {"c": [(0, (1, 2, 30, 10))]}}
    root = coco_set(tmp_path / "set", objects)
    content = json.loads((root / TRAIN).read_text())
    before = [record["bbox"] for record in content["annotations"]]
    for record in content["annotations"]:
        record["bbox"] = change(record["bbox"])
    (root / TRAIN).write_text(json.dumps(content))
    assert kind in codes(root)
    code, _, _ = call(capsys, root, "--fix", tmp_path / "copy")
    after = [record["bbox"] for record in json.loads((tmp_path / "copy" / TRAIN).read_text())["annotations"]]
    assert after == pytest.approx(np.array(before))
    assert code == 0


def test_objects_of_polygons_alone_get_their_extent(tmp_path, capsys):
    root = coco_set(tmp_path / "set")
    content = json.loads((root / TRAIN).read_text())
    masks = [[[4, 2, 12, 2, 12, 9], [9, 8, 20, 8, 20, 12.5]], [[20, 5, 39, 5, 39, 19]], [[10, 5, 30, 5, 30, 15]]]
    for record, mask, box in zip(content["annotations"], masks, [None, [], ...], strict=True):
        record.pop("bbox")
        record |= {"segmentation": mask} | ({} if box is ... else {"bbox": box})
    (root / TRAIN).write_text(json.dumps(content))
    before = open_dataset(root)
    code, printed, _ = call(capsys, root, "--fix", tmp_path / "copy")
    assert code == 0
    assert "warning box-from-mask: " in printed
    assert "has 3 objects with a mask but no bbox" in printed
    objects = json.loads((tmp_path / "copy" / TRAIN).read_text())["annotations"]
    assert [record["bbox"] for record in objects] == [[4, 2, 16, 10.5], [20, 5, 19, 14], [10, 5, 20, 10]]
    assert [record["segmentation"] for record in objects] == masks
    for (_, old), (_, new) in zip(before, open_dataset(tmp_path / "copy"), strict=True):
        assert old.boxes.tolist() == new.boxes.tolist()
    changes = [json.loads(line) for line in (tmp_path / "copy/changes.jsonl").read_text().splitlines()]
    assert [change["code"] for change in changes] == ["box-from-mask"] * 3


def test_class_ids_off_by_one_come_back(tmp_path, capsys):
    root = coco_set(tmp_path / "set")
    content = json.loads((root / TRAIN).read_text())
    for record in content["annotations"]:
        record["category_id"] -= 1
    (root / TRAIN).write_text(json.dumps(content))
    code, _, _ = call(capsys, root, "--fix", tmp_path / "copy")
    assert code == 0
    assert [r["category_id"] for r in json.loads((tmp_path / "copy" / TRAIN).read_text())["annotations"]] == [1, 2, 2]


def test_file_names_of_other_systems_come_back(tmp_path, capsys):
    """As exported on Windows, or with a URL's names: the images are found, looked at, and named in the copy."""
    root = tmp_path / "set"
    for split, images in OBJECTS.items():
        content = json.loads((coco_set(tmp_path / "plain") / {"train": TRAIN}.get(split, VAL)).read_text())
        for stem, record in zip(images, content["images"], strict=True):
            picture(root / "images" / split / f"my {stem}.png")
            record["file_name"] = f"images\\{split}\\my {stem}.png" if split == "val" else f"my%20{stem}.png"
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"{split}.json").write_text(json.dumps(content))
    assert codes(root) == {"image-name"}
    with pytest.raises(UserError, match=r"'my%20a\.png', which is missing in .*, where 'my a\.png' is"):
        open_dataset(root)
    code, printed, _ = call(capsys, root, "--fix", tmp_path / "copy")
    assert code == 0
    assert "still error" not in printed
    for split, images in OBJECTS.items():
        copied = open_dataset(tmp_path / "copy", split)
        names = [copied.path(index).name for index in range(len(copied))]
        assert names == [f"my {stem}.png" for stem in images]
        assert [len(target.boxes) for _, target in copied] == [len(boxes) for boxes in images.values()]
    changes = [json.loads(line) for line in (tmp_path / "copy/changes.jsonl").read_text().splitlines()]
    assert [change["code"] for change in changes] == ["image-name"] * 4


def test_records_of_one_file_become_one(tmp_path, capsys):
    root, out = coco_set(tmp_path / "set"), tmp_path / "copy"
    content = json.loads((root / TRAIN).read_text())
    first = content["annotations"][0]
    content["images"].append({**content["images"][0], "id": 50})  # a record an object, and one object in both
    content["annotations"][1]["image_id"] = 50
    content["annotations"].append({**first, "id": 60, "image_id": 50})
    (root / TRAIN).write_text(json.dumps(content))
    with pytest.raises(
        UserError, match=r"images\[3\] \(id 50\) names .*'a.png' of images\[0\], and their objects differ"
    ):
        open_dataset(root)
    code, printed, _ = call(capsys, root, "--fix", out)
    assert code == 0, printed
    copy = json.loads((out / TRAIN).read_text())
    assert [record["file_name"] for record in copy["images"]] == ["a.png", "b.png", "empty.png"]
    assert [record["image_id"] for record in copy["annotations"]] == [1, 1, 2]
    assert "a repaired copy with 4 of 5 images and 5 of 6 objects; " in printed
    changes = [json.loads(line) for line in (out / "changes.jsonl").read_text().splitlines()]
    assert [(change["code"], change["record"]) for change in changes] == [
        ("image-twice", "images[3]"), ("box-duplicate", "annotations[3] (id 60)"),
    ]  # fmt: skip
    assert not codes(out) & {"image-in-parts", "image-twice", "image-copy"}


def test_the_copy_has_one_list_of_classes(tmp_path, capsys):
    root = coco_set(tmp_path / "set")
    content = json.loads((root / "valid/_annotations.coco.json").read_text())
    content["categories"] = [  # Roboflow's entry for the group comes first
        {"id": 0, "name": "pets", "supercategory": "none"},
        {"id": 2, "name": "cat", "supercategory": "pets"},
        {"id": 1, "name": "dog", "supercategory": "pets"},
    ]
    for record in content["annotations"]:
        record["category_id"] = 3 - record["category_id"]
    (root / "valid/_annotations.coco.json").write_text(json.dumps(content))
    assert codes(root) == {"category-renumbered"}
    code, printed, _ = call(capsys, root, "--fix", tmp_path / "copy")
    assert code == 0
    assert "still warning category-renumbered" not in printed
    fixed = json.loads((tmp_path / "copy/val/_annotations.coco.json").read_text())
    assert {record["id"]: record["name"] for record in fixed["categories"]} == {1: "cat", 2: "dog"}
    assert [record["category_id"] for record in fixed["annotations"]] == [1, 2]
    (change,) = [json.loads(line) for line in (tmp_path / "copy/changes.jsonl").read_text().splitlines()]
    assert (change["code"], change["change"]) == ("category-renumbered", "category ids 2 → 1, 1 → 2")


@pytest.mark.parametrize("make", [yolo_set, voc_set])
def test_other_formats_are_copied_as_coco(tmp_path, capsys, make):
    root = make(tmp_path / "set")
    code, _, _ = call(capsys, root, "--fix", tmp_path / "copy")
    assert code == 0
    for split in ("train", "val"):
        old, new = (open_dataset(place, split) for place in (root, tmp_path / "copy"))
        assert [new.path(k).stem for k in range(len(new))] == [old.path(k).stem for k in range(len(old))]
        assert len(new) == len(OBJECTS[split])
        for (_, before), (_, after) in zip(old, new, strict=True):
            np.testing.assert_allclose(after.boxes.numpy(), before.boxes.numpy(), atol=1e-5)
            assert after.labels.tolist() == before.labels.tolist()


def test_where_the_copy_may_not_be(tmp_path, capsys):
    root = coco_set(tmp_path / "set")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").touch()
    (tmp_path / "file").touch()
    before = state(tmp_path)
    for out, words in [(root, "lies in the data set"), (root / "copy", "lies in the data set"),
                       (tmp_path / "full", "not empty"), (tmp_path / "file" / "x", "cannot be written")]:  # fmt: skip
        code, printed, err = call(capsys, root, "--fix", out)
        assert (code, printed) == (2, "")
        assert err.startswith(f"error: --fix {out}: ")
        assert words in err
        assert err.count("\n") == 1
    assert state(tmp_path) == before


def test_exit_codes_and_lines(tmp_path, capsys):
    root = coco_set(tmp_path / "set")
    code, printed, err = call(capsys, root)
    assert (code, err) == (0, "")
    assert printed.splitlines()[-1].startswith(
        "train 3 images, 3 objects; val 1 images, 2 objects: 0 errors, 2 warnings"
    )
    content = json.loads((root / TRAIN).read_text())
    content["annotations"] += [
        {"id": 100 + n, "image_id": 99, "category_id": 1, "bbox": [1, 1, 9, 9]} for n in range(9)
    ]
    (root / TRAIN).write_text(json.dumps(content))
    code, printed, err = call(capsys, root, "--json", tmp_path / "new" / "found.json", "--image-size", 100)
    assert (code, err) == (2, "")
    lines = printed.splitlines()
    assert [line.startswith("error image-unknown: ") for line in lines[:6]] == [True] * 6
    assert lines[0] == (
        f"error image-unknown: {root / TRAIN}: annotations[3] (id 100) has image_id 99, which is not among the images; "
        "add the image or remove the object"
    )
    assert lines[5] == "error image-unknown: 4 more"
    told = json.loads((tmp_path / "new/found.json").read_text())
    assert told["image_size"] == 100
    assert told["counts"]["error"] == told["kinds"]["image-unknown"] == 9
    mine = [finding for finding in told["findings"] if finding["code"] == "image-unknown"]
    assert [finding["position"] for finding in mine] == list(range(3, 12))
    assert told["splits"]["train"]["classes"] == {"cat": 1, "dog": 2}


@pytest.mark.parametrize("option", ["--report", "--json"])
def test_outputs_that_cannot_be(tmp_path, capsys, option):
    root = coco_set(tmp_path / "set")
    (tmp_path / "file").touch()
    for path in (root, tmp_path / "file" / "x"):
        code, printed, err = call(capsys, root, option, path)
        assert (code, printed) == (2, "")
        assert err.startswith(f"error: {option} {path}: ")


class Page(HTMLParser):
    """Tags with what they point to, and the text."""

    def __init__(self, text):
        super().__init__()
        self.links, self.tags, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.links += [value for key, value in attributes if key in ("href", "src") and value]

    def handle_data(self, data):
        self.words.append(data)


def test_the_page(tmp_path, capsys):
    root = spoiled(tmp_path / "a <b> & set")
    content = json.loads((root / TRAIN).read_text())
    content["categories"].append({"id": 40, "name": "<script>alert(1)</script>"})
    (root / TRAIN).write_text(json.dumps(content))
    call(capsys, root, "--report", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    assert "<script" not in text
    assert "http" not in re.sub(r"base64,[^\"]*", "", text), "nothing from elsewhere"
    assert all(link.startswith(("#", "data:image/jpeg;base64,")) for link in page.links)
    sections = [attributes["id"] for tag, attributes in page.tags if tag == "section"]
    assert {"image-missing", "leak", "box-outside", "box-overhang", "image-rotated"} <= set(sections)
    assert [link[1:] for link in page.links if link.startswith("#")] == sections
    assert len([tag for tag, _ in page.tags if tag == "svg"]) >= len(sections) // 2
    boxes = [attributes for tag, attributes in page.tags if tag == "rect" and attributes["class"] == "suspect"]
    # The box over the border, on the picture of 40 × 20, down to half a picture under it.
    assert ("20.0", "10.0", "30.0", "20.0") in [
        tuple(box[key] for key in ("x", "y", "width", "height")) for box in boxes
    ]
    assert "Training cannot use this set yet." in page.words


def test_the_page_of_a_good_set(tmp_path, capsys):
    root = coco_set(tmp_path / "set")
    call(capsys, root, "--report", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "Training can use this set." in text
    assert 'class="error"><b>0</b>' in text


def test_before_training_warnings_are_brief(tmp_path):
    root = coco_set(tmp_path)
    content = json.loads((root / TRAIN).read_text())
    content["annotations"] += [{"id": 9 + n, "image_id": 1, "category_id": 1, "bbox": [n, 2, 0, 5]} for n in range(7)]
    (root / TRAIN).write_text(json.dumps(content))
    lines = check_for_training(root, DataConfig(), **SIZES)
    assert [line.split(":")[0] for line in lines] == [
        "warning class-rare", "warning class-rare", "warning box-degenerate", "warning box-degenerate",
        "all about the data",
    ]  # fmt: skip
    assert lines[3].endswith("6 more")
    assert check_for_training(root, DataConfig(check="off"), **SIZES) == ()


def test_before_training_the_first_error_ends_it(tmp_path):
    root = coco_set(tmp_path)
    (root / "train/a.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"train/a\.png: cannot be read as an image .*; replace or remove it$"):
        check_for_training(root, DataConfig(), **SIZES)
    (root / "train/b.png").unlink()
    with pytest.raises(UserError, match=rf"'b\.png'.*\(the first of 2 errors; all: deformable-detr check {root}\)$"):
        check_for_training(root, DataConfig(), **SIZES)
    check_for_training(root, DataConfig(check="off"), **SIZES)


def test_auto_looks_at_a_part_of_a_large_set_and_full_at_all(tmp_path, monkeypatch):
    root = coco_set(
        tmp_path, {"train": {f"{n:02}": [(n % 2, (4, 2, 16, 10))] for n in range(40)}, **{"val": OBJECTS["val"]}}
    )
    assert vars(found(root, "auto").coverage) == {"images": 41, "headers": 41, "decoded": 41}
    monkeypatch.setattr(pictures, "AUTO_IMAGES", 10)
    assert vars(found(root, "auto").coverage) == {"images": 41, "headers": 41, "decoded": 9}
    path = root / "train/03.png"
    path.write_bytes(path.read_bytes()[:1000])  # the header is whole
    assert not found(root, "auto").errors
    assert [finding.code for finding in found(root, "full").errors] == ["image-unreadable"]
    monkeypatch.setattr(pictures, "AUTO_SECONDS", -1.0)
    monkeypatch.setattr(pictures, "CHUNK", 4)
    assert vars(found(root, "auto").coverage) == {"images": 41, "headers": 4, "decoded": 4}


def test_the_documentation_has_every_kind_as_it_is():
    text = (ROOT / "docs/check.md").read_text()
    rows = dict(re.findall(r"^\| `([a-z-]+)` \| (.*) \|$", text, re.MULTILINE))
    assert rows == {code: f"{kind.severity} | {kind.meaning} | {kind.mend}" for code, kind in KINDS.items()}
