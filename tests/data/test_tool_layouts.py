"""Tables, subsets and videos as other tools write them, and the formats that are only named."""

import json

import pytest

from deformable_detr.config.schema import DataConfig
from deformable_detr.data.dataset import open_dataset
from deformable_detr.data.formats import find_source
from deformable_detr.utils.errors import UserError
from tests.data.test_label_formats import assert_same, objects_of
from tests.support.data_problems import ALWAYS_REPORTED, check_report, issue_codes
from tests.support.datasets import write_image
from tests.support.label_formats import SIZE, TASK, WRITERS, expected, write_task

ROWS = [
    (split, name, label, x0, y0, x1, y1)
    for split, images in TASK.items()
    for name, boxes in images.items()
    for label, x0, y0, x1, y1 in boxes
]
W, H = SIZE
SAME = {"images-unlisted", "leak", "image-copy"}  # the test images are equal, and all in one folder
GOOGLE = {"train": "TRAINING", "val": "VALIDATE"}
TABLES = {
    "xywh": ("image_name,label_name,bbox_x,bbox_y,bbox_width,bbox_height,image_width,image_height,split",
             lambda s, n, c, x, y, x1, y1: f"{n}.jpg,{c},{x},{y},{x1 - x},{y1 - y},{W},{H},{s}"),
    "plain xywh": ("split,image,x,y,width,height,label",
                   lambda s, n, c, x, y, x1, y1: f"{s},{n}.jpg,{x},{y},{x1 - x},{y1 - y},{c}"),
    "text of a list": ("image_id,width,height,bbox,class,set",
                       lambda s, n, c, x, y, x1, y1: f'{n},{W},{H},"[{x}, {y}, {x1 - x}, {y1 - y}]",{c},{s}'),
    "decimal commas": ("filename;class;xmin;ymin;xmax;ymax;split",
                       lambda s, n, c, *box: ";".join([f"{n}.jpg", c, *(f"{v}".replace(".", ",") for v in box), s])),
    "AutoML": ("", lambda s, n, c, x, y, x1, y1:
               f"{GOOGLE[s]},gs://bucket/a/{n}.jpg,{c},{x / W},{y / H},,,{x1 / W},{y1 / H},,"),
    "AutoML corners": ("", lambda s, n, c, x, y, x1, y1:
                       f"{GOOGLE[s]},{n}.jpg,{c}," + ",".join(
                           f"{v}" for a, b in ((x, y), (x1, y), (x1, y1), (x, y1)) for v in (a / W, b / H))),
}  # fmt: skip


def write_images(root, names=("p0", "p1", "q0")):
    for name in names:
        write_image(root / f"{name}.jpg", SIZE)


def with_objects(split):
    return {name: boxes for name, boxes in expected(split).items() if boxes}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_tables_with_a_split_column(tmp_path, name, suffix):
    header, row = TABLES[name]
    lines = ([header] if header else []) + [row(*values) for values in ROWS]
    (tmp_path / f"table.{suffix}").write_text("\n".join(lines))
    write_images(tmp_path / "images")
    for split in ("train", "val"):
        assert_same(objects_of(tmp_path, split), with_objects(split))
    assert issue_codes(tmp_path) <= SAME, "also for names without a suffix"


def test_makesense_table_and_tables_without_classes(tmp_path):
    write_images(tmp_path, ["p1"])
    (tmp_path / "labels.csv").write_text("disc,16,32,144,24.5,p1.jpg,160,120\n")
    assert_same(objects_of(tmp_path), {"p1": [("disc", 16, 32, 144, 24.5)]})
    (tmp_path / "labels.csv").write_text('image_id,bbox,source\np1,"[16.0, 32.0, 144.0, 24.5]",x\n')
    assert_same(objects_of(tmp_path), {"p1": [("object", 16, 32, 144, 24.5)]})


