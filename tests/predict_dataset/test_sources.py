"""Sources of predict-dataset: every format in a fixed order, with damage as records."""

import re
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deformable_detr.predict_dataset import sources
from deformable_detr.predict_dataset.options import PredictDatasetOptions as Options
from deformable_detr.predict_dataset.sources import find_ranges, read_range
from deformable_detr.utils.errors import UserError
from tests.support.image_sources import BAD, as_folder, as_parquet, as_tar, encoded_images

FILES = list(encoded_images())


def records(source, out=None, **options):
    kind, ranges = find_ranges([str(source)], Options(**options), out)
    chosen = Options(**{**options, "format": kind})
    return [record for source_range in ranges for record in read_range(source_range, chosen)]


def outcome(record):
    if record.load is None:
        return record.error
    try:
        return tuple(record.load().shape)
    except UserError as error:
        return str(error)


def check(actual, names):
    """Check that the records are the images of FILES in this order, invalid ones with an error."""
    assert [record.image for record in actual] == names
    for record, (name, _) in zip(actual, FILES, strict=True):
        result = outcome(record)
        if name in BAD:
            assert result.startswith(f"{record.image}: cannot be read as an image (")
            assert "0x" not in result  # no memory address, which would not be reproducible
        else:
            assert result[0] == 3


def test_folder(tmp_path):
    folder = as_folder(tmp_path / "images", FILES)
    check(records(folder), [f"{folder}/{name}" for name, _ in FILES])
    assert len(records(f"{folder}/*.jpg")) == 5
    assert len(records(folder / "a00.png")) == 1
    assert len(records(folder, out=str(folder / "b"))) == 10
    assert records(f"file://{folder}")[0].image == f"{folder}/a00.png"


def test_unread_formats_in_a_folder_are_named(tmp_path, caplog):
    folder = as_folder(tmp_path / "images", FILES[:2])
    (folder / "b").mkdir()
    (folder / "b" / "x.heic").write_bytes(b"")
    assert len(records(folder)) == 2
    words = "left out 1 file in formats that are not read (x.heic); convert to JPEG or PNG"
    assert caplog.messages == [f"{folder}: {words}"]


