"""Reproducible units, and rejection of results of another run."""

import errno
import json
import re
from multiprocessing import get_context

import pyarrow.parquet as pq
import pytest

from deformable_detr.predict_dataset import manifest as plans
from deformable_detr.predict_dataset.filesystem import OutputFolder
from deformable_detr.predict_dataset.manifest import (
    create_manifest,
    finished_units,
    lock_output,
    read_unit,
)
from deformable_detr.predict_dataset.options import PredictDatasetOptions as Options
from deformable_detr.predict_dataset.parquet import (
    ImageCounts,
    part_name,
    read_note,
    read_part,
    result_row,
    schema,
    write_note,
    write_part,
)
from deformable_detr.predict_dataset.sources import SourceRange
from deformable_detr.utils.errors import UserError
from tests.support.image_sources import duplicates, read_rows

SETTINGS = {
    "format": "images",
    "threshold": 0.5,
    "top_k": 100,
    "batch_size": 8,
    "image_column": None,
    "id_column": None,
}


def source_ranges(count, size=7):
    return iter([SourceRange(f"/set/{index:03}.png", 0, 1, size) for index in range(count)])


def create(store, ranges, unit_size=None, model="m", masks=False, **changes):
    settings = Options(**{**SETTINGS, "unit_size": unit_size, **changes})
    return create_manifest(store, model, ["/set"], ranges, settings, masks)


def write_unit(store, plan, unit):
    """Write one row per image, as a worker does."""
    rows = [result_row(source.file, None, "bad") for source in read_unit(store, unit)]
    return write_part(store, unit, plan.run_id, rows)


@pytest.mark.parametrize("url", ["{}/out", "memory://out"])
def test_units(tmp_path, url):
    import fsspec

    store = OutputFolder(url.format(tmp_path))
    fsspec.filesystem("memory").makedirs("/out", exist_ok=True)
    (tmp_path / "out").mkdir()
    try:
        plan = create(store, source_ranges(10), 4)
        assert (plan.num_units, plan.num_images) == (3, 10)
        units = [read_unit(store, unit) for unit in range(3)]
        assert [len(unit) for unit in units] == [4, 4, 2]
        assert [source for unit in units for source in unit] == list(source_ranges(10))
        assert create(store, source_ranges(10)) == plan  # keeps the unit size of the earlier run
        assert finished_units(store, plan) == {}
        write_unit(store, plan, 1)
        assert finished_units(store, plan) == {1: ImageCounts(4, 4)}
        assert store.list_files() == [".manifest.parquet", ".units", "part-000001.parquet"]
    finally:
        fsspec.filesystem("memory").rm("/out", recursive=True)


def test_ranges_of_shards(tmp_path):
    """Ranges are not split; one of unknown size is a unit, and the number of images is unknown."""
    ranges = [
        SourceRange("a", 0, 3, 9),
        SourceRange("a", 3, 3, 9),
        SourceRange("b", 0, -1, 9),
        SourceRange("c", 0, 1, 9),
        SourceRange("c", 1, 9, 9),
    ]
    store = OutputFolder(str(tmp_path))
    plan = create(store, iter(ranges), 5)
    assert (plan.num_units, plan.num_images) == (3, None)
    assert [read_unit(store, unit) for unit in range(3)] == [ranges[:2], ranges[2:3], ranges[3:]]


