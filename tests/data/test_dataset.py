"""COCO datasets: published ones, labels, boxes, repairs, and one error per faulty record."""

import copy
import json
import logging
import pickle
import time
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from deformable_detr.config.image_size import ShortestEdge
from deformable_detr.data import transforms
from deformable_detr.data.dataset import open_dataset
from deformable_detr.structures import Category
from deformable_detr.utils.errors import UserError

VALID = {
    "images": [
        {"id": 11, "file_name": "a.png", "width": 40, "height": 20},
        {"id": 7, "file_name": "b.png", "width": 40, "height": 20},
        {"id": 0, "file_name": "empty.png", "width": 40, "height": 20},
    ],
    "annotations": [
        {"id": 0, "image_id": 7, "category_id": 90, "bbox": [10, 5, 20, 10], "area": 123.0, "iscrowd": 0},
        {"id": 0, "image_id": 11, "category_id": 3, "bbox": [0, 0, 40, 20]},
        {"id": 5, "image_id": 7, "category_id": 3, "bbox": [0, 0, 4, 4], "area": 16, "iscrowd": 1},
        {"id": 6, "image_id": 7, "category_id": 44, "bbox": [30.5, 10, 30, 30], "area": None, "iscrowd": None},
    ],
    "categories": [{"id": 90, "name": "z"}, {"id": 3, "name": "a"}, {"id": 44, "name": "m"}, {"id": 45, "name": "no"}],
}


def write(folder, content=None, size=(40, 20)):
    """Write a dataset with the split 'train'; by default with the content VALID."""
    train = folder / "train"
    train.mkdir(parents=True, exist_ok=True)
    for record in VALID["images"]:
        Image.new("RGB", size, "blue").save(train / record["file_name"])
    text = content if isinstance(content, str) else json.dumps(VALID if content is None else content)
    (train / "_annotations.coco.json").write_text(text)
    return folder


def pixel_boxes(sample):
    """Return the boxes of a sample as xyxy in pixels."""
    image, target = sample
    height, width = image.shape[-2:]
    cx, cy, w, h = (target.boxes * torch.tensor([width, height] * 2)).unbind(-1)
    return torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], -1).tolist()


def test_labels_boxes_and_ids(tmp_path, caplog):
    data = open_dataset(write(tmp_path))
    assert data.categories == (Category(3, "a"), Category(44, "m"), Category(45, "no"), Category(90, "z"))
    assert len(data) == 3
    assert data.image_ids.tolist() == [11, 7, 0]
    image, target = data[1]
    assert image.shape == (3, 20, 40)
    assert image.dtype == torch.uint8
    assert target.image_id == 7
    assert target.original_size == (20, 40)
    assert target.labels.dtype == torch.int64
    assert target.boxes.dtype == torch.float32
    assert target.labels.tolist() == [3, 1], "the crowd is skipped"
    torch.testing.assert_close(target.boxes[0], torch.tensor([0.5, 0.5, 0.5, 0.5]))
    assert pixel_boxes(data[1]) == [[10, 5, 30, 15], [30.5, 10, 40, 20]], "clipped to the image"
    assert data[0][1].labels.tolist() == [0]
    empty = data[2][1]
    assert empty.boxes.shape == (0, 4)
    assert empty.labels.shape == (0,)
    assert empty.labels.dtype == torch.int64
    assert data[-1][1].image_id == 0
    with pytest.raises(IndexError):
        data[3]
    assert [target.image_id for _, target in data] == [11, 7, 0], "iterable"
    assert not caplog.records


def test_ground_truth_is_repaired(tmp_path):
    truth = open_dataset(write(tmp_path)).ground_truth
    assert truth["images"] == VALID["images"]
    assert truth["categories"] == VALID["categories"]
    assert [a["id"] for a in truth["annotations"]] == [1, 2, 3, 4]
    assert [a["area"] for a in truth["annotations"]] == [123.0, 800, 16, 900]
    assert [a["iscrowd"] for a in truth["annotations"]] == [0, 0, 1, 0]
    for repaired, original in zip(truth["annotations"], VALID["annotations"], strict=True):
        for key in ("image_id", "category_id", "bbox"):
            assert repaired[key] == original[key]


