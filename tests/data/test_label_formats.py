"""Every format that is read gives the same boxes; formats that are not read are named."""

import json
import re
import shutil

import pytest

from deformable_detr.config.schema import DataConfig
from deformable_detr.data.dataset import open_dataset
from deformable_detr.data.formats import find_source
from deformable_detr.data.named import rotated_extent
from deformable_detr.data.voc import pixel_origin
from deformable_detr.utils.errors import UserError
from tests.support.data_problems import check_report, issue_codes, run_check
from tests.support.datasets import write_image
from tests.support.label_formats import TASK, WRITERS, cvat_xml, expected, write_task


@pytest.fixture
def cases(shared):
    if not (shared / "cases").is_dir():
        pytest.skip("no cases of other tools' exports")
    return shared / "cases"


def objects_of(root, split="train", **data):
    """Return image → sorted (class, xywh) as in the ground truth."""
    truth = open_dataset(root, split, DataConfig(**data)).ground_truth
    names = {record["id"]: record["name"] for record in truth["categories"]}
    stems = {record["id"]: record["file_name"].rpartition("/")[2].partition(".")[0] for record in truth["images"]}
    objects = {stem: [] for stem in stems.values()}
    for record in truth["annotations"]:
        objects[stems[record["image_id"]]].append((names[record["category_id"]], *record["bbox"]))
    return {stem: sorted(boxes) for stem, boxes in objects.items()}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, boxes in wanted.items():
        assert [box[0] for box in found[name]] == [box[0] for box in boxes]
        assert [list(box[1:]) for box in found[name]] == [pytest.approx(box[1:], abs=0.01) for box in boxes]


@pytest.mark.parametrize("name", WRITERS)
def test_same_boxes_in_every_format(tmp_path, name, capsys):
    root = write_task(tmp_path / "set", WRITERS[name])
    for split in ("train", "val"):
        assert_same(objects_of(root, split), expected(split))
    report = check_report(root)
    assert not [issue.line for issue in report.errors], report.summary
    assert sum(len(split.positions) for split in report.splits) == 5
    assert report.left_out == 0
    assert run_check(capsys, root, "--fix", tmp_path / "copy")[0] in (0, None)
    for split in ("train", "val"):
        assert_same(objects_of(tmp_path / "copy", split), expected(split))


@pytest.mark.parametrize("name", ["cvat", "labelme", "createml", "csv_table", "imagefolder"])
def test_only_a_training_split(tmp_path, name):
    root = write_task(tmp_path / "set", WRITERS[name])
    with pytest.raises(UserError, match=r"no 'test' split beside .*; add a folder or file with the name 'test'"):
        find_source(root, "test", DataConfig())
    shutil.rmtree(root / "valid")
    assert "split-missing" in issue_codes(root)
    (root / "train").rename(root / "export")
    assert "splits-same" in issue_codes(root / "export"), "files without a split's name match every split"
    assert_same(objects_of(root / "export"), expected("train"))


def write_cvat(root, *shapes, subset=None):
    text = cvat_xml({"a": []}, subset).replace("</image>", "".join(shapes) + "</image>")
    root.mkdir(exist_ok=True)
    (root / "annotations.xml").write_text(text)
    write_image(root / "images" / "a.jpg", (160, 120))
    return root


@pytest.mark.parametrize(
    ("shape", "box"),
    [
        ('<box label="x" xtl="35" ytl="53" xbr="125" ybr="67" rotation="90"/>', [73, 15, 14, 90]),
        ('<box label="x" xtl="40" ytl="40" xbr="60" ybr="60" rotation="45"/>', [35.858, 35.858, 28.284, 28.284]),
        ('<polygon label="x" points="10.5,20;30,5;20,40.25"/>', [10.5, 5, 19.5, 35.25]),
        ('<polyline label="x" points="10,20;30,40"/>', [10, 20, 20, 20]),
        ('<ellipse label="x" cx="50" cy="40" rx="20" ry="10"/>', [30, 30, 40, 20]),
        ('<ellipse label="x" cx="50" cy="40" rx="20" ry="10" rotation="90"/>', [40, 20, 20, 40]),
        ('<mask label="x" rle="1, 2" left="5" top="6" width="10" height="12"/>', [5, 6, 10, 12]),
        ('<tag label="x"/><box label="x" xtl="1" ytl="2" xbr="3" ybr="5"/>', [1, 2, 2, 3]),
    ],
)
def test_cvat_shapes(tmp_path, shape, box):
    found = objects_of(write_cvat(tmp_path / "set", shape))
    assert_same(found, {"a": [("x", *box)]})
    assert ("box-rotated" in issue_codes(tmp_path / "set")) == ("<box" in shape and "rotation" in shape)


