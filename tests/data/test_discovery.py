"""Discovery of a dataset's files: common folder layouts, and the errors if no file is found."""

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image, features

from deformable_detr.config.schema import DataConfig
from deformable_detr.data.dataset import ensure_distinct_splits, open_dataset
from deformable_detr.data.discovery import is_image
from deformable_detr.data.matching import IMAGE_SUFFIXES
from deformable_detr.predict.predictor import folder_images
from deformable_detr.utils.errors import UserError
from deformable_detr.utils.images import read_image, read_size


def write_coco(json_path, image_folder, names, prefix=""):
    """Write COCO JSON to one path and tiny images to another folder."""
    image_folder.mkdir(parents=True, exist_ok=True)
    json_path.parent.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (8, 6), "red").save(image_folder / name)
    content = {
        "images": [{"id": i, "file_name": prefix + name, "width": 8, "height": 6} for i, name in enumerate(names, 1)],
        "annotations": [],
        "categories": [{"id": 1, "name": "thing"}],
    }
    json_path.write_text(json.dumps(content))


def read_split(root, split, **data):
    """Open all images of a split and return their file names."""
    dataset = open_dataset(root, split, DataConfig(**data))
    for number in range(len(dataset)):
        assert dataset[number][0].shape == (3, 6, 8)
    return [dataset.path(number).name for number in range(len(dataset))]


@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES))
def test_image_suffixes(tmp_path, suffix):
    if suffix == ".avif" and not features.check("avif"):
        pytest.skip("this Pillow build has no AVIF support")
    file = tmp_path / f"a{suffix.upper()}"
    Image.new({".pbm": "1", ".pgm": "L"}.get(suffix, "RGB"), (8, 6), "white").save(file)
    assert is_image(file.name)
    assert read_size(file) == (6, 8)
    assert read_image(file).min() > 250
    assert folder_images(tmp_path) == [file]


