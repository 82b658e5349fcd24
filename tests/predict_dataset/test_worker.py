"""One unit through the model: rows equal `predict`, invalid images become rows, for every model and source format."""

import io
import os
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from deformable_detr.detector import DeformableDETR, load_detector
from deformable_detr.export.verify import max_differences
from deformable_detr.predict_dataset import worker
from deformable_detr.predict_dataset.filesystem import OutputFolder
from deformable_detr.predict_dataset.manifest import create_manifest
from deformable_detr.predict_dataset.options import PredictDatasetOptions as Options
from deformable_detr.predict_dataset.parquet import read_part
from deformable_detr.predict_dataset.sources import find_ranges
from deformable_detr.predict_dataset.worker import UnitPredictor, WorkerJob, pack_model, unpack_model
from deformable_detr.utils.images import decode_image
from deformable_detr.utils.rle import decode_masks
from tests.support.image_sources import BAD, as_folder, as_parquet, as_tar, encoded_images, read_rows
from tests.support.masks import with_masks
from tests.support.models import tiny
from tests.support.transformers_models import write_repository

FILES = list(encoded_images())
THRESHOLD = 0.01


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny().save_pretrained(folder)
    return folder


def predict_units(model, source, out, batch_size=1, unit_size=5, masks=False, **changes):
    """Process all units of a source with one worker in this process; return the worker and its reports."""
    files, digest, _ = pack_model(str(model))
    store = OutputFolder(str(out))
    store.system.makedirs(store.root, exist_ok=True)
    id_column = "name" if str(source).endswith(".parquet") else None
    kind, ranges = find_ranges([str(source)], Options(id_column=id_column))
    options = Options(THRESHOLD, 7, batch_size, kind, None, id_column, unit_size, **changes)
    plan = create_manifest(store, digest, [str(source)], ranges, options, masks)
    predictor = UnitPredictor(WorkerJob(str(out), plan.run_id, plan.options, "cpu", 1), files)
    return predictor, predictor({"unit": range(plan.num_units)})


def expected(model, batch_size=1):
    """Return what `predict` detects in the valid images, by name."""
    valid = [(name, decode_image(data, name)) for name, data in FILES if name not in BAD]
    results = (
        DeformableDETR.from_pretrained(model)
        .optimize()
        .predict([image for _, image in valid], THRESHOLD, 7, batch_size)
    )
    return {name: detections for (name, _), detections in zip(valid, results, strict=True)}


def check(rows, names, expected_detections):
    """Compare the rows by image with the detections by file name. names: file name by image."""
    assert sorted(names[image] for image in rows) == sorted(name for name, _ in FILES)
    assert any(len(row["boxes"] or []) > 0 for row in rows.values())
    for image, row in rows.items():
        if names[image] in BAD:
            assert row["error"].startswith(f"{image}: cannot be read as an image (")
            values = {key: value for key, value in row.items() if key not in ("image", "key", "error")}
            assert set(values.values()) == {None}
        else:
            detections = expected_detections[names[image]]
            assert row["error"] is None
            assert (row["height"], row["width"]) == detections.image_size
            assert row["boxes"] == detections.boxes.tolist()
            assert row["scores"] == detections.scores.tolist()
            assert row["labels"] == detections.labels.tolist()
            assert row["category_ids"] == detections.category_ids.tolist()
            assert row["names"] == list(detections.names)


def test_all_source_formats(model, tmp_path):
    expected_detections = expected(model)
    makers = {
        "images": lambda: (as_folder(tmp_path / "images", FILES), "{source}/{name}"),
        "parquet": lambda: (as_parquet(tmp_path / "set.parquet", FILES, struct=True), "{source}#{row}"),
        "tar": lambda: (as_tar(tmp_path / "set.tar", FILES), "{source}#{name}"),
    }
    for kind, make in makers.items():
        source, form = make()
        _, reports = predict_units(model, source, tmp_path / "out" / kind)
        assert sum(reports["images"]) == len(FILES)
        assert sum(reports["unreadable"]) == len(BAD)
        assert set(reports["failure"]) == {""}
        rows = read_rows(tmp_path / "out" / kind)
        names = {form.format(source=source, name=name, row=row): name for row, (name, _) in enumerate(FILES)}
        check(rows, names, expected_detections)
        assert [path.name for path in sorted((tmp_path / "out" / kind).iterdir()) if path.suffix == ".tmp"] == []
    keys = {row["key"] for row in read_rows(tmp_path / "out" / "parquet").values()}
    assert keys == {name for name, _ in FILES}