@pytest.mark.parametrize("name", ["csv", "cvat", "jsonl", "coco"])
def test_objects_of_other_subsets_are_counted(tmp_path, name):
    subsets = {"p0": "train", "p1": "val", "q0": "day1"}
    for image, subset in subsets.items():
        write_images(tmp_path / subset if name in ("jsonl", "coco") else tmp_path / "images", [image])
    if name == "csv":
        rows = [f"{image}.jpg,x,1,2,30,50,{subset}" for image, subset in subsets.items()]
        (tmp_path / "t.csv").write_text("\n".join(["filename,class,xmin,ymin,xmax,ymax,split", *rows]))
    elif name == "cvat":
        box = '<box label="x" xtl="1" ytl="2" xbr="30" ybr="50"/>'
        rows = [f'<image name="{image}.jpg" subset="{subset}">{box}</image>' for image, subset in subsets.items()]
        (tmp_path / "annotations.xml").write_text(f"<annotations>{''.join(rows)}</annotations>", encoding="utf-16")
    elif name == "jsonl":
        record = {"objects": {"bbox": [[1, 2, 29, 48]], "category": ["x"]}}
        rows = [json.dumps({"file_name": f"{subset}/{image}.jpg", **record}) for image, subset in subsets.items()]
        (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    else:
        images = [{"id": i, "file_name": f"{subsets[n]}/{n}.jpg"} for i, n in enumerate(subsets)]
        objects = [{"id": i, "image_id": i, "category_id": 1, "bbox": [1, 2, 29, 48]} for i in range(3)]
        content = {"images": images, "annotations": objects, "categories": [{"id": 1, "name": "x"}]}
        (tmp_path / "all.json").write_text(json.dumps(content))
    report = check_report(tmp_path)
    assert [len(split.positions) for split in report.splits] == [1, 1], [issue.line for issue in report.issues]
    assert report.left_out == 1
    assert {issue.code for issue in report.issues} - ALWAYS_REPORTED <= {"label-row"} | SAME
    assert_same(objects_of(tmp_path, "val"), {"p1": [("x", 1, 2, 29, 48)]})


@pytest.mark.parametrize("key", ["split", "folder"])
def test_coco_file_with_all_splits(tmp_path, key):
    write_task(tmp_path, WRITERS["coco"])
    parts = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.rglob("*.json")}
    content = {"images": [], "annotations": [], "categories": parts["train"]["categories"]}
    for folder, part in parts.items():
        (tmp_path / folder / "_annotations.coco.json").unlink()
        for record in part["images"]:
            name = f"{folder}/{record['file_name']}"
            more = {"split": "train" if folder == "train" else "val"} if key == "split" else {}
            content["images"].append(record | {"id": f"{folder}-{record['id']}", "file_name": name, **more})
        content["annotations"] += [r | {"image_id": f"{folder}-{r['image_id']}"} for r in part["annotations"]]
    (tmp_path / "labels.json").write_text(json.dumps(content))
    for split in ("train", "val"):
        assert_same(objects_of(tmp_path, split), expected(split))
    assert issue_codes(tmp_path) <= SAME


@pytest.mark.parametrize("stem", ["lvis_v1_{}", "person_keypoints_{}2017"])
def test_coco_files_of_other_names_and_addresses(tmp_path, stem):
    write_task(tmp_path, WRITERS["coco"])
    for folder, split in (("train", "train"), ("valid", "val")):
        path = tmp_path / folder / "_annotations.coco.json"
        content = json.loads(path.read_text())
        path.unlink()
        for record in content["images"]:
            record["coco_url"] = f"http://images.cocodataset.org/{split}2017/{record.pop('file_name')}"
        (tmp_path / folder).rename(tmp_path / f"{split}2017")
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "annotations" / f"{stem.format(split)}.json").write_text(json.dumps(content))
        (tmp_path / "annotations" / f"captions_{split}2017.json").write_text("{}")
    for split in ("train", "val"):
        assert_same(objects_of(tmp_path, split), expected(split))
    assert issue_codes(tmp_path) <= SAME


@pytest.mark.parametrize("keys", [("bboxes", "labels"), ("boxes", "classes"), ("bbox", "category")])
@pytest.mark.parametrize("form", ["csv", "parquet", "jsonl", "flat"])
def test_huggingface_metadata(tmp_path, keys, form):
    import csv

    import pyarrow as pa
    import pyarrow.parquet as pq

    write_images(tmp_path, ["p1"])
    objects = dict(zip(keys, ([[16, 32, 144, 24.5]], ["disc"]), strict=True))
    if form == "csv":
        with open(tmp_path / "metadata.csv", "w", newline="") as file:
            csv.writer(file).writerows([["file_name", "objects"], ["p1.jpg", json.dumps(objects)]])
    elif form == "parquet":
        table = pa.Table.from_pylist([{"file_name": "p1.jpg", "objects": objects}])
        pq.write_table(table, tmp_path / "metadata.parquet")
    else:
        record = {"file_name": "p1.jpg", **({"objects": objects} if form == "jsonl" else objects)}
        (tmp_path / "metadata.jsonl").write_text(json.dumps(record))
    assert_same(objects_of(tmp_path), {"p1": [("disc", 16, 32, 144, 24.5)]})


def test_cvat_for_video(tmp_path):
    box = '<box frame="{0}" outside="{1}" xtl="{0}" ytl="2" xbr="30" ybr="50"/>'
    boxes = [box.format(frame, int(frame == 1)) for frame in range(3)]
    text = f'<annotations><track id="0" label="x">{"".join(boxes)}</track></annotations>'
    (tmp_path / "annotations.xml").write_text(text)
    for frame in range(3):
        write_image(tmp_path / "images" / f"frame_{frame:06}.PNG", SIZE)
    names = [f"frame_{frame:06}" for frame in range(3)]
    assert_same(objects_of(tmp_path), {names[0]: [("x", 0, 2, 30, 48)], names[1]: [], names[2]: [("x", 2, 2, 28, 48)]})
    (tmp_path / "images" / "frame_000002.PNG").unlink()
    report = check_report(tmp_path)
    assert report.left_out == 2
    assert any("none of its objects can be read; see the other errors" in issue.line for issue in report.errors)


def test_labelme_with_the_images_inside(tmp_path):
    content = {"shapes": [{"label": "x", "points": [[1, 2], [30, 50]]}], "imagePath": "a.jpg", "imageData": "/9j/4AAQ"}
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"'a\.jpg', which is missing .*; the JSON files have the images inside"):
        open_dataset(tmp_path)