def test_image_suffixes_are_documented():
    page = (Path(__file__).parents[2] / "docs/formats.md").read_text()
    listed = page.partition("finds these suffixes: ")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(\.\w+)`", listed)) == IMAGE_SUFFIXES


@pytest.mark.parametrize("folder", ["val", "valid", "validation"])
def test_roboflow(tmp_path, folder):
    for split in ("train", folder, "test"):
        write_coco(tmp_path / split / "_annotations.coco.json", tmp_path / split, [f"{split}.png"])
    assert read_split(tmp_path, "train") == ["train.png"]
    assert read_split(tmp_path, "test") == ["test.png"]
    for name in ("val", "valid", "validation"):
        assert read_split(tmp_path, name) == [f"{folder}.png"]


def test_split_folders_are_case_insensitive(tmp_path):
    for folder in ("Train", "VALID"):
        write_coco(tmp_path / folder / "_annotations.coco.json", tmp_path / folder, [f"{folder}.png"])
    assert read_split(tmp_path, "train") == ["Train.png"]
    assert read_split(tmp_path, "val") == ["VALID.png"]


@pytest.mark.parametrize("images", ["{}2017", "images/{}2017", "images/{}", "{}", "images", ""])
def test_coco(tmp_path, images):
    for split in ("train", "val"):
        write_coco(
            tmp_path / f"annotations/instances_{split}2017.json",
            tmp_path / images.format(split),
            [f"{split}-1.png", f"{split}-2.png"],
        )
        # The published dataset has these in the same folder.
        (tmp_path / f"annotations/captions_{split}2017.json").write_text("{}")
    assert read_split(tmp_path, "train") == ["train-1.png", "train-2.png"]
    assert read_split(tmp_path, "val") == ["val-1.png", "val-2.png"]


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("annotations/instances_train.json", "annotations/instances_val.json"),
        ("annotations/instances_Train_v2.json", "annotations/instances_my-valid.json"),
        ("annotations/train.json", "annotations/val.json"),
        ("train.json", "valid.json"),
        ("instances_train2017.json", "instances_val2017.json"),
        ("train/labels.json", "val/labels.json"),
    ],
)
def test_other_file_names(tmp_path, train, val):
    write_coco(
        tmp_path / train, tmp_path / "images", ["a.png"], prefix="images/" if "labels" not in train else "../images/"
    )
    write_coco(
        tmp_path / val, tmp_path / "images", ["b.png"], prefix="images/" if "labels" not in val else "../images/"
    )
    assert read_split(tmp_path, "train") == ["a.png"]
    assert read_split(tmp_path, "val") == ["b.png"]


def test_custom_split_names(tmp_path):
    write_coco(tmp_path / "fold1/_annotations.coco.json", tmp_path / "fold1", ["one.png"])
    write_coco(tmp_path / "annotations/instances_fold10.json", tmp_path / "fold10", ["ten.png"])
    assert read_split(tmp_path, "fold1") == ["one.png"]
    assert read_split(tmp_path, "fold10") == ["ten.png"]
    assert read_split(tmp_path, "fold1", val_split="fold1") == ["one.png"]
    with pytest.raises(UserError, match="no 'val' split"):
        read_split(tmp_path, "val")


def test_root_may_be_a_split_folder_or_a_file(tmp_path):
    write_coco(tmp_path / "train/_annotations.coco.json", tmp_path / "train", ["t.png"])
    write_coco(tmp_path / "cards/_annotations.coco.json", tmp_path / "cards", ["c.png"])
    write_coco(tmp_path / "annotations/instances_val2017.json", tmp_path / "val2017", ["v.png"])
    assert read_split(tmp_path / "train", "train") == ["t.png"]
    assert read_split(tmp_path / "train/_annotations.coco.json", "train") == ["t.png"]
    assert read_split(tmp_path / "annotations/instances_val2017.json", "val") == ["v.png"]
    assert read_split(str(tmp_path / "annotations/instances_val2017.json"), "valid") == ["v.png"]
    for split in ("train", "val"):  # the name is not a split
        assert read_split(tmp_path / "cards", split) == ["c.png"]
        assert read_split(tmp_path / "cards/_annotations.coco.json", split) == ["c.png"]
    with pytest.raises(UserError, match="train: no 'val' split"):
        read_split(tmp_path / "train", "val")
    with pytest.raises(UserError, match=r"_annotations\.coco\.json is not the 'val' split by its name"):
        read_split(tmp_path / "train/_annotations.coco.json", "val")
    with pytest.raises(UserError, match=r"instances_val2017\.json is not the 'train' split by its name"):
        read_split(tmp_path / "annotations/instances_val2017.json", "train")


def test_same_images_for_both_splits_are_rejected(tmp_path):
    write_coco(tmp_path / "cards/_annotations.coco.json", tmp_path / "cards", ["c.png"])
    write_coco(tmp_path / "more/_annotations.coco.json", tmp_path / "more", ["c.png"])
    train, val = (open_dataset(tmp_path / "cards", split) for split in ("train", "val"))
    with pytest.raises(UserError, match="would be both the training and the validation split"):
        ensure_distinct_splits(train, val, tmp_path)
    ensure_distinct_splits(train, open_dataset(tmp_path / "more", "val"), tmp_path)


def test_explicit_files(tmp_path, monkeypatch):
    write_coco(tmp_path / "notes/a.json", tmp_path / "photos", ["a.png"])
    write_coco(tmp_path / "notes/b.json", tmp_path / "more photos", ["b.png"])
    paths = {
        "images": "photos",
        "annotations": "notes/a.json",
        "val_images": str(tmp_path / "more photos"),
        "val_annotations": "notes/b.json",
    }
    assert read_split(tmp_path, "train", **paths) == ["a.png"]
    assert read_split(tmp_path, "val", **paths) == ["b.png"]
    assert read_split(tmp_path, "holdout", **paths, val_split="holdout") == ["b.png"]
    with pytest.raises(UserError, match="no 'test' split"):
        read_split(tmp_path, "test", **paths)

    # Paths fall back to the working directory; the image folder is optional.
    monkeypatch.chdir(tmp_path)
    assert read_split(tmp_path / "notes", "train", annotations="notes/a.json", images="photos") == ["a.png"]
    write_coco(tmp_path / "photos/c.json", tmp_path / "photos", ["c.png"])
    assert read_split(tmp_path, "train", annotations="photos/c.json") == ["c.png"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"images": "photos"}, r"data\.images is set without data\.annotations; set both"),
        (
            {"annotations": "x.json", "images": "photos"},
            r"data\.annotations: x\.json is neither in .* nor in the working directory",
        ),
        ({"annotations": "a.json", "images": "x"}, r"data\.images: x is neither in .* nor in the working directory"),
        ({"annotations": "a.json", "images": "a.json"}, r"data\.images: .*a\.json is not a folder"),
        ({"annotations": "photos", "images": "photos"}, "photos: Is a directory"),
    ],
)
def test_invalid_explicit_files(tmp_path, data, message):
    write_coco(tmp_path / "a.json", tmp_path / "photos", ["a.png"])
    with pytest.raises(UserError, match=message):
        read_split(tmp_path, "train", **data)
    assert read_split(tmp_path, "train", annotations="a.json", images="photos") == ["a.png"]


def test_images_in_another_folder(tmp_path):
    write_coco(tmp_path / "a.json", tmp_path / "photos/2024", ["a.png", "b.png"])
    assert open_dataset(tmp_path, data=DataConfig(annotations="a.json")).image_folder == tmp_path / "photos/2024"
    shutil.rmtree(tmp_path / "photos")
    message = r"names the image 'a\.png', which is missing in .*; put the images there or set data\.images"
    with pytest.raises(UserError, match=message):
        read_split(tmp_path, "train", annotations="a.json")


def test_no_validation_split(tmp_path):
    write_coco(tmp_path / "train/_annotations.coco.json", tmp_path / "train", ["t.png"])
    with pytest.raises(UserError) as caught:
        read_split(tmp_path, "val")
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}: no 'val' split; searched val|valid|validation/_annotations.coco.json")
    assert "data.val_images and data.val_annotations" in message
    assert "\n" not in message


def test_missing_dataset_and_empty_folder(tmp_path):
    with pytest.raises(UserError, match="no 'train' split"):
        read_split(tmp_path, "train")
    with pytest.raises(UserError, match="gone: no such dataset"):
        read_split(tmp_path / "gone", "train")


def test_unrelated_json_file_is_ignored(tmp_path):
    write_coco(tmp_path / "train/_annotations.coco.json", tmp_path / "train", ["a.png"])
    (tmp_path / "notes.json").write_text('{"categories": []}')
    assert read_split(tmp_path, "train") == ["a.png"]
    with pytest.raises(UserError, match=r"no 'val' split; notes\.json has no list 'images'"):
        read_split(tmp_path, "val")
    (tmp_path / "notes.json").write_text('{"images": []}')  # incomplete COCO JSON
    with pytest.raises(UserError, match="no list 'annotations'; export"):
        open_dataset(tmp_path, "val")


def test_ambiguous_annotation_files(tmp_path):
    for year in (2014, 2017):
        write_coco(tmp_path / f"annotations/instances_val{year}.json", tmp_path / f"val{year}", [f"{year}.png"])
    with pytest.raises(UserError, match=r"instances_val2014\.json, instances_val2017\.json"):
        read_split(tmp_path, "val")
    assert read_split(tmp_path, "val2014") == ["2014.png"]
    assert read_split(tmp_path, "val2017") == ["2017.png"]


def test_missing_image_is_reported(tmp_path):
    write_coco(tmp_path / "train/_annotations.coco.json", tmp_path / "train", ["a.png", "b.png", "c.png", "d.png"])
    assert len(read_split(tmp_path, "train")) == 4
    (tmp_path / "train/c.png").unlink()
    with pytest.raises(
        UserError,
        match=r"\.coco\.json: images\[2\] names the image 'c\.png', which is missing in .*train; add the file",
    ):
        open_dataset(tmp_path)
    (tmp_path / "train/d.png").unlink()
    with pytest.raises(UserError, match=r"images\[2\] names the image 'c\.png', which is missing"):
        open_dataset(tmp_path)


@pytest.mark.parametrize(
    "name", ["nul\0.png", "nul\0/a.png", "x" * 3000 + "/a.png", "x" * 3000, "train", "a.png/b.png"]
)
def test_invalid_file_names_are_reported(tmp_path, name):
    path = tmp_path / "train/_annotations.coco.json"
    write_coco(path, tmp_path / "train", ["a.png"])
    content = json.loads(path.read_text())
    content["images"].append({"id": 9, "file_name": name})
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"images\[1\] names the image .*; add the file or remove the record"):
        open_dataset(tmp_path)


def test_each_folder_is_listed_once(tmp_path, monkeypatch):
    names = [f"{number}.png" for number in range(30)]
    write_coco(tmp_path / "annotations/instances_train.json", tmp_path / "train", names)
    from deformable_detr.data import discovery

    listed = []
    original = discovery.os.listdir
    monkeypatch.setattr(discovery.os, "listdir", lambda folder: listed.append(folder) or original(folder))
    assert len(open_dataset(tmp_path)) == 30
    assert len(listed) == len(set(listed)) <= 4