def test_ground_truth_works_in_pycocotools(tmp_path, capsys):
    coco = pytest.importorskip("pycocotools.coco")
    evaluation = pytest.importorskip("pycocotools.cocoeval")
    truth = coco.COCO()
    truth.dataset = open_dataset(write(tmp_path)).ground_truth
    truth.createIndex()
    results = [
        {key: a[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9}
        for a in truth.dataset["annotations"]
        if not a["iscrowd"]
    ]
    run = evaluation.COCOeval(truth, truth.loadRes(results), "bbox")
    run.evaluate()
    run.accumulate()
    run.summarize()
    assert run.stats[0] == pytest.approx(1.0)
    assert VALID["annotations"][0]["id"] == 0, "pycocotools ignores objects with the id 0"


def test_masks_are_dropped(tmp_path):
    content = copy.deepcopy(VALID)
    content["annotations"][0]["segmentation"] = [[1, 2, 3, 4, 5, 6]]
    truth = open_dataset(write(tmp_path, content)).ground_truth
    assert all("segmentation" not in record for record in truth["annotations"])


def test_roboflow_group_category_is_dropped(tmp_path):
    content = copy.deepcopy(VALID)
    for category in content["categories"]:
        category["supercategory"] = "things"
    content["categories"].insert(0, {"id": 0, "name": "things", "supercategory": "none"})
    data = open_dataset(write(tmp_path, content))
    assert [category.id for category in data.categories] == [3, 44, 45, 90]
    assert [category["id"] for category in data.ground_truth["categories"]] == [90, 3, 44, 45]

    # It is kept if it has objects or is not the supercategory of all others.
    used = copy.deepcopy(content)
    used["annotations"][0]["category_id"] = 0
    assert open_dataset(write(tmp_path, used)).categories[0] == Category(0, "things")
    other = copy.deepcopy(content)
    other["categories"][2]["supercategory"] = "others"
    assert open_dataset(write(tmp_path, other)).categories[0] == Category(0, "things")
    assert open_dataset(
        write(tmp_path, {**VALID, "categories": [{"id": 0, "name": "x"}], "annotations": []})
    ).categories


def test_categories_of_a_model(tmp_path, caplog):
    write(tmp_path)
    order = (Category(90, "z"), Category(3, "a"), Category(17, "other"), Category(44, "m"))
    data = open_dataset(tmp_path, categories=order)
    assert data.categories == order
    assert data[1][1].labels.tolist() == [0, 3]
    assert not caplog.records, "a category without objects may be missing in the model"

    with pytest.raises(
        UserError, match=r"json: annotations\[3\] \(id 6\) of image 'b.png' has category 44 \('m'\), which the model"
    ):
        open_dataset(tmp_path, categories=order[:3])

    open_dataset(tmp_path, categories=(Category(90, "queen"), *order[1:]))
    assert "category 90 is 'z' in the file and 'queen' in the model" in caplog.text


def test_categories_are_matched_by_name_if_only_ids_differ(tmp_path, caplog):
    write(tmp_path)
    model = (Category(3, "z"), Category(0, "a"), Category(90, "m"), Category(1, "no"), Category(2, "more"))
    data = open_dataset(tmp_path, categories=model)
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "classes have other ids than in the model, such as 'a' 3 instead of 0; names decide"
    ]
    assert data[1][1].labels.tolist() == [0, 2]
    truth = data.ground_truth
    assert [(c["id"], c["name"]) for c in truth["categories"]] == [(3, "z"), (0, "a"), (90, "m"), (1, "no")]
    assert [a["category_id"] for a in truth["annotations"]] == [3, 0, 0, 90]
    assert json.loads((tmp_path / "train/_annotations.coco.json").read_text()) == VALID, "the file is not changed"

    # With an unknown or a duplicate name, categories are matched by id.
    caplog.clear()
    unknown_name = (Category(3, "z"), Category(44, "a"), Category(90, "other"), Category(1, "no"))
    for categories in (unknown_name, (*model[:4], Category(44, "z"))):
        ids = [category.id for category in categories]
        assert open_dataset(tmp_path, categories=categories)[1][1].labels.tolist() == [ids.index(90), ids.index(44)]
    assert "ids decide" in caplog.text
    assert "names decide" not in caplog.text
    assert "no class name is known to the model" not in caplog.text
    caplog.clear()
    unrelated = (Category(3, "cell"), Category(44, "nucleus"), Category(90, "other"), Category(1, "dust"))
    open_dataset(tmp_path, categories=unrelated)
    assert (
        "no class name is known to the model: category 3 is 'a' in the file and 'cell' in the model; ids" in caplog.text
    )