@pytest.mark.parametrize(("count", "size"), [(1, 8), (300, 10), (8192, 256), (20_000, 256)])
def test_unit_size_follows_from_the_number_of_images(tmp_path, count, size):
    plan = create(OutputFolder(str(tmp_path)), source_ranges(count))
    assert plan.options.unit_size == size
    assert plan.num_units == -(-count // size)
    assert len(read_unit(OutputFolder(str(tmp_path)), plan.num_units - 1)) == count - (plan.num_units - 1) * size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threshold": 0.3}, "(--threshold 0.5, now 0.3)"),
        ({"top_k": 5, "batch_size": 1}, "(--top-k 100, now 5; --batch-size 8, now 1)"),
        ({"unit_size": 3}, "(--unit-size 4, now 3)"),
        ({"model": "other"}, "(another model)"),
        ({"ranges": source_ranges(11)}, "(different source files (10 files, now 11))"),
        ({"ranges": source_ranges(10, size=8)}, "(different source files (10 files, now 10))"),
        ({"format": "parquet"}, "(--format images, now parquet)"),
        ({"id_column": "name"}, "(--id-column None, now name)"),
        ({"masks": True}, "(no masks, now with them)"),
        ({"masks": True, "model": "other"}, "(no masks, now with them; another model)"),
    ],
)
def test_another_run_is_rejected(tmp_path, change, message):
    store = OutputFolder(str(tmp_path))
    create(store, source_ranges(10), 4)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=re.escape(f"--out {tmp_path} holds results of another run {message}: ")):
        create(store, **{"ranges": source_ranges(10), **change})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_masks_are_part_of_a_run(tmp_path):
    store = OutputFolder(str(tmp_path))
    first = create(store, source_ranges(10), masks=True)
    assert create(store, source_ranges(10), masks=True) == first
    assert pq.read_table(tmp_path / plans.MANIFEST).schema.names == schema(masks=True).names
    with pytest.raises(UserError, match=re.escape("another run (masks, now without): ")):
        create(store, source_ranges(10))


def test_without_the_checks_images_are_duplicated(tmp_path, monkeypatch):
    """Other units in the same folder; each of the two checks detects them."""
    store = OutputFolder(str(tmp_path))
    before = create(store, source_ranges(10), 4)
    write_unit(store, before, 1)
    with pytest.raises(UserError, match="another run"):
        create(store, source_ranges(10), 3)
    monkeypatch.setattr(plans, "_reject_different_run", lambda *_: None)
    monkeypatch.setattr(store, "write", lambda *_: None)
    after = create(store, source_ranges(10), 3)
    with pytest.raises(UserError, match=r"part-000001\.parquet of another run"):
        finished_units(store, after)
    monkeypatch.undo()
    monkeypatch.setattr(plans, "read_part", lambda *_: (after.run_id, ImageCounts(0, 0)))
    done = finished_units(store, after)
    files = [source.file for source in read_unit(store, 1)]  # four images of the first plan
    unit_files = [
        [source.file for source in list(source_ranges(10))[unit * 3 : unit * 3 + 3]] for unit in range(after.num_units)
    ]
    files += [file for unit, names in enumerate(unit_files) if unit not in done for file in names]
    assert duplicates([{"image": file} for file in files])


def test_damaged_results_are_predicted_again(tmp_path):
    store = OutputFolder(str(tmp_path))
    plan = create(store, source_ranges(10), 4)
    for unit in range(3):
        write_unit(store, plan, unit)
    original_rows = read_rows(tmp_path)
    (tmp_path / part_name(0)).write_bytes(b"")
    (tmp_path / part_name(2)).write_bytes((tmp_path / part_name(1)).read_bytes()[:-9])
    assert finished_units(store, plan) == {1: ImageCounts(4, 4)}
    assert not (tmp_path / part_name(0)).exists()
    for unit in (0, 2):
        write_unit(store, plan, unit)
    assert read_rows(tmp_path) == original_rows


def test_results_with_a_flipped_bit_are_predicted_again(tmp_path, caplog):
    """Whatever the bit means: pixels of a box, a count, the schema or the checksum itself."""
    store = OutputFolder(str(tmp_path))
    plan = create(store, source_ranges(10), 4)
    write_unit(store, plan, 0)
    content = (tmp_path / part_name(0)).read_bytes()
    assert finished_units(store, plan) == {0: ImageCounts(4, 4)}
    assert not caplog.records
    positions = {*range(0, len(content), 7), *range(content.rindex(b"deformable_detr.sha256"), len(content))}
    for position in positions:
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        (tmp_path / part_name(0)).write_bytes(flipped)
        assert finished_units(store, plan) == {}, position
    assert f"{part_name(0)} is damaged; its images are predicted again" in caplog.text


def test_temporarily_unreadable_results_are_kept(tmp_path, monkeypatch):
    store = OutputFolder(str(tmp_path))
    plan = create(store, source_ranges(10), 4)
    write_unit(store, plan, 1)
    original_open = store.open

    def fail_to_open(name, *arguments):
        if name == part_name(1):
            raise OSError(errno.EIO, "Input/output error")
        return original_open(name, *arguments)

    monkeypatch.setattr(store, "open", fail_to_open)
    with pytest.raises(UserError, match=f"{part_name(1)} cannot be read: Input/output error"):
        finished_units(store, plan)
    assert (tmp_path / part_name(1)).exists()
    monkeypatch.undo()
    assert finished_units(store, plan) == {1: ImageCounts(4, 4)}


