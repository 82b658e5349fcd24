"""Datasets without a validation split, and the `split` command, which copies them into splits."""

import json
import re
import shlex
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from deformable_detr.config import presets
from deformable_detr.data.dataset import open_dataset
from deformable_detr.data.split import assign_splits
from deformable_detr.data.validate import repair
from deformable_detr.evaluation.evaluator import open_eval_dataset
from deformable_detr.utils.errors import UserError
from tests.support.commands import run_command
from tests.support.data_problems import load_for_training, snapshot
from tests.support.datasets import (
    NAMES,
    OBJECTS,
    expected_objects,
    read_objects,
    voc_xml,
    write_coco_dataset,
    write_image,
    write_voc_dataset,
    write_yolo_dataset,
    yolo_row,
)

COCO_FILE = "_annotations.coco.json"


def coco(images, annotations):
    """Return a writer of COCO JSON and images in separate folders, as labeling tools export them."""

    def make(root):
        write_coco_dataset(root)
        (root / annotations).parent.mkdir(exist_ok=True)
        (root / "train" / COCO_FILE).rename(root / annotations)
        (root / images).parent.mkdir(exist_ok=True)
        (root / "train").rename(root / images)
        shutil.rmtree(root / "valid")

    return make


def yolo(images, labels, classes="classes.txt"):
    """Return a writer of YOLO without a data.yaml."""

    def make(root):
        for stem, boxes in OBJECTS["train"].items():
            write_image(root / images / f"{stem}.png")
            (root / labels).mkdir(parents=True, exist_ok=True)
            (root / labels / f"{stem}.txt").write_text("".join(yolo_row(*box) for box in boxes))
        (root / classes).write_text("\n".join(NAMES) + "\n\n")
        (root / "notes.json").write_text("{}")

    return make


def voc(images, annotations):
    """Return a writer of Pascal VOC without a list of images."""

    def make(root):
        for stem, boxes in OBJECTS["train"].items():
            write_image(root / images / f"{stem}.jpg")
            (root / annotations).mkdir(parents=True, exist_ok=True)
            (root / annotations / f"{stem}.xml").write_text(voc_xml(f"{stem}.jpg", boxes))

    return make


UNSPLIT = {
    "Label Studio's COCO": coco("images", "result.json"),
    "CVAT's COCO": coco("images/default", "annotations/instances_default.json"),
    "JSON in annotations": coco("images", "annotations/labels.json"),
    "Label Studio's YOLO": yolo("images", "labels"),
    "classes.txt beside the labels": yolo("images", "labels", "labels/classes.txt"),
    "LabelImg's YOLO": yolo(".", "."),
    "CVAT's YOLO": yolo("obj_train_data", "obj_train_data", "obj.names"),
    "VOC without lists": voc("JPEGImages", "Annotations"),
    "VOC in images and annotations": voc("images", "annotations"),
    "LabelImg's VOC": voc(".", "."),
}


def split(capsys, *arguments):
    code, out, err = run_command(capsys, "split", *arguments)
    assert code == 0, err
    return out


def split_error(capsys, *arguments):
    code, _, err = run_command(capsys, "split", *arguments)
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def write_unsplit(root, names="abcdefghij", folder="train", **extra):
    """Write an unsplit dataset with one object per image and alternating classes."""
    objects = {name: [(number % 2, (4, 2, 16, 10))] for number, name in enumerate(names)} | extra
    write_coco_dataset(root, {"train": objects}, folders=(folder,))
    for seed, name in enumerate(objects, start=1000 * len(folder)):
        write_image(root / folder / f"{name}.png", seed=seed)
    return root


def split_stems(out):
    """Return split → stems of its images."""
    stems = {}
    for file in sorted(out.glob(f"*/{COCO_FILE}")):
        images = json.loads(file.read_text())["images"]
        assert all((file.parent / image["file_name"]).is_file() for image in images)
        assert len(list(file.parent.rglob("*.png"))) == len(images)
        stems[file.parent.name] = {Path(image["file_name"]).stem for image in images}
    return stems