def test_symbolic_links_in_a_folder(tmp_path):
    folder = as_folder(tmp_path / "images", FILES[:2])
    (folder / "loop").symlink_to(folder)
    (folder / "missing.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "linked.png").symlink_to(folder / "a00.png")
    actual = {record.image.rsplit("/", 1)[1]: outcome(record) for record in records(folder)}
    assert actual.keys() == {"a00.png", "a01.jpg", "missing.png", "linked.png"}
    assert actual["linked.png"] == actual["a00.png"]
    assert "no such image file" in actual["missing.png"]


@pytest.mark.parametrize("struct", [False, True])
def test_parquet(tmp_path, struct, monkeypatch):
    monkeypatch.setattr(sources, "MIN_RANGE", 2)
    path = as_parquet(tmp_path / "set.parquet", FILES, struct=struct)
    kind, ranges = find_ranges([str(tmp_path)], Options())
    assert kind == "parquet"
    assert [(source_range.start, source_range.count) for source_range in ranges] == [
        (0, 2), (2, 2), (4, 1), (5, 2), (7, 2), (9, 1), (10, 2), (12, 2),
    ]  # fmt: skip
    actual = records(tmp_path, id_column="name")
    check(actual, [f"{path}#{row}" for row in range(len(FILES))])
    assert [record.key for record in actual] == [name for name, _ in FILES]


def test_parquet_rows_without_bytes(tmp_path):
    table = pa.table({"image": pa.array([FILES[0][1], None], pa.binary())})
    pq.write_table(table, tmp_path / "set.parquet")
    assert [outcome(record) for record in records(tmp_path)] == [
        (3, 40, 90), f"{tmp_path}/set.parquet#1: no image bytes in this row",
    ]  # fmt: skip


def test_tar(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MIN_RANGE", 4)
    path = as_tar(tmp_path / "0.tar", FILES)
    kind, ranges = find_ranges([str(tmp_path)], Options())
    assert kind == "webdataset"
    assert [(source_range.start, source_range.count) for source_range in ranges] == [(0, 4), (4, 4), (8, 4), (12, 2)]
    actual = records(tmp_path)
    check(actual, [f"{path}#{name}" for name, _ in FILES])
    assert (actual[0].key, actual[-1].key) == ("a00", "b/c03")


def test_hidden_members_of_a_tar_are_skipped(tmp_path):
    names = ["./b/a.png", "b/._a.png", "./.ipynb_checkpoints/a.png"]
    as_tar(tmp_path / "0.tar", [(name, FILES[0][1]) for name in names])
    assert [record.image for record in records(tmp_path)] == [f"{tmp_path}/0.tar#{names[0]}"]


def test_compressed_tar_is_one_range(tmp_path):
    path = as_tar(tmp_path / "0.tar.gz", FILES, "w:gz")
    assert [(source_range.start, source_range.count) for source_range in find_ranges([str(path)], Options())[1]] == [
        (0, -1)
    ]
    check(records(path), [f"{path}#{name}" for name, _ in FILES])
    path.rename(tmp_path / "0.tar")  # compressed despite its name
    check(records(tmp_path), [f"{tmp_path}/0.tar#{name}" for name, _ in FILES])


@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.7])
def test_truncated_tar_is_reported(tmp_path, fraction):
    """`tarfile` silently treats a truncated header as the end."""
    path = as_tar(tmp_path / "0.tar", FILES)
    header = int(path.stat().st_size * fraction) // 512 * 512
    data = path.read_bytes()
    for end in (header, header + 100):
        path.write_bytes(data[:end])
        assert "damaged, cannot be read to its end" in records(path)[-1].error


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "parquet"])
def test_damaged_shard_yields_intact_images_and_an_error(tmp_path, kind):
    good = [file for file in FILES if file[0] not in BAD]
    path = tmp_path / f"0.{kind}"
    if kind == "parquet":
        as_parquet(path, good)
        column = pq.read_metadata(path).row_group(1).column(1)  # the footer stays intact
        data = bytearray(path.read_bytes())
        data[column.data_page_offset : column.data_page_offset + 30] = bytes(30)
    else:
        as_tar(path, good, "w:gz" if kind == "tar.gz" else "w")
        data = path.read_bytes()[: path.stat().st_size // 2]
    path.write_bytes(data)
    actual = records(path)
    (damage,) = [record for record in actual if record.error]
    assert re.match(rf"{re.escape(str(path))}(#5-9)?: damaged, cannot be read to its end \(", damage.error)
    assert all(isinstance(outcome(record), tuple) for record in actual if record != damage)
    assert 1 < len(actual) < len(good)
    assert len({record.image for record in actual}) == len(actual)
    path.write_bytes(b"not a shard")
    assert [record.error is not None for record in records(path)] == [True]


def test_remote_file_systems(monkeypatch, tmp_path):
    """Network errors are not reported as image errors."""
    import fsspec

    memory = fsspec.filesystem("memory")
    for name, data in FILES:
        memory.pipe_file(f"/sources/{name}", data)
    try:
        actual = records("memory://sources")
        check(actual, [f"memory:///sources/{name}" for name, _ in FILES])
        memory.rm_file("/sources/a00.png")
        assert "cannot be read" in outcome(actual[0])
        memory.put_file(str(as_parquet(tmp_path / "set.parquet", FILES)), "/sources/set.parquet")
        found_rows = records("memory://sources/*.parquet")
        check(found_rows, [f"memory:///sources/set.parquet#{row}" for row in range(len(FILES))])

        attempts = []

        def unreachable(self, path, **_):
            attempts.append(path)
            raise ConnectionError("no route")

        monkeypatch.setattr(type(memory), "cat_file", unreachable)
        monkeypatch.setattr(sources.time, "sleep", lambda seconds: None)
        with pytest.raises(ConnectionError):
            actual[1].load()
        assert len(attempts) == sources.READ_ATTEMPTS
    finally:
        memory.rm("/sources", recursive=True)


def test_invalid_sources_are_reported(tmp_path):
    folder = as_folder(tmp_path / "images", FILES[:2])
    (tmp_path / "empty").mkdir()
    cases = [
        ([tmp_path / "missing"], {}, f"{tmp_path}/missing: no such file or folder"),
        ([tmp_path / "empty"], {}, "found no images, Parquet files or .tar shards"),
        ([folder], {"format": "parquet"}, "found no .parquet, .pq"),
        (["nonsense://bucket"], {}, "nonsense://bucket: Protocol not known"),
    ]
    for paths, options, message in cases:
        with pytest.raises(UserError, match=re.escape(message)):
            list(find_ranges([str(source) for source in paths], Options(**options))[1])
    as_tar(folder / "z.tar", FILES[:1])
    with pytest.raises(UserError, match=r"holds images and webdataset \(.*z\.tar\); choose with --format"):
        list(find_ranges([str(folder)], Options())[1])
    assert [source_range.file for source_range in find_ranges([str(folder)], Options(format="webdataset"))[1]] == [
        f"{folder}/z.tar"
    ]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image_column": "picture"}, "has no bytes in column picture; name the images with --image-column (columns "),
        ({"image_column": "name"}, "has no bytes in column name; name the images with --image-column (columns with "),
        ({"id_column": "key"}, "has no column key, only name, one, two; choose another --id-column"),
        ({}, "has no column image; name the images with --image-column (columns with bytes: one, two)"),
    ],
)
def test_parquet_columns_are_validated(tmp_path, columns, message):
    pq.write_table(pa.table({"name": ["a"], "one": [b"1"], "two": [b"2"]}), tmp_path / "set.parquet")
    with pytest.raises(UserError, match=re.escape(message)):
        list(find_ranges([str(tmp_path)], Options(**columns))[1])
    assert len(records(tmp_path, image_column="two")) == 1


