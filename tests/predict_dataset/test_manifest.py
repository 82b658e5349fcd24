"""Units that are the same each time, and results of another run that are not mixed in."""

import errno
import json
import re
from multiprocessing import get_context

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
from deformable_detr.predict_dataset.parquet import ImageCounts, part_name, read_part, result_row, write_part
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


def images(count, size=7):
    return iter([SourceRange(f"/set/{index:03}.png", 0, 1, size) for index in range(count)])


def planned(store, pieces, unit_size=None, model="m", **changes):
    settings = Options(**{**SETTINGS, "unit_size": unit_size, **changes})
    return create_manifest(store, model, ["/set"], pieces, settings)


def write(store, plan, unit):
    """What a worker would write: a row an image."""
    found = [result_row(piece.file, None, "bad") for piece in read_unit(store, unit)]
    return write_part(store, unit, plan.run_id, found)


@pytest.mark.parametrize("url", ["{}/out", "memory://out"])
def test_units(tmp_path, url):
    import fsspec

    store = OutputFolder(url.format(tmp_path))
    fsspec.filesystem("memory").makedirs("/out", exist_ok=True)
    (tmp_path / "out").mkdir()
    try:
        plan = planned(store, images(10), 4)
        assert (plan.num_units, plan.num_images) == (3, 10)
        units = [read_unit(store, unit) for unit in range(3)]
        assert [len(unit) for unit in units] == [4, 4, 2]
        assert [piece for unit in units for piece in unit] == list(images(10))
        assert planned(store, images(10)) == plan  # the unit size of the run before
        assert finished_units(store, plan) == {}
        write(store, plan, 1)
        assert finished_units(store, plan) == {1: ImageCounts(4, 4)}
        assert store.list_files() == ["_manifest.json", "_units.parquet", "part-000001.parquet"]
    finally:
        fsspec.filesystem("memory").rm("/out", recursive=True)


def test_pieces_of_shards(tmp_path):
    """Pieces are not torn apart; one of unknown size is a unit alone, and the number of images is unknown."""
    pieces = [
        SourceRange("a", 0, 3, 9),
        SourceRange("a", 3, 3, 9),
        SourceRange("b", 0, -1, 9),
        SourceRange("c", 0, 1, 9),
        SourceRange("c", 1, 9, 9),
    ]
    store = OutputFolder(str(tmp_path))
    plan = planned(store, iter(pieces), 5)
    assert (plan.num_units, plan.num_images) == (3, None)
    assert [read_unit(store, unit) for unit in range(3)] == [pieces[:2], pieces[2:3], pieces[3:]]


@pytest.mark.parametrize(("count", "size"), [(1, 8), (300, 10), (8192, 256), (20_000, 256)])
def test_size_of_units_follows_from_the_set(tmp_path, count, size):
    plan = planned(OutputFolder(str(tmp_path)), images(count))
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
        ({"pieces": images(11)}, "(different source files (10 files, now 11))"),
        ({"pieces": images(10, size=8)}, "(different source files (10 files, now 10))"),
        ({"format": "parquet"}, "(--format images, now parquet)"),
        ({"id_column": "name"}, "(--id-column None, now name)"),
    ],
)
def test_another_run_is_refused(tmp_path, change, message):
    store = OutputFolder(str(tmp_path))
    planned(store, images(10), 4)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=re.escape(f"--out {tmp_path} holds results of another run {message}: ")):
        planned(store, **{"pieces": images(10), **change})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_without_the_checks_images_come_twice(tmp_path, monkeypatch):
    """What the two checks are for: other units in the same folder. Either of them alone notices."""
    store = OutputFolder(str(tmp_path))
    before = planned(store, images(10), 4)
    write(store, before, 1)
    with pytest.raises(UserError, match="another run"):
        planned(store, images(10), 3)
    monkeypatch.setattr(plans, "_reject_different_run", lambda *_: None)
    monkeypatch.setattr(store, "write", lambda *_: None)
    after = planned(store, images(10), 3)
    with pytest.raises(UserError, match=r"part-000001\.parquet of another run"):
        finished_units(store, after)
    monkeypatch.undo()
    monkeypatch.setattr(plans, "read_part", lambda *_: (after.run_id, ImageCounts(0, 0)))
    done = finished_units(store, after)
    found = [piece.file for piece in read_unit(store, 1)]  # four of the first plan
    numbered = [[piece.file for piece in list(images(10))[unit * 3 : unit * 3 + 3]] for unit in range(after.num_units)]
    found += [file for unit, files in enumerate(numbered) if unit not in done for file in files]
    assert duplicates([{"image": file} for file in found])