def test_zero_area_boxes_are_skipped_and_counted(tmp_path, caplog):
    bad = [[5, 5, 0, 4], [5, 5, 4, -0.0], [41, 0, 5, 5], [-9, 0, 9, 5], [0, 20, 40, 5], [1e300, 0, 1e300, 4]]
    content = copy.deepcopy(VALID)
    content["annotations"] += [
        {"id": 100 + n, "image_id": 11, "category_id": 3, "bbox": box} for n, box in enumerate(bad)
    ]
    content["annotations"] += [{"image_id": 11, "category_id": 3, "bbox": [-5, -5, 10, 10]}]
    content["annotations"] += [{"image_id": 11, "category_id": 3, "bbox": [3, 3, 0, 0], "iscrowd": 1}]
    data = open_dataset(write(tmp_path, content))
    assert pixel_boxes(data[0]) == [[0, 0, 40, 20], [0, 0, 5, 5]]
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert "6 of 12 boxes have no area inside their image" in message
    assert "the first is annotations[4] (id 100) of image 'a.png'" in message
    assert "\n" not in message
    assert len(data.ground_truth["annotations"]) == 12, "evaluation keeps all"


def test_missing_and_wrong_recorded_sizes(tmp_path, caplog):
    content = copy.deepcopy(VALID)
    for record in content["images"]:
        del record["width"], record["height"]
    content["annotations"].append({"image_id": 11, "category_id": 3, "bbox": [50, 0, 5, 5]})
    data = open_dataset(write(tmp_path, content))
    assert pixel_boxes(data[0]) == [[0, 0, 40, 20]], "boxes outside the image are dropped on reading"
    assert not caplog.records

    for record in content["images"]:
        record.update(width=20, height=40)
    del content["annotations"][-1]
    data = open_dataset(write(tmp_path, content))
    caplog.clear()
    assert pixel_boxes(data[0])[0][2:] == [40, 20]
    list(data)
    assert len(caplog.records) == 1
    assert "image 'a.png' is 40 × 20 pixels, upright, but its record says 20 × 40" in caplog.text


def test_missing_box_is_computed_from_the_rle_mask(tmp_path):
    content = copy.deepcopy(VALID)
    compressed = {"size": [20, 40], "counts": "b2::00000000000000000000000000000^<"}
    uncompressed = {"size": [20, 40], "counts": [82, *[10, 10] * 15, 10, 800 - 82 - 310]}
    content["annotations"] = [
        {"id": number, "image_id": 11, "category_id": 3, "segmentation": mask}
        for number, mask in enumerate((compressed, uncompressed))
    ]
    assert pixel_boxes(open_dataset(write(tmp_path, content))[0]) == [[4, 2, 20, 12]] * 2


@pytest.mark.parametrize("form", [float, str, "{:07}".format])
def test_integer_ids_may_be_floats_or_strings(tmp_path, form):
    expected = list(map(pixel_boxes, open_dataset(write(tmp_path / "integers", VALID))))
    content = copy.deepcopy(VALID)
    for record in content["annotations"]:
        record["category_id"], record["image_id"] = form(record["category_id"]), form(record["image_id"])
    for record in (*content["images"], *content["categories"]):
        record["id"] = form(record["id"])
    data = open_dataset(write(tmp_path / "converted", content))
    assert list(map(pixel_boxes, data)) == expected
    assert all(type(category.id) is int for category in data.categories)