def test_interrupted_results_leave_no_file(tmp_path):
    store = OutputFolder(str(tmp_path))

    def interrupted_rows():
        yield result_row("/set/000.png", None, "bad")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_part(store, 0, "run", interrupted_rows())
    assert list(tmp_path.iterdir()) == []
    assert read_part(store, 0) is None


def test_foreign_folders_are_rejected(tmp_path):
    store = OutputFolder(str(tmp_path))
    (tmp_path / part_name(0)).write_bytes(b"")
    with pytest.raises(UserError, match=r"holds results without \.manifest"):
        create(store, source_ranges(10))
    for text in ("", "{}", '{"format": "x", "version": 1}', "[]"):
        (tmp_path / "_manifest.json").write_text(text)
        with pytest.raises(UserError, match=r"_manifest\.json is not valid"):
            create(store, source_ranges(10))
    (tmp_path / part_name(0)).unlink()
    (tmp_path / "_manifest.json").unlink()
    create(store, source_ranges(10))
    for content in (b"", b"PAR1", (tmp_path / ".units").read_bytes()):
        (tmp_path / ".manifest.parquet").write_bytes(content)
        with pytest.raises(UserError, match=r"\.manifest\.parquet is not valid"):
            create(store, source_ranges(10))
    write_note(store, ".manifest.parquet", json.dumps({"format": plans.FORMAT, "version": 2}))
    with pytest.raises(UserError, match="version 2"):
        create(store, source_ranges(10))


def test_missing_plan_is_recreated(tmp_path):
    store = OutputFolder(str(tmp_path))
    plan = create(store, source_ranges(10), 4)
    (tmp_path / ".units").unlink()
    assert create(store, source_ranges(10), 4) == plan
    assert len(read_unit(store, 1)) == 4


def test_files_of_version_0_1_are_replaced(tmp_path):
    store = OutputFolder(str(tmp_path))
    plan = create(store, source_ranges(10), 4)
    write_unit(store, plan, 1)
    manifest = (tmp_path / ".manifest.parquet").read_bytes()
    (tmp_path / "_manifest.json").write_bytes(read_note(tmp_path / ".manifest.parquet"))
    (tmp_path / ".units").rename(tmp_path / "_units.parquet")
    (tmp_path / ".manifest.parquet").unlink()
    with pytest.raises(UserError, match="another model"):
        create(store, source_ranges(10), 4, model="other")
    assert create(store, source_ranges(10), 4) == plan
    assert finished_units(store, plan) == {1: ImageCounts(4, 4)}
    assert store.list_files() == [".manifest.parquet", ".units", "part-000001.parquet"]
    assert (tmp_path / ".manifest.parquet").read_bytes() == manifest


def test_only_temporary_files_of_a_killed_run_are_removed(tmp_path):
    for name in (".notes.tmp", ".part-000001.parquet.77.tmp"):
        (tmp_path / name).touch()
    (tmp_path / ".cache.tmp").mkdir()
    with lock_output(OutputFolder(str(tmp_path))):
        assert {path.name for path in tmp_path.iterdir()} == {".notes.tmp", ".cache.tmp", ".lock"}


def hold(folder, locked, release):
    with lock_output(OutputFolder(folder)):
        locked.set()
        release.wait()


def test_output_folder_is_locked(tmp_path):
    context = get_context("spawn")
    locked, release = context.Event(), context.Event()
    process = context.Process(target=hold, args=(str(tmp_path / "new" / "out"), locked, release))
    process.start()
    assert locked.wait(120)
    store = OutputFolder(str(tmp_path / "new" / "out"))
    leftover = tmp_path / "new" / "out" / ".part-000000.parquet.1.tmp"
    leftover.touch()
    with pytest.raises(UserError, match="is in use by another process"), lock_output(store):
        pass
    process.kill()
    process.join()
    assert leftover.exists()
    with lock_output(store):
        assert not leftover.exists()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write there"), lock_output(OutputFolder(str(tmp_path / "file"))):
        pass