@pytest.mark.parametrize("make", UNSPLIT.values(), ids=UNSPLIT)
def test_unsplit_dataset_is_read_as_one_and_split(tmp_path, capsys, make):
    root = tmp_path / "my dataset"
    root.mkdir()
    make(root)
    assert read_objects(root, "train") == expected_objects("train")
    with pytest.raises(UserError, match="split it with deformable-detr split") as raised:
        load_for_training(root)
    if "no 'val' split" not in str(raised.value):  # the name obj_train_data is a split
        assert read_objects(root, "val") == expected_objects("train")
    before = snapshot(root)
    command = re.search(r"split it with deformable-detr (split .*) --out NEW", str(raised.value))[1]
    split(capsys, *shlex.split(command)[1:], "--out", tmp_path / "new", "--val", "0.4")
    load_for_training(tmp_path / "new")
    both = read_objects(tmp_path / "new", "train") | read_objects(tmp_path / "new", "val")
    assert both == expected_objects("train")
    assert snapshot(root) == before


def test_classes_txt_with_one_folder_per_split(tmp_path):
    for layout in ("{kind}/{split}", "{split}/{kind}"):
        root = write_yolo_dataset(tmp_path / layout[1:5], layout)
        (root / "data.yaml").unlink()
        with pytest.raises(UserError, match=r"YOLO rows without class names; add a data\.yaml or classes\.txt"):
            read_objects(root, "val")
        (root / "classes.txt").write_text("cat\ndog\n")
        assert read_objects(root, "train") == expected_objects("train")
        assert read_objects(root, "val") == expected_objects("val")
        with pytest.raises(UserError, match="no 'test' split"):
            read_objects(root, "test")
    (root / "classes.txt").write_text("cat\ncat\n")
    with pytest.raises(UserError, match=r"classes\.txt.*lists 'cat' twice"):
        read_objects(root, "train")


def test_voc_lists_define_splits_for_any_folder_names(tmp_path):
    root = write_voc_dataset(tmp_path / "voc")
    (root / "JPEGImages").rename(root / "images")
    (root / "Annotations").rename(root / "annotations")
    assert read_objects(root, "train") == expected_objects("train")
    assert read_objects(root, "val") == expected_objects("val")
    (root / "ImageSets/Main/val.txt").unlink()
    with pytest.raises(UserError, match=r"no 'val' split; write .*val\.txt"):
        read_objects(root, "val")


def test_missing_validation_split_suggests_a_fix(tmp_path, capsys):
    write_unsplit(tmp_path / "set")
    with pytest.raises(UserError, match=r"no 'val' split; .*; or split it with deformable-detr split .*set --out NEW"):
        load_for_training(tmp_path / "set")
    write_unsplit(tmp_path / "set", folder="test")
    with pytest.raises(UserError, match=r"; or use the test split with --set data\.val_split=test"):
        load_for_training(tmp_path / "set")
    split(capsys, tmp_path / "set", "--out", tmp_path / "new")
    assert split_stems(tmp_path / "new")["test"] == set("abcdefghij"), "an existing test split is kept"
    assert "leave out --test" in split_error(capsys, tmp_path / "set", "--out", tmp_path / "x", "--test", "0.1")


def test_split_is_stratified_and_seeded(tmp_path, capsys):
    write_unsplit(tmp_path / "set", "abcdefghijklmnopqrst", none1=[], none2=[], none3=[], none4=[], none5=[])
    out = split(capsys, tmp_path / "set", "--out", tmp_path / "new", "--test", "0.2")
    assert "Next: deformable-detr train" in out
    assert "no group is split" not in out
    stems = split_stems(tmp_path / "new")
    assert {name: len(names) for name, names in stems.items()} == {"train": 15, "val": 5, "test": 5}
    assert sum(map(len, stems.values())) == len(set.union(*stems.values())) == 25
    for name in stems:
        data = open_dataset(tmp_path / "new", name)
        labels = Counter(int(target.labels[0]) if len(target.labels) else None for _, target in data)
        assert labels == ({0: 6, 1: 6, None: 3} if name == "train" else {0: 2, 1: 2, None: 1})
    for seed in (0, 1):
        split(capsys, tmp_path / "set", "--out", tmp_path / f"seed{seed}", "--test", "0.2", "--seed", seed)
    assert split_stems(tmp_path / "seed0") == stems != split_stems(tmp_path / "seed1")