def test_category_name_may_be_a_number(tmp_path):
    content = copy.deepcopy(VALID)
    content["categories"][0]["name"] = 3
    assert "3" in [category.name for category in open_dataset(write(tmp_path, content)).categories]


def test_unused_unknown_class_keeps_matching_by_name(tmp_path):
    content = copy.deepcopy(VALID)
    names = {record["id"]: record["name"] for record in content["categories"]}
    used = {record["category_id"] for record in content["annotations"]}
    model = tuple(Category(number, names[number]) for number in sorted(used))
    shifted = {number: number + 100 for number in used}
    for record in content["annotations"]:
        record["category_id"] = shifted[record["category_id"]]
    content["categories"] = [{"id": number, "name": names[old]} for old, number in shifted.items()]
    expected = [
        target.labels.tolist() for _, target in open_dataset(write(tmp_path / "names", content), categories=model)
    ]
    content["categories"].append({"id": min(used), "name": "new"})
    data = open_dataset(write(tmp_path / "unused", content), categories=model)
    assert [target.labels.tolist() for _, target in data] == expected
    assert {record["name"] for record in data.ground_truth["categories"]} == {names[number] for number in used}


def test_box_outside_the_recorded_size_but_inside_the_image_is_kept(tmp_path, caplog):
    content = copy.deepcopy(VALID)
    content["images"][0].update(width=20, height=10)  # the image is 40 × 20
    content["annotations"] = [
        {"id": 1, "image_id": 11, "category_id": 3, "bbox": [25, 12, 10, 6]},
        {"id": 2, "image_id": 11, "category_id": 3, "bbox": [45, 12, 10, 6]},
    ]
    data = open_dataset(write(tmp_path, content))
    assert "1 of 2 boxes have no area inside their image" in caplog.text
    assert pixel_boxes(data[0]) == [[25, 12, 35, 18]]