def test_overlapping_sources_give_each_image_once(tmp_path):
    folder = as_folder(tmp_path / "images", FILES)
    for patterns in (["a0*.*", "*.png", "a00.png"], ["a0*.*", "*.png"]):
        _, ranges = find_ranges([f"{folder}/{pattern}" for pattern in patterns], Options())
        names = [source_range.file.rsplit("/", 1)[1] for source_range in ranges]
        assert len(names) == len(set(names)) == 10, "and no hidden file"
    for names in ([folder, folder], [folder, folder / "b"], [folder / "b", folder]):
        _, ranges = find_ranges([str(source) for source in names], Options())
        assert len(list(ranges)) == len(FILES)


def test_ids_that_are_not_utf8(tmp_path):
    """A string column with Latin-1 bytes, as some writers produce, and a binary column."""
    data = FILES[0][1]
    for kind in (pa.binary(), pa.string()):
        ids = pa.array([b"caf\xe9", b"plain", None], pa.binary())
        if kind == pa.string():
            ids = pa.Array.from_buffers(kind, len(ids), ids.buffers())
        table = pa.table({"name": ids, "image": pa.array([{"bytes": data}] * 3)})
        pq.write_table(table, tmp_path / "set.parquet")
        assert [record.key for record in records(tmp_path, id_column="name")] == [
            "caf\\xe9",
            "plain",
            None,
        ]


def test_links_in_a_tar_are_reported(tmp_path):
    """Tar writes the second of two hard-linked files as a link."""
    path = as_tar(tmp_path / "set.tar", FILES[:1])
    with tarfile.open(path, "a") as tar:
        for name, kind in (("hard.png", tarfile.LNKTYPE), ("soft.png", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a00.png"
            tar.addfile(info)
    actual = records(path)
    assert [record.image for record in actual] == [f"{path}#{name}" for name in ("a00.png", "hard.png", "soft.png")]
    assert all("links in shards are not followed" in outcome(record) for record in actual[1:])


def test_patterns_leave_hidden_folders_out(tmp_path):
    folder = as_folder(tmp_path / "images", FILES)
    (folder / ".trash").mkdir()
    (folder / ".trash/a.png").write_bytes(FILES[0][1])
    assert len(records(f"{folder}/*/*.png")) == 4


def test_colons_in_a_path_are_no_chain(tmp_path):
    folder = as_folder(tmp_path / "a::b", [("c::d.png", FILES[0][1])])
    for source in (folder, folder / "c::d.png"):
        (record,) = records(source)
        assert record.image == f"{folder}/c::d.png"
        assert outcome(record)[0] == 3


def test_results_are_never_a_source(tmp_path):
    folder = as_folder(tmp_path / "images", FILES)
    assert len(records(f"{folder}/**/*.png", out=str(folder / "b"))) < len(records(f"{folder}/**/*.png"))
    (tmp_path / "link").symlink_to(folder)
    below = len(records(folder, out=str(folder / "b")))
    for source, out in (
        (folder, tmp_path / "link/b"),
        (tmp_path / "link", folder / "b"),
        (folder, f"{folder}/../images/b"),
    ):
        assert len(records(source, out=str(out))) == below < len(FILES)
    assert len(records(folder / "a00.png", out=str(folder))) == 1
    for source in (folder, f"{folder}/*.png", tmp_path / "link"):
        message = f"--out {folder} is the folder of the source {source}; choose a separate folder for the results"
        with pytest.raises(UserError, match=re.escape(message)):
            records(source, out=str(folder))