def test_rare_classes_are_in_every_split():
    # 10 of 1000 images have the class: a random split would often leave it out of validation.
    counts = [{0: 1, 1: 1} if number < 10 else {0: 1} for number in range(1000)]
    for seed in range(30):
        names = assign_splits([1] * 1000, counts, {"train": 0.8, "val": 0.2}, seed)
        assert names.count("val") == 200
        assert sum(name == "val" for name, count in zip(names, counts, strict=True) if 1 in count) == 2
    assert assign_splits([1], [{0: 1}], {"train": 0.8, "val": 0.2}, 0) == ["train"]


def test_fractions_hold_if_every_class_has_few_images():
    for counts, fractions in [
        ([{number // 5: 1} for number in range(100)], {"train": 0.9, "val": 0.1}),
        ([{number // 5: 1} for number in range(100)], {"train": 0.7, "val": 0.2, "test": 0.1}),
        ([{number // 2: 1} for number in range(100)], {"train": 0.8, "val": 0.2}),
    ]:
        found = Counter(assign_splits([1] * 100, counts, fractions, 0))
        assert found == {name: round(100 * fraction) for name, fraction in fractions.items()}
    assert sorted(assign_splits([1, 1, 1], [{0: 1}] * 3, {"train": 0.7, "val": 0.2, "test": 0.1}, 0)) == [
        "test",
        "train",
        "val",
    ]
    for sizes in ([200, 190, 20], [100, 30], [50, 50, 50, 1]):
        counts = [{0: size, number: 5} for number, size in enumerate(sizes, 1)]
        assert set(assign_splits(sizes, counts, {"train": 0.9, "val": 0.1}, 0)) == {"train", "val"}


def test_large_groups_do_not_overfill_a_split():
    sizes = [40, 30, 10, 10, 5, 3, 1, 1]
    names = assign_splits(sizes, [{} for _ in sizes], {"train": 0.7, "val": 0.3}, 0)
    assert sum(size for size, name in zip(sizes, names, strict=True) if name == "val") == 30


def test_group_by_keeps_groups_in_one_split(tmp_path, capsys):
    names = [f"{video}_{frame}" for video in ("north", "south", "east", "west", "up") for frame in range(4)]
    root = write_unsplit(tmp_path / "set", names)
    out = split(capsys, root, "--out", tmp_path / "new", "--group-by", "^[a-z]+")
    assert "20 images in 5 groups; no group is split" in out
    videos = [{stem.split("_")[0] for stem in stems} for stems in split_stems(tmp_path / "new").values()]
    assert not set.intersection(*videos)
    assert sorted(map(len, videos)) == [1, 4]

    split(capsys, root, "--out", tmp_path / "ungrouped")
    videos = [{stem.split("_")[0] for stem in stems} for stems in split_stems(tmp_path / "ungrouped").values()]
    assert set.intersection(*videos), "grouped only on request"
    assert "matches no file name, such as 'north_0.png'" in split_error(
        capsys, root, "--out", tmp_path / "x", "--group-by", "^Video"
    )
    assert "give another --group-by than '_'" in split_error(capsys, root, "--out", tmp_path / "x", "--group-by", "_")
    assert "20 images in 20 groups" in split(capsys, root, "--out", tmp_path / "each", "--group-by", ".*")
    assert "is not a regular expression" in split_error(capsys, root, "--out", tmp_path / "x", "--group-by", "(")


def test_copies_of_an_image_stay_in_one_split(tmp_path, capsys):
    augmented = [f"card{number}_jpg.rf.{copy:032x}" for number in range(5) for copy in range(3)]
    root = write_unsplit(tmp_path / "set", [*augmented, "one", "two", "three"])
    for name in ("two", "three"):
        (root / f"train/{name}.png").write_bytes((root / "train/one.png").read_bytes())
    for seed in range(5):
        out = split(capsys, root, "--out", tmp_path / f"new{seed}", "--seed", seed)
        assert "18 images in 6 groups" in out
        train, val = (split_stems(tmp_path / f"new{seed}")[name] for name in ("train", "val"))
        assert {stem.split(".")[0] for stem in train}.isdisjoint(stem.split(".")[0] for stem in val)
        assert len(val & {"one", "two", "three"}) in (0, 3)


def test_split_repairs_the_dataset(tmp_path, capsys):
    root = write_unsplit(tmp_path / "set")
    (root / "train/c.png").unlink()
    (root / "train/sub").mkdir()
    (root / "train/d.png").rename(root / "train/sub/d.png")
    content = json.loads((root / "train" / COCO_FILE).read_text())
    content["images"][3]["file_name"] = "sub/d.png"
    content["annotations"][0]["bbox"] = [30, 10, 20, 5]
    (root / "train" / COCO_FILE).write_text(json.dumps(content))
    out = split(capsys, root, "--out", tmp_path / "new", "--seed", 2)
    assert ": split copy with 9 of 10 images and 9 of 10 objects" in out
    found = split_stems(tmp_path / "new")
    assert found["train"] | found["val"] == set("abdefghij")
    load_for_training(tmp_path / "new")


@pytest.mark.parametrize(
    "folders",
    [
        ("obj_Train_data", "obj_Validation_data", "obj_Test_data"), ("images/Train", "images/Val", "images/Test"),
        ("images/train2017", "images/val2017", "images/test2017"), ("Train/images", "Valid/images", "Test/images"),
    ],
)  # fmt: skip
def test_split_folder_spellings(tmp_path, capsys, folders):
    for place, stem in zip(folders, ("a", "c", "e"), strict=True):
        write_image(tmp_path / place / f"{stem}.png")
        label = tmp_path / place.replace("images", "labels") / f"{stem}.txt"
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_text(yolo_row(0, (4, 2, 16, 10)))
    (tmp_path / "obj.names").write_text("cat\ndog\n")
    assert [list(read_objects(tmp_path, name)) for name in ("train", "val", "test")] == [["a"], ["c"], ["e"]]
    assert "already has a 'val' split" in split_error(capsys, tmp_path, "--out", tmp_path.with_name("new"))


@pytest.mark.parametrize("name", ["default", "trainval"])
def test_single_list_of_an_unsplit_voc_dataset(tmp_path, name):
    root = write_voc_dataset(tmp_path)
    lists = root / "ImageSets/Main"
    (lists / "val.txt").unlink()
    assert read_objects(root, "train") == expected_objects("train")
    (lists / "train.txt").rename(lists / f"{name}.txt")
    assert read_objects(root, "train") == read_objects(root, "val") == expected_objects("train")


def test_symbolic_links_to_image_folders(tmp_path):
    yolo("photos/cam", "photos/cam", "classes.txt")(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "images/cam").symlink_to(tmp_path / "photos/cam")
    (tmp_path / "images/cam/back").symlink_to(tmp_path / "images")
    assert read_objects(tmp_path, "train") == expected_objects("train")


def test_classes_txt_without_validation_images(tmp_path):
    yolo("images/train", "labels/train")(tmp_path)
    assert read_objects(tmp_path, "train") == expected_objects("train")
    with pytest.raises(
        UserError, match=r"no 'val' split; notes\.json has no list 'images'; add .* classes\.txt and images/val"
    ):
        read_objects(tmp_path, "val")


def test_empty_validation_split_is_replaced(tmp_path, capsys):
    root = write_unsplit(tmp_path / "set")
    content = json.loads((root / "train" / COCO_FILE).read_text())
    (root / "valid").mkdir()
    (root / "valid" / COCO_FILE).write_text(json.dumps(content | {"images": [], "annotations": []}))
    split(capsys, root, "--out", tmp_path / "new")
    assert {name: len(stems) for name, stems in split_stems(tmp_path / "new").items()} == {"train": 8, "val": 2}


def test_unreadable_files_are_reported_and_listed(tmp_path, capsys):
    root = tmp_path / "set"
    voc("images", "annotations")(root)
    (root / "annotations/a.xml").write_text("<annotation>")
    (root / "images/b.jpg").unlink()
    for number in range(3):
        write_image(root / f"images/more{number}.jpg", seed=number)
    (root / "annotations/more0.xml").write_text(voc_xml("more0.jpg", OBJECTS["train"]["a"]))
    out = split(capsys, root, "--out", tmp_path / "new")
    assert "error label-unreadable: " in out
    assert "error label-unmatched: " in out
    assert "split-same" not in out
    assert {json.loads(line)["code"] for line in (tmp_path / "new/changes.jsonl").read_text().splitlines()} == {
        "label-unreadable", "label-unmatched"
    }  # fmt: skip

    broken = write_unsplit(tmp_path / "broken")
    (broken / "train" / COCO_FILE).write_text('{"images": [')
    assert "not valid JSON" in split_error(capsys, broken, "--out", tmp_path / "x")
    without_images = write_unsplit(tmp_path / "gone")
    for path in (without_images / "train").glob("*.png"):
        path.unlink()
    assert "which is missing" in split_error(capsys, without_images, "--out", tmp_path / "x")


def test_evaluation_on_training_images_warns(tmp_path, caplog):
    config = presets.small(num_classes=2, backbone_weights="none")
    model = SimpleNamespace(config=config, resize_rule=config.resize_rule)
    UNSPLIT["Label Studio's YOLO"](tmp_path / "unsplit")
    warning = "is not split: the evaluation includes the training images"
    open_eval_dataset(model, tmp_path / "unsplit")
    assert [warning in record.getMessage() for record in caplog.records] == [True]
    caplog.clear()
    write_coco_dataset(tmp_path / "split")
    for root, name in [("unsplit", "train"), ("split", "val"), ("split", "train"), ("split/valid", "val")]:
        open_eval_dataset(model, tmp_path / root, name)
    assert warning not in caplog.text


def test_custom_split_names(tmp_path, capsys):
    root = write_unsplit(tmp_path / "set", folder="all")
    out = split(capsys, root, "--out", tmp_path / "new", "--set", "data.train_split=all", "--set", "data.val_split=dev")
    assert set(split_stems(tmp_path / "new")) == {"all", "dev"}
    assert "--out runs/NAME --set data.train_split=all --set data.val_split=dev" in out
    error = split_error(capsys, root, "--out", tmp_path / "x", "--set", "data.val_split=test", "--test", "0.1")
    assert "both name the split 'test'" in error


def test_output_folder_is_unchanged_after_an_error(tmp_path, capsys, monkeypatch):
    root = write_yolo_dataset(tmp_path / "yolo")
    (root / "data.yaml").write_text("train: images/train\nnames: [cat, dog]\n")
    inside = root / "images/train/new"
    assert "lies in the dataset" in split_error(capsys, root / "data.yaml", "--out", inside)
    assert not inside.exists()
    few = write_unsplit(tmp_path / "few", "a")
    (tmp_path / "mine").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    for out in ("mine", "link"):
        assert "leave none" in split_error(capsys, few, "--out", tmp_path / out)
        assert list((tmp_path / out).iterdir()) == []
    monkeypatch.setenv("HOME", str(tmp_path))
    split(capsys, write_unsplit(tmp_path / "set"), "--out", "~/home")
    assert split_stems(tmp_path / "home")


def test_failed_split_leaves_no_files(tmp_path, capsys, monkeypatch):
    root = write_unsplit(tmp_path / "set")
    new = tmp_path / "new"
    write_coco_dataset(tmp_path / "split")
    few = write_unsplit(tmp_path / "few", "a")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").touch()
    for arguments, words in [
        ((tmp_path / "split", "--out", new), "already has a 'val' split"),
        ((few, "--out", new), "1 images in 1 groups that stay together leave none for the 'val' split"),
        ((tmp_path / "absent", "--out", new), "no such dataset"),
        ((tmp_path / "full", "--out", new), "no 'train' split"),
        ((root, "--out", tmp_path / "full"), "is not empty"), ((root, "--out", root / "in"), "--out"),
        ((root, "--out", new, "--val", "0"), "--val 0 "),
        ((root, "--out", new, "--val", "0.6", "--test", "0.4"), "--val"),
        ((root, "--out", new, "--val", "nan"), "--val nan"),
    ]:  # fmt: skip
        assert words in split_error(capsys, *arguments), arguments
        assert not new.exists()
    assert (tmp_path / "full/mine.txt").exists()

    def disk_full(*_):
        raise OSError(28, "No space left on device")

    before = snapshot(root)
    monkeypatch.setattr(repair, "_link_image", disk_full)
    assert f"--out {new}: cannot be written: No space left" in split_error(capsys, root, "--out", new)
    code, _, err = run_command(capsys, "check", tmp_path / "split", "--fix", new)
    assert code == 2
    assert f"--fix {new}: cannot be written: No space left" in err
    assert not new.exists()
    assert snapshot(root) == before
