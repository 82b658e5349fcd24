"""Tiles in every command and for every kind of model: the results are those of `model.predict(..., tile=…)`."""

import json

import numpy as np
import pytest
from PIL import Image

from deformable_detr.cli.predict import PredictOptions, predict_files
from deformable_detr.evaluation import evaluate, evaluator
from deformable_detr.predict_dataset.options import PredictDatasetOptions
from deformable_detr.utils.errors import UserError
from deformable_detr.utils.tiles import Tiling
from tests.support.blob_finder import BlobFinder, paint, scattered
from tests.support.commands import is_one_line_error, run_command
from tests.support.models import tiny
from tests.support.transformers_models import write_repository

SHARDS = ((0, 1), (0, 2), (1, 2))  # one process, then two


def write_dataset(root, sizes=((400, 300), (300, 420), (90, 100)), count=40):
    """Write a COCO dataset of painted images; the last one is smaller than a tile."""
    (root / "valid").mkdir(parents=True)
    content = {"images": [], "annotations": [], "categories": [{"id": 5, "name": "red"}, {"id": 9, "name": "green"}]}
    for number, size in enumerate(sizes, start=1):
        objects = scattered(*size, count, seed=number)
        Image.fromarray(paint(*size, objects)).save(root / "valid" / f"{number}.png")
        content["images"].append({"id": number, "file_name": f"{number}.png", "height": size[0], "width": size[1]})
        for index, (x1, y1, x2, y2) in enumerate(objects.tolist()):
            box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0}
            ids = {"id": len(content["annotations"]) + 1, "image_id": number, "category_id": (5, 9)[index % 2]}
            content["annotations"].append(ids | box)
    (root / "valid" / "_annotations.coco.json").write_text(json.dumps(content))
    return root


def test_predict_files(tmp_path):
    data = write_dataset(tmp_path / "data")
    files, lines = sorted((data / "valid").glob("*.png")), []
    options = PredictOptions(json=tmp_path / "all.json", out=tmp_path / "drawn", tile=128)
    assert predict_files(BlobFinder(), files, options, lines.append) == 0
    records = json.loads((tmp_path / "all.json").read_text())
    expected = BlobFinder().predict(files, tile=128)
    assert [record["detections"] for record in records] == [d.to_dict()["detections"] for d in expected]
    assert len(records[0]["detections"]) == 40
    assert (tmp_path / "drawn" / "1.png").exists()


def test_videos_are_refused(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"")
    with pytest.raises(UserError, match="--tile is for images: leave out videos and --camera"):
        predict_files(BlobFinder(), [tmp_path / "a.mp4"], PredictOptions(tile=128))


def test_evaluation_with_tiles_finds_small_objects(tmp_path):
    data = write_dataset(tmp_path / "data")
    model = BlobFinder()
    whole, tiled = (evaluate(model, data, workers=0, progress=False, tile=tile) for tile in (None, 128))
    assert tiled["AP"] > 0.9
    assert tiled["AP_small"] > whole["AP_small"] + 0.3
    assert tiled["images"] == 3


def test_ap_counts_more_than_a_hundred_detections_of_an_image(tmp_path):
    data = write_dataset(tmp_path / "data", sizes=((700, 700),), count=400)
    assert evaluate(BlobFinder(), data, workers=0, progress=False, tile=128)["AP50"] > 0.95


def test_evaluation_of_images_within_a_tile_is_as_usual(tmp_path):
    data = write_dataset(tmp_path / "data", sizes=((90, 100), (60, 128)), count=4)
    usual, tiled = BlobFinder(), BlobFinder()
    expected = evaluate(usual, data, workers=0, progress=False)
    metrics = evaluate(tiled, data, workers=0, progress=False, tile=128)
    assert {k: v for k, v in metrics.items() if k != "images_per_second"} == {
        k: v for k, v in expected.items() if k != "images_per_second"
    }
    assert tiled.input_shapes == usual.input_shapes


def test_shards_of_an_evaluation_find_what_one_process_finds(tmp_path):
    dataset = evaluator.open_eval_dataset(BlobFinder(), write_dataset(tmp_path / "data"))
    parts = [evaluator.detect_in_tiles(BlobFinder(), dataset, 3, Tiling(128), False, (k, n))[0] for k, n in SHARDS]
    whole, *rest = parts
    assert sorted(whole, key=str) == sorted([row for part in rest for row in part], key=str)


@pytest.fixture(scope="module", params=["native", "adapter"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    if request.param == "adapter":
        write_repository(folder, "rt_detr")
        return folder
    tiny().save_pretrained(folder)
    return folder


@pytest.fixture
def photo(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (150, 230, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_commands_with_every_kind_of_model(model, photo, tmp_path, capsys):
    arguments = (photo, "--tile", 96, "--tile-overlap", 0.25, "--threshold", 0.01, "--json", tmp_path / "found.json")
    code, _, errors = run_command(capsys, "predict", model, *arguments, "--device", "cpu")
    assert code == 0, errors
    (record,) = json.loads((tmp_path / "found.json").read_text())
    boxes = np.array([detection["box"] for detection in record["detections"]])
    assert len(boxes) > 12  # more than the model's queries
    assert boxes[:, 2].max() > 150  # beyond the first tile
    assert boxes.min() >= 0
    assert (boxes.max(0) <= [230, 150, 230, 150]).all()


@pytest.mark.parametrize("command", ["predict", "evaluate", "serve"])
@pytest.mark.parametrize(("option", "value"), [("--tile", 5), ("--tile-overlap", 1.5)])
def test_values_out_of_range_are_one_line(command, option, value, capsys, tmp_path):
    arguments = [] if command == "serve" else [tmp_path]
    code, _, errors = run_command(capsys, command, tmp_path, *arguments, option, value)
    assert code == 2
    assert is_one_line_error(errors), errors
    assert option in errors


def test_predict_dataset_options():
    with pytest.raises(UserError, match="tile 5: must be at least 32 pixels"):
        PredictDatasetOptions(tile=5).validate()
    assert "tile" not in PredictDatasetOptions().result_settings  # earlier runs can be resumed
    assert PredictDatasetOptions(tile=64).result_settings["tile_overlap"] == 0.2


def test_damaged_large_file_ends_with_code_2(tmp_path, capsys, monkeypatch):
    tifffile = pytest.importorskip("tifffile")
    tiny().save_pretrained(tmp_path / "model")
    path = tmp_path / "large.tif"
    tifffile.imwrite(path, np.zeros((200, 300, 3), np.uint8), tile=(64, 64), compression="zlib", photometric="rgb")
    path.write_bytes(path.read_bytes()[:-200])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    code, _, errors = run_command(capsys, "predict", tmp_path / "model", path, "--tile", 96, "--device", "cpu")
    assert code == 2
    assert is_one_line_error(errors), errors
    assert str(path) in errors