def test_exif_orientation_is_applied_before_the_boxes(tmp_path):
    write(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = np.zeros((40, 20, 3), np.uint8)
    stored[10:30, 5:15] = 255  # rows and columns swap when turned upright
    Image.fromarray(stored).save(tmp_path / "train/b.png", exif=exif)
    image, target = open_dataset(tmp_path)[1]
    assert target.original_size == (20, 40)
    assert pixel_boxes((image, target))[0] == [10, 5, 30, 15]
    assert (image[:, 5:15, 10:30] == 255).all()
    assert image.sum() == 200 * 3 * 255


def change(path, value):
    """Return VALID with the value at `path` (keys and positions) replaced, or removed if it is DELETE."""
    content = copy.deepcopy(VALID)
    *parents, last = path
    container = content
    for key in parents:
        container = container[key]
    if value is DELETE:
        del container[last]
    else:
        container[last] = value
    return content


DELETE = object()
FAULTS = {
    "no images": (("images",), DELETE, "it has no list 'images'"),
    "no annotations": (("annotations",), DELETE, "it has no list 'annotations'"),
    "no categories": (("categories",), DELETE, "it has no list 'categories'"),
    "images not a list": (("images",), {"a": 1}, "it has no list 'images'"),
    "empty dataset": (("images",), [], "has no images"),
    "no classes": (("categories",), [], "'categories' is empty"),
    "image not an object": (("images", 1), 5, r"images\[1\] needs an integer 'id'"),
    "image id text": (("images", 1, "id"), "7a", r"has image_id \d+, which is not among the images"),
    "image id true": (("images", 1, "id"), True, r"images\[1\] needs an integer 'id'"),
    "image id huge": (("images", 1, "id"), 2**70, r"images\[1\] needs an integer 'id'"),
    "image id missing": (("images", 1, "id"), DELETE, r"images\[1\] needs an integer 'id'"),
    "duplicate image id": (
        ("images", 1, "id"),
        11,
        r"images\[1\] \('b\.png'\) has the id 11 of images\[0\] \('a\.png'\)",
    ),
    "no file name": (("images", 1, "file_name"), DELETE, r"images\[1\] \(id 7\) needs the 'file_name'"),
    "empty file name": (("images", 1, "file_name"), "", r"images\[1\] \(id 7\) needs the 'file_name'"),
    "missing image": (
        ("images", 1, "file_name"),
        "c.png",
        r"images\[1\] names the image 'c\.png', which is missing in .*train; add the file or",
    ),
    "category id text": (("categories", 1, "id"), "three", r"has category_id 3, which is not among the categories"),
    "category no name": (("categories", 1, "name"), DELETE, r"categories\[1\] needs .* a text 'name'"),
    "duplicate category": (("categories", 1, "id"), 90, r"categories\[1\] \('a'\) has the id 90 of categories\[0\]"),
    "annotation not an object": (("annotations", 3), None, r"annotations\[3\] is not an object"),
    "unknown category": (("annotations", 3, "category_id"), 4, r"annotations\[3\] \(id 6\) has category_id 4, which"),
    "no category": (("annotations", 3, "category_id"), DELETE, r"annotations\[3\] \(id 6\) has category_id None"),
    "unknown image": (("annotations", 3, "image_id"), 8, r"annotations\[3\] \(id 6\) has image_id 8, which is not"),
    "image id list": (("annotations", 3, "image_id"), [7], r"annotations\[3\] \(id 6\) has image_id \[7\]"),
    "no box": (
        ("annotations", 3, "bbox"),
        DELETE,
        r"annotations\[3\] \(id 6\) has bbox None instead of four finite numbers",
    ),
    "short box": (("annotations", 3, "bbox"), [1, 2, 3], r"annotations\[3\] \(id 6\) has bbox \[1, 2, 3\]"),
    "long box": (
        ("annotations", 3, "bbox"),
        list(range(999)),
        r"annotations\[3\] \(id 6\) has bbox \[0, 1, .*\.\.\.\]",
    ),
    "text in box": (
        ("annotations", 3, "bbox"),
        [1, 2, 3, "4 px"],
        r"annotations\[3\] \(id 6\) has bbox \[1, 2, 3, '4 px'\]",
    ),
    "NaN in box": (
        ("annotations", 3, "bbox"),
        [1, 2, float("nan"), 4],
        r"annotations\[3\] .* has bbox \[1, 2, nan, 4\]",
    ),
    "infinity in box": (("annotations", 3, "bbox"), [float("inf"), 2, 3, 4], r"annotations\[3\] .* has bbox \[inf"),
    "true in box": (("annotations", 3, "bbox"), [True, 2, 3, 4], r"annotations\[3\] \(id 6\) has bbox \[True"),
    "huge number in box": (("annotations", 3, "bbox"), [10**400, 2, 3, 4], r"annotations\[3\] \(id 6\) has bbox"),
    "crowd text": (
        ("annotations", 3, "iscrowd"),
        "no",
        r"annotations\[3\] \(id 6\) has iscrowd 'no' instead of 0 or 1",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_record_is_reported_in_one_line(tmp_path, fault):
    path, value, message = FAULTS[fault]
    with pytest.raises(UserError, match=message) as caught:
        open_dataset(write(tmp_path, change(path, value)))
    assert str(caught.value).startswith(str(tmp_path / "train/_annotations.coco.json"))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert len(open_dataset(write(tmp_path))) == 3, "valid without the fault"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ('{"images": [', "not valid JSON"),
        ("<html>", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "not COCO JSON: it has no list 'images'"),
    ],
)
def test_files_that_are_not_coco_json(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as caught:
        open_dataset(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_encodings_of_the_annotation_file(tmp_path):
    path = write(tmp_path) / "train/_annotations.coco.json"
    text = path.read_text()
    path.write_bytes(b"\xff\xfe\xfa\x00\x99")
    with pytest.raises(UserError, match="not valid JSON"):
        open_dataset(tmp_path)
    for encoding in ("utf-8-sig", "utf-16"):  # written by Windows tools
        path.write_bytes(text.encode(encoding))
        assert len(open_dataset(tmp_path)) == 3


def test_truncated_image_is_reported_on_reading(tmp_path):
    data = open_dataset(write(tmp_path))
    path = tmp_path / "train/b.png"
    path.write_bytes(path.read_bytes()[:60])
    data[0]
    with pytest.raises(UserError, match=r"b\.png: cannot be read as an image"):
        data[1]


def test_pickled_dataset_has_arrays_and_no_ground_truth(tmp_path):
    data = open_dataset(write(tmp_path), transform=transforms.EvalTransform(ShortestEdge(10, 100)))
    before = len(pickle.dumps(data))
    assert data.ground_truth is data.ground_truth
    copied = pickle.loads(pickle.dumps(data))
    assert len(pickle.dumps(data)) == before
    assert "ground_truth" not in vars(copied)
    assert copied.ground_truth == data.ground_truth
    image, target = copied[1]
    assert image.shape == (3, 10, 20)
    assert target.original_size == (20, 40)
    lists = [key for key, value in vars(data).items() if isinstance(value, list | dict) and key != "ground_truth"]
    assert not lists


@pytest.mark.alone
def test_loading_time_is_linear_in_the_number_of_records(tmp_path):
    def seconds(images):
        content = {
            "images": [{"id": n, "file_name": f"{n:012}.jpg", "width": 640, "height": 480} for n in range(images)],
            "annotations": [
                {"id": n, "image_id": n % images, "category_id": 1 + n % 3, "bbox": [n % 600, 1.5, 20, 30]}
                for n in range(images * 5)
            ],
            "categories": [{"id": n, "name": str(n)} for n in (1, 2, 3)],
        }
        folder = tmp_path / str(images) / "train"
        if not folder.exists():
            folder.mkdir(parents=True)
            for record in content["images"]:
                (folder / record["file_name"]).touch()
            (folder / "_annotations.coco.json").write_text(json.dumps(content))
        start = time.process_time()  # not affected by other processes
        data = open_dataset(folder)
        elapsed = time.process_time() - start
        assert len(data._boxes) == images * 5
        return elapsed

    seconds(100)
    small, large = (min(seconds(images) for _ in range(3)) for images in (1000, 10_000))
    assert large < 40 * small, "10 times the records; a quadratic loop would take 100 times as long"


PUBLISHED_COUNTS = {  # (images, boxes) as documented by the datasets
    "bccd": {"train": (291, 3966), "val": (73, 920)},
    "coco_mini": {"train": (167, 1410), "val": (151, 1255)},
    "playing_cards": {"train": (296, 527), "val": (67, 143)},
}


@pytest.mark.parametrize("name", PUBLISHED_COUNTS)
def test_real_datasets(shared, name, caplog):
    for split, (images, boxes) in PUBLISHED_COUNTS[name].items():
        root = shared / "data" / name
        data = open_dataset(root, split)
        content = json.loads((root / split / "_annotations.coco.json").read_text())
        crowds = sum(record["iscrowd"] for record in content["annotations"])
        assert len(data) == images
        assert len(data.ground_truth["annotations"]) == boxes
        assert len(data._boxes) == boxes - crowds
        label_counts = Counter(record["category_id"] for record in content["annotations"] if not record["iscrowd"])
        assert Counter(data.categories[label].id for label in data._labels) == label_counts
        if name == "coco_mini":
            assert len(data.categories) == 80
            assert [category.id for category in data.categories][-1] == 90
        for number in range(0, images, 25):
            image, target = data[number]
            record = content["images"][number]
            assert image.shape == (3, record["height"], record["width"])
            boxes_xywh = [
                a["bbox"] for a in content["annotations"] if a["image_id"] == record["id"] and not a["iscrowd"]
            ]
            expected = [[x, y, x + w, y + h] for x, y, w, h in boxes_xywh]
            np.testing.assert_allclose(
                np.reshape(pixel_boxes((image, target)), (-1, 4)), np.reshape(expected, (-1, 4)), atol=1e-2
            )
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_crowds_of_a_real_dataset(shared):
    splits = [open_dataset(shared / "data/coco_mini", split) for split in ("train", "val")]
    crowds = sum(a["iscrowd"] for split in splits for a in split.ground_truth["annotations"])
    assert crowds == 27
    assert sum(len(split._boxes) for split in splits) == 1410 + 1255 - 27