def test_masks(model, tmp_path, monkeypatch):
    """One RLE per detection; null for an unreadable image. Without masks, the other columns are the same."""
    import pandas

    folder = as_folder(tmp_path / "images", FILES)
    predict_units(model, folder, tmp_path / "boxes")
    monkeypatch.setattr(worker, "unpack_model", lambda *arguments: with_masks(unpack_model(*arguments)))
    _, reports = predict_units(model, folder, tmp_path / "masks", masks=True)
    assert set(reports["failure"]) == {""}
    plain, rows = read_rows(tmp_path / "boxes"), read_rows(tmp_path / "masks")
    for image, row in rows.items():
        masks = row.pop("masks")
        assert row == plain[image]
        if row["error"] is None:
            assert len(masks) == len(row["boxes"]) > 0
            assert decode_masks(masks, (row["height"], row["width"])).flatten(1).any(1).sum() > 0
        else:
            assert masks is None
    assert sum(row["error"] is None for row in rows.values()) > 1
    table = pandas.read_parquet(tmp_path / "masks")
    first = table[table["error"].isna()].iloc[0]
    size = [int(first["height"]), int(first["width"])]
    assert [list(mask["size"]) for mask in first["masks"]] == [size] * len(first["scores"])


def test_results_equal_those_of_single_images(model, tmp_path):
    """In batches of three; images of other sizes, whose padding changes scores, are not batched together."""
    folder = as_folder(tmp_path / "images", FILES)
    predict_units(model, folder, tmp_path / "out", batch_size=3, unit_size=99)
    check(read_rows(tmp_path / "out"), {f"{folder}/{name}": name for name, _ in FILES}, expected(model))


def test_batches_contain_valid_images_of_one_size(model, tmp_path, monkeypatch):
    """Invalid images take no place in a batch."""
    batches, predict_each = [], worker.predict_each
    monkeypatch.setattr(
        worker,
        "predict_each",
        lambda model, images, *rest, **tiling: (
            batches.append(len(images)) or predict_each(model, images, *rest, **tiling)
        ),
    )
    files = [
        ("0.png", FILES[0][1]),
        ("1.png", b""),
        ("2.png", FILES[0][1]),
        ("3.png", FILES[2][1]),
        ("4.png", FILES[0][1]),
    ]
    folder = as_folder(tmp_path / "images", files)
    predict_units(model, folder, tmp_path / "out", batch_size=3, unit_size=99)
    assert batches == [2, 1, 1]
    rows = read_rows(tmp_path / "out")
    single = expected(model)
    for file, name in (("0.png", "a00.png"), ("2.png", "a00.png"), ("3.png", "a02.png")):
        assert rows[f"{folder}/{file}"]["scores"] == pytest.approx(single[name].scores.tolist(), abs=1e-5)