def test_cvat_subsets_are_splits(tmp_path):
    for number, (subset, split) in enumerate((("Train", "train"), ("Validation", "val"))):
        text = cvat_xml(TASK[split], subset).removesuffix("</annotations>").partition("</version>")[2]
        mode = "a" if number else "w"
        with open(tmp_path / "annotations.xml", mode) as file:
            file.write(text if number else f"<annotations><version>1.1</version>{text}")
        for name in TASK[split]:
            write_image(tmp_path / "images" / subset / f"{name}.jpg", (160, 120))
    with open(tmp_path / "annotations.xml", "a") as file:
        file.write("</annotations>")
    for split in ("train", "val"):
        assert_same(objects_of(tmp_path, split), expected(split))
    assert not {"splits-same", "split-missing"} & issue_codes(tmp_path)


def test_unreadable_shapes_are_counted(tmp_path):
    good = '<box label="x" xtl="1" ytl="2" xbr="30" ybr="50"/>'
    root = write_cvat(tmp_path / "set", good, good.replace('"1"', '"nan"'), good.replace(' label="x"', ""))
    report = check_report(root)
    assert (report.left_out, [issue.code for issue in report.errors if issue.objects]) == (2, ["label-row"] * 2)
    (root / "annotations.xml").write_text(
        '<annotations><track label="x"><box frame="1" outside="0"/></track></annotations>'
    )
    assert any("CVAT for video" in issue.line for issue in check_report(root).errors)


@pytest.mark.parametrize(
    ("shape", "box"),
    [
        ({"shape_type": "circle", "points": [[50, 40], [53, 44]]}, [45, 35, 10, 10]),
        ({"shape_type": "polygon", "points": [[10, 20], [30, 5], [20, 40]]}, [10, 5, 20, 35]),
        ({"shape_type": "mask", "points": [[10, 20], [29, 39]]}, [10, 20, 20, 20]),
        ({"points": [[30, 5], [10, 20]], "shape_type": "rectangle"}, [10, 5, 20, 15]),
    ],
)
@pytest.mark.parametrize("place", ["x/p.json", "images/x/p.json", "labels/p.json", "labels/train/p.json"])
def test_labelme(tmp_path, shape, box, place):
    image = place.replace("labels", "images").replace(".json", ".jpg")
    write_image(tmp_path / image, (160, 120))
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    content = {"shapes": [{"label": "x", **shape}], "imagePath": "C:\\Users\\me\\p.jpg", "imageData": None}
    (tmp_path / place).write_text(json.dumps(content))
    assert_same(objects_of(tmp_path), {"p": [("x", *box)]})


@pytest.mark.parametrize(
    "text",
    [
        "filename,width,height,class,xmin,ymin,xmax,ymax\na.jpg,160,120,x,1,2,30,50\n",
        "xmin;ymin;xmax;ymax;Label;Image Name\n1;2;30;50;x;a.jpg\n",
        "image_path,x1,y1,x2,y2,class\na.jpg,1,2,30,50,x\n",
        "image,label,x0,y0,x1,y1\na.jpg,x,1,2,30,50\n",
        "a.jpg,1,2,30,50,x\n",
        "\ufefffile_name,x_min,y_min,x_max,y_max,category\r\nimages/a.jpg,1,2,30,50,x\r\n",
    ],
)
def test_csv_columns(tmp_path, text):
    write_image(tmp_path / "images" / "a.jpg", (160, 120))
    (tmp_path / "labels.csv").write_text(text)
    assert_same(objects_of(tmp_path), {"a": [("x", 1, 2, 29, 48)]})


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_csv_with_decimal_commas(tmp_path, delimiter):
    root = write_task(tmp_path, WRITERS["csv_table"])
    for path in root.rglob("*.csv"):
        path.write_text(re.sub(r"([0-9])\.([0-9])", r"\1,\2", path.read_text().replace(",", delimiter)))
    assert_same(objects_of(root), expected("train"))
    assert issue_codes(root) <= {"class-rare", "tiny-objects"}


@pytest.mark.parametrize("write", [str, "{} ".format, lambda box: [f"{value}" for value in box]])
def test_coco_boxes_and_sizes_as_texts(tmp_path, write):
    root = write_task(tmp_path, WRITERS["coco"])
    for path in root.rglob("*.json"):
        content = json.loads(path.read_text())
        for record in content["annotations"]:
            record["bbox"] = write(record["bbox"])
        for record in content["images"]:
            record |= {"width": "160", "height": 120.0}
        path.write_text(json.dumps(content))
    assert_same(objects_of(root), expected("train"))
    assert open_dataset(root).sizes.tolist() == [[120, 160]] * 3