def test_darknet_lists(tmp_path):
    (tmp_path / "obj.names").write_text("x\n")
    for split, name in (("train", "p0"), ("valid", "q0")):
        write_images(tmp_path / "obj", [name])
        (tmp_path / "obj" / f"{name}.txt").write_text("0 0.5 0.5 0.25 0.5\n")
        (tmp_path / f"{split}.txt").write_text(f"data/obj/{name}.jpg\n")
    assert_same(objects_of(tmp_path), {"p0": [("x", 60, 30, 40, 60)]})
    assert_same(objects_of(tmp_path, "val"), {"q0": [("x", 60, 30, 40, 60)]})
    assert issue_codes(tmp_path) <= SAME
    with pytest.raises(UserError, match="no 'test' split"):
        find_source(tmp_path, "test", DataConfig())


NAMED = {
    "train.record-00000-of-00010": ("", "TFRecord"),
    "annotation_train.odgt": ("{}", "CrowdHuman"),
    "bounding_boxes.labels": ('{"version": 1, "boundingBoxes": {}}', "Edge Impulse"),
    "output.manifest": ('{"source-ref": "s3://b/a.jpg"}', "SageMaker"),
    "via3.json": ('{"project": {"creator": "VGG Image Annotator"}}', "VIA"),
    "via3.csv": ("# Exported using VGG Image Annotator\n", "VIA"),
    "ls.csv": ('image,id,label\n/data/a.jpg,1,"[{""rectanglelabels"": [""x""]}]"\n', "Label Studio"),
    "meta.json": ('{"classes": [{"title": "x"}], "tags": [], "projectType": "images"}', "Supervisely"),
    "vott.json": ('{"name": "p", "videoSettings": {}, "lastVisitedAssetId": "x"}', "VoTT"),
    "export.ndjson": ('{"data_row": {"id": "x"}}', "Labelbox"),
    "v7.json": ('{"schema_ref": "https://darwin-public.s3.amazonaws.com/darwin_json/2.0/schema.json"}', "V7"),
    "encord.json": ('[{"label_hash": "x", "data_units": {}}]', "Encord"),
    "dataloop.json": ('{"id": "x", "annotations": [{"datasetId": "1"}]}', "Dataloop"),
    "scale.json": ('[{"task_id": "5", "params": {"attachment": "x"}}]', "Scale"),
    "a_polygons.json": ('{"imgHeight": 4, "objects": []}', "Cityscapes"),
    "samples.json": ('{"samples": [{"_cls": "Detections"}]}', "FiftyOne"),
    "annotations/panoptic_train.json": ('{"images": [], "annotations": [{"segments_info": []}]}', "panoptic"),
    "labelTxt/a.txt": ("imagesource:GoogleEarth\ngsd:0.1\n1.0 2 3 4 5 6 7 8 small-vehicle 0\n", "DOTA"),
    "gt/gt.txt": ("1,1,912,484,97,109,0,7,1\n", "MOT"),
    "annotations/a.txt": ("684,8,273,116,0,0,0,0\n", "VisDrone"),
    "wider_face_train_bbx_gt.txt": ("0--Parade/a.jpg\n1\n449 330 122 149 0 0 0 0 0 0 \n", "WIDER FACE"),
    "set-000000.tar": ("", "archive"),
    "data.zip": ("", "archive"),
    "labels.csv": ("id,label\na,x\n", "table without columns"),
    "old/train-annotations-bbox.csv": ("ImageID,LabelName,XMin,XMax,YMin,YMax,IsGroupOf\n", "Open Images"),
    "Label/a.txt": ("Traffic light 53.0 5.0 89.0 33.0\n", "OIDv4"),
}


@pytest.mark.parametrize("name", NAMED)
def test_format_is_named(tmp_path, name):
    text, format_name = NAMED[name]
    write_image(tmp_path / "images" / "a.jpg")
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=rf"{name} looks like [^;]*{format_name}[^;]*; \w"):
        open_dataset(tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.jpg", "b.jpg", "README.md"], "has only images and no annotations; label them"),
        (["train/a.jpg", "val/b.jpg"], "has only images and no annotations; label them"),
        (["train/cat/a.jpg", "train/dog/b.jpg"], r"no boxes; its folders \(cat, dog\) look like the classes"),
        (["images/a.jpg", "masks/a.png"], "has images in 'masks', but no boxes; convert these masks"),
        (["JPEGImages/a.jpg", "SegmentationClass/a.png", "labelmap.txt"], "has images in 'SegmentationClass'"),
    ],
)
def test_folders_without_labels(tmp_path, names, message):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    with pytest.raises(UserError, match=message):
        open_dataset(tmp_path)


def test_files_that_are_no_datasets(tmp_path):
    for name, message in {"a.zip": "an archive, .*; unpack it", "a.jpg": "is an image; give the folder"}.items():
        (tmp_path / name).write_text("x")
        with pytest.raises(UserError, match=message):
            open_dataset(tmp_path / name)