@pytest.mark.slow
def test_exported_model(model, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from deformable_detr.export import ExportOptions, export_model, load_exported

    path = tmp_path / "tiny.onnx"
    export_model(DeformableDETR.from_pretrained(model), path, "onnx", ExportOptions(image_size=(96, 128)))
    folder = as_folder(tmp_path / "images", FILES)
    predict_units(path, folder, tmp_path / "out")

    exported = load_exported(path, "cpu")
    rows = read_rows(tmp_path / "out")
    for name in ("a00.png", "b/c03.png"):
        detections = exported.predict(folder / name, THRESHOLD, 7)
        assert rows[f"{folder}/{name}"]["scores"] == detections.scores.tolist()


def test_output_on_a_remote_file_system(model, tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    try:
        folder = as_folder(tmp_path / "images", FILES)
        _, reports = predict_units(model, folder, "memory://results/run")
        assert set(reports["failure"]) == {""}
        memory.get("/results/run", str(tmp_path / "downloaded"), recursive=True)
        check(read_rows(tmp_path / "downloaded"), {f"{folder}/{name}": name for name, _ in FILES}, expected(model))
    finally:
        memory.rm("/results", recursive=True)


def test_failures_are_reported_and_leave_no_file(model, tmp_path, monkeypatch):
    folder = as_folder(tmp_path / "images", FILES)
    predictor, _ = predict_units(model, folder, tmp_path / "out")
    first = tmp_path / "out" / "part-000000.parquet"
    before = first.read_bytes()
    assert predictor({"unit": [0]})["failure"] == [""]
    assert first.read_bytes() == before  # already done

    first.unlink()
    for error, message in (
        (torch.OutOfMemoryError("GPU"), "out of GPU memory: lower --batch-size"),
        (OSError(28, "No space left on device"), "OSError: [Errno 28] No space left on device"),
    ):
        monkeypatch.setattr(worker, "predict_each", _raise(error))
        (failure,) = predictor({"unit": [0]})["failure"]
        assert failure.startswith(message)
        assert sorted(path.name[:5] for path in (tmp_path / "out").iterdir()) == [".mani", ".unit", "part-", "part-"]
    monkeypatch.undo()
    assert predictor({"unit": [0]})["failure"] == [""]
    assert read_part(predictor.out, 0) is not None


def _raise(error):
    def fail(*_, **__):
        raise error

    return fail


def test_model_digest_depends_on_the_contents(model, tmp_path):
    files, digest, _ = pack_model(str(model))
    assert files == {name: (model / name).read_bytes() for name in ("config.json", "model.safetensors")}
    assert pack_model(str(model))[1] == digest
    other = DeformableDETR.from_pretrained(model)
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1e-3
    other.save_pretrained(tmp_path)
    assert pack_model(str(tmp_path))[1] != digest
    unpacked = unpack_model(files, "cpu", 1)
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected_outputs, outputs = DeformableDETR.from_pretrained(model)(pixels), unpacked(pixels)
    assert max(max_differences(expected_outputs, outputs)) <= 1e-4


def test_file_names_that_are_not_utf8(model, tmp_path):
    """Latin-1 names on disk and in an old tar are read and predicted; the results are valid text."""
    name, data = FILES[0]
    latin = os.fsdecode(b"caf\xe9.png")
    folder = as_folder(tmp_path / "images", [(latin, data), (f"b{latin}", b"not an image")])
    with tarfile.open(tmp_path / "set.tar", "w", format=tarfile.USTAR_FORMAT, encoding="latin-1") as tar:
        info = tarfile.TarInfo("caf\xe9.png")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    expected_detections = expected(model)[name]
    for source, image in (
        (folder, f"{folder}/caf\\udce9.png"),
        (tmp_path / "set.tar", f"{tmp_path}/set.tar#caf\\udce9.png"),
    ):
        _, reports = predict_units(model, source, tmp_path / "out" / source.name)
        assert set(reports["failure"]) == {""}
        rows = read_rows(tmp_path / "out" / source.name)
        assert rows[image]["scores"] == expected_detections.scores.tolist()
    assert "cannot be read as an image" in read_rows(tmp_path / "out/images")[f"{folder}/bcaf\\udce9.png"]["error"]


@pytest.mark.parametrize("name", ["lw_detr", "rf_detr odd"])
def test_transformers_model_keeps_its_image_processor(name, tmp_path):
    """It decides on the input size, and is in a file of its own."""
    pytest.importorskip("transformers", reason="needs transformers")
    write_repository(tmp_path, name)
    files, _, _ = pack_model(str(tmp_path))
    assert unpack_model(files, "cpu", 1).config == load_detector(tmp_path, "cpu").config


def test_tiles_and_files_larger_than_memory(model, tmp_path, monkeypatch):
    tifffile = pytest.importorskip("tifffile")
    pixels = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    source = tmp_path / "in"
    source.mkdir()
    Image.fromarray(pixels[:150, :230]).save(source / "a.png")
    for name in ("b.tif", "c.tif"):
        tifffile.imwrite(source / name, pixels, tile=(64, 64), compression="zlib", photometric="rgb", metadata=None)
    (source / "c.tif").write_bytes((source / "c.tif").read_bytes()[:-100])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40_000)
    predict_units(model, source, tmp_path / "out", tile=96)
    rows = {os.path.basename(image): row for image, row in read_rows(tmp_path / "out").items()}
    detector = DeformableDETR.from_pretrained(model).optimize()
    for name in ("a.png", "b.tif"):
        detections = detector.predict(source / name, THRESHOLD, 7, tile=96)
        assert len(detections) > 7
        assert rows[name]["boxes"] == detections.boxes.tolist()
    assert "truncated" in rows["c.tif"]["error"]