def test_swapped_corners_of_a_rotated_cvat_box():
    assert rotated_extent([30, 10, -20, 10], 30) == pytest.approx(rotated_extent([10, 10, 20, 10], 30))
    assert rotated_extent([30, 10, -20, 10], 0) == [30, 10, -20, 10]


def test_swapped_corners_are_exchanged(tmp_path):
    write_image(tmp_path / "a.jpg", (160, 120))
    (tmp_path / "boxes.csv").write_text("filename,class,xmin,ymin,xmax,ymax\na.jpg,x,30,2,1,50\n")
    assert_same(objects_of(tmp_path), {"a": [("x", 1, 2, 29, 48)]})
    assert "box-swapped" in issue_codes(tmp_path)


@pytest.mark.parametrize(
    ("objects", "name"),
    [
        ({"bbox": [[1, 2, 29, 48]], "category": ["x"]}, "x"),
        ({"bbox": [[1, 2, 29, 48]], "categories": [3]}, "3"),
        ([{"bbox": [1, 2, 29, 48], "label": "x"}], "x"),
    ],
)
def test_metadata_in_the_folder_above_its_splits(tmp_path, objects, name):
    lines = []
    for split in ("train", "validation"):
        write_image(tmp_path / split / "a.jpg", (160, 120))
        lines.append(json.dumps({"file_name": f"{split}/a.jpg", "objects": objects}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    for split in ("train", "val"):
        assert_same(objects_of(tmp_path, split), {"a": [(name, 1, 2, 29, 48)]})


VIA = {"_via_settings": {}, "_via_img_metadata": {}}
UNREAD = {
    "a/Label/1.txt": ("Human eye 53.0 5.0 89.0 33.0\n", "OIDv4"),
    "label_2/1.txt": ("Car 0.00 0 -1.57 1 2 3 4 1.6 1.7 3.6 0.1 1.8 8.4 0.0\n", "KITTI"),
    "labels/1.txt": ("0 0.5 0.5 0.1 0.1\n", "YOLO rows without class names"),
    "boxes.csv": ("ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsGroupOf\n", "Open Images"),
    "via.csv": ("filename,file_size,file_attributes,region_count,region_id,region_shape_attributes\n", "VIA"),
    "via.json": (json.dumps(VIA), "VIA"),
    "ann/1.json": (json.dumps({"description": "", "objects": [{"classTitle": "a", "points": {}}]}), "Supervisely"),
    "train.json": (json.dumps({"dm_format_version": "1.0", "infos": {}, "items": []}), "Datumaro"),
    "project.vott": ("{}", "VoTT"),
    "project.json": (json.dumps([{"id": 1, "annotations": [{"completed_by": 1}], "data": {}}]), "Label Studio"),
    "data/train-0.parquet": ("PAR1", "Parquet"),
    "train.tfrecord": ("x", "TFRecord"),
    "metadata.csv": ("file_name,label\na.jpg,x\n", "metadata.csv"),
}


@pytest.mark.parametrize("name", UNREAD)
def test_unread_format_is_named(tmp_path, name):
    text, format_name = UNREAD[name]
    write_image(tmp_path / "images" / "a.jpg")
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(text)
    for split in ("train", "val"):
        with pytest.raises(UserError) as caught:
            open_dataset(tmp_path, split)
        message = str(caught.value)
        assert f"{name} looks like" in message
        assert format_name in message
        assert "; " in message
        assert "\n" not in message


def test_unknown_folder_is_summed_up(tmp_path):
    write_image(tmp_path / "a.jpg")
    (tmp_path / "notes.dat").write_text("x")
    with pytest.raises(UserError, match=r"no 'train' split; .* \(the folder has 1 \.jpg, 1 \.dat\)"):
        open_dataset(tmp_path)


@pytest.mark.parametrize(
    ("evidence", "has_list", "origin", "conflict"),
    [
        ({"voc": 9, "boxes": 99}, False, 1, False),
        ({"voc": 9, "boxes": 99, "zero": 1}, True, 0, True),
        ({"voc": 9, "boxes": 99, "fraction": 2}, True, 1, True),
        ({"voc": 9, "boxes": 99, "fraction": 90}, True, 0, True),
        ({"voc": 9, "other": 1, "boxes": 99}, True, 1, True),
        ({"voc": 1, "other": 9, "boxes": 99}, True, 0, True),
        ({"other": 9, "boxes": 99}, True, 0, False),
        ({"none": 9, "boxes": 99}, True, 1, False),
        ({"none": 9, "boxes": 99}, False, 0, False),
        ({"none": 9, "boxes": 99, "zero": 1}, True, 0, False),
    ],
)
def test_pixel_origin_of_voc(evidence, has_list, origin, conflict):
    assert pixel_origin(evidence, has_list)[::2] == (origin, conflict)


@pytest.mark.parametrize(
    ("source", "origin"),
    [
        ("<source><database>Supervisely Project ID:12</database><annotation>PASCAL VOC</annotation></source>", 0),
        ("<source><database>My Database</database><annotation>VOC2007</annotation></source>", 0),
        ("<database></database><annotation></annotation><image></image>", 0),  # labelme2voc
        ("<source><database>The VOC2007 Database</database><annotation>PASCAL VOC2007</annotation></source>", 1),
        ("", 1),
    ],
)
def test_only_the_database_names_pascal_voc(tmp_path, source, origin):
    root = write_task(tmp_path, WRITERS["voc"])
    for path in root.rglob("*.xml"):
        text = re.sub(r"([0-9]+)\.[0-9]+<", r"\1<", path.read_text()).replace(">0<", ">1<")
        path.write_text(re.sub("<source>.*</source>", source, text))
    for split, folder, names in (("train", "train", ("p0", "p1", "p2")), ("val", "valid", ("q0",))):
        for name in names:
            for kind, suffix in (("JPEGImages", "jpg"), ("Annotations", "xml")):
                (root / kind).mkdir(exist_ok=True)
                (root / folder / f"{name}.{suffix}").rename(root / kind / f"{name}.{suffix}")
        (root / "ImageSets/Main").mkdir(parents=True, exist_ok=True)
        (root / f"ImageSets/Main/{split}.txt").write_text("\n".join(names))
        (root / folder).rmdir()
    assert objects_of(root)["p1"] == [("disc", 16 - origin, 32 - origin, 144 + origin, 24 + origin)]


def test_cvat_voc_equals_its_coco_export(cases):
    case = cases / "29-cvat-voc-coordinates"
    assert_same(objects_of(case / "set"), objects_of(case / "same-as-coco"))
    shifted = objects_of(case / "set", voc_origin=1)
    assert shifted["t0"][0][1:] == pytest.approx([52.5, 4.25, 37, 29])
    notes = [issue.line for issue in check_report(case / "set").issues if issue.code == "pixel-origin"]
    assert notes
    assert "counts pixels from 0" in notes[0]


def test_text_ids_keep_their_text(tmp_path):
    root = write_task(tmp_path / "set", WRITERS["coco"])
    for path in root.rglob("*.json"):
        content = json.loads(path.read_text())
        for record in content["images"]:
            record["id"] = f"9f2c-{record['id']}"
        for record in content["annotations"]:
            record |= {"image_id": f"9f2c-{record['image_id']}", "id": f"u{record['id']}"}
            record["category_id"] = f"c{record['category_id']}"
        for record in content["categories"]:
            record["id"] = f"c{record['id']}"
        path.write_text(json.dumps(content))
    for split in ("train", "val"):
        assert_same(objects_of(root, split), expected(split))
    truth = open_dataset(root).ground_truth
    assert [f"{record['id']}" for record in truth["images"]] == ["'9f2c-1'", "'9f2c-2'", "'9f2c-3'"]
    assert json.loads(json.dumps(truth))["images"][0]["id"] == 1


@pytest.mark.parametrize(
    ("case", "split", "count"),
    [
        ("07-cvat-for-images-xml", "train", 12),
        ("11-labelme-json", "train", 12),
        ("24-coco-text-ids", "train", 12),
        ("25-csv-table", "train", 12),
        ("25-csv-table", "val", 6),
        ("26-hf-imagefolder-jsonl", "val", 6),
        ("18-cvat-coco-rotated", "train", 8),
    ],
)
def test_cases_are_read(cases, case, split, count):
    objects = objects_of(cases / case / "set", split)
    assert sum(map(len, objects.values())) == count
    if case.startswith("18"):  # 90 × 14, turned by 40 degrees
        assert objects["r0"][0][1:] == pytest.approx([41.028, 25.712, 77.943, 68.576], abs=0.01)


def test_oidv4_case_is_named(cases):
    with pytest.raises(UserError, match=r"Label/\d+\.txt looks like class names and pixels of the OIDv4 toolkit"):
        open_dataset(cases / "14-oidv4-toolkit" / "set")