def test_damaged_results_come_again(tmp_path):
    store = OutputFolder(str(tmp_path))
    plan = planned(store, images(10), 4)
    for unit in range(3):
        write(store, plan, unit)
    whole = read_rows(tmp_path)
    (tmp_path / part_name(0)).write_bytes(b"")
    (tmp_path / part_name(2)).write_bytes((tmp_path / part_name(1)).read_bytes()[:-9])
    assert finished_units(store, plan) == {1: ImageCounts(4, 4)}
    assert not (tmp_path / part_name(0)).exists()
    for unit in (0, 2):
        write(store, plan, unit)
    assert read_rows(tmp_path) == whole


def test_results_that_cannot_be_read_just_now_stay(tmp_path, monkeypatch):
    store = OutputFolder(str(tmp_path))
    plan = planned(store, images(10), 4)
    write(store, plan, 1)
    opened = store.open

    def failing(name, *arguments):
        if name == part_name(1):
            raise OSError(errno.EIO, "Input/output error")
        return opened(name, *arguments)

    monkeypatch.setattr(store, "open", failing)
    with pytest.raises(UserError, match=f"{part_name(1)} cannot be read: Input/output error"):
        finished_units(store, plan)
    assert (tmp_path / part_name(1)).exists()
    monkeypatch.undo()
    assert finished_units(store, plan) == {1: ImageCounts(4, 4)}


def test_results_that_stop_half_way_leave_no_file(tmp_path):
    store = OutputFolder(str(tmp_path))

    def stopping():
        yield result_row("/set/000.png", None, "bad")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_part(store, 0, "run", stopping())
    assert list(tmp_path.iterdir()) == []
    assert read_part(store, 0) is None


def test_foreign_folders(tmp_path):
    store = OutputFolder(str(tmp_path))
    (tmp_path / part_name(0)).write_bytes(b"")
    with pytest.raises(UserError, match="holds results without _manifest"):
        planned(store, images(10))
    for text in ("", "{}", '{"format": "x", "version": 1}', "[]"):
        (tmp_path / "_manifest.json").write_text(text)
        with pytest.raises(UserError, match=r"_manifest\.json is not valid"):
            planned(store, images(10))
    (tmp_path / part_name(0)).unlink()
    (tmp_path / "_manifest.json").unlink()
    planned(store, images(10))
    manifest = json.loads((tmp_path / "_manifest.json").read_text())
    manifest["version"] = 2
    (tmp_path / "_manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="version 2"):
        planned(store, images(10))


def test_a_lost_plan_is_made_again(tmp_path):
    store = OutputFolder(str(tmp_path))
    plan = planned(store, images(10), 4)
    (tmp_path / "_units.parquet").unlink()
    assert planned(store, images(10), 4) == plan
    assert len(read_unit(store, 1)) == 4


def test_only_what_a_killed_run_left_is_removed(tmp_path):
    for name in (".notes.tmp", ".part-000001.parquet.77.tmp"):
        (tmp_path / name).touch()
    (tmp_path / ".cache.tmp").mkdir()
    with lock_output(OutputFolder(str(tmp_path))):
        assert {path.name for path in tmp_path.iterdir()} == {".notes.tmp", ".cache.tmp", ".lock"}


def hold(folder, said, go_on):
    with lock_output(OutputFolder(folder)):
        said.set()
        go_on.wait()


def test_one_process_a_folder(tmp_path):
    context = get_context("spawn")
    said, go_on = context.Event(), context.Event()
    process = context.Process(target=hold, args=(str(tmp_path / "new" / "out"), said, go_on))
    process.start()
    assert said.wait(120)
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
