"""The folder of a finished run is one table in other programs."""

import pathlib
import warnings

import pytest

from deformable_detr.predict_dataset.filesystem import OutputFolder
from deformable_detr.predict_dataset.manifest import LOCK, SUCCESS, UNITS, create_manifest, lock_output, read_unit
from deformable_detr.predict_dataset.options import PredictDatasetOptions
from deformable_detr.predict_dataset.parquet import schema, write_part
from deformable_detr.predict_dataset.sources import SourceRange

NAMES = [f"/set/{number}.png" for number in range(5)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished run of three units; the first has no readable image."""
    store = OutputFolder(str(tmp_path_factory.mktemp("readers") / "found"))
    options = PredictDatasetOptions(format="images", unit_size=2)
    found = {"width": 8, "height": 4, "boxes": [[0.0, 1.0, 2.0, 3.0]], "scores": [0.5], "labels": [1]}
    found |= {"category_ids": [7], "names": ["cat"], "error": None}
    empty = dict.fromkeys(schema().names)
    with lock_output(store):
        plan = create_manifest(store, "m", ["/set"], iter([SourceRange(name, 0, 1, 9) for name in NAMES]), options)
        for unit in range(plan.num_units):
            rows = [{**empty, "image": source.file, **(found if unit else {"error": "bad"})}
                    for source in read_unit(store, unit)]  # fmt: skip
            write_part(store, unit, plan.run_id, rows)
        store.delete(UNITS)
        store.write(SUCCESS, lambda path: path.touch())
    (pathlib.Path(store.root) / LOCK).touch()  # some systems delete it
    return store.root


def read_pandas(folder):
    import pandas

    return pandas.read_parquet(folder)["image"]


def read_pyarrow(folder):
    import pyarrow.dataset

    return pyarrow.dataset.dataset(folder).to_table()["image"].to_pylist()


def read_pyarrow_table(folder):
    import pyarrow.parquet

    return pyarrow.parquet.read_table(folder)["image"].to_pylist()


def read_duckdb(folder):
    duckdb = pytest.importorskip("duckdb")
    return [name for (name,) in duckdb.sql(f"select image from read_parquet('{folder}/*.parquet')").fetchall()]


def read_polars(folder):
    return pytest.importorskip("polars").read_parquet(folder)["image"]


def read_polars_pattern(folder):
    return pytest.importorskip("polars").read_parquet(f"{folder}/*.parquet")["image"]


def read_hugging_face(folder):
    datasets = pytest.importorskip("datasets")
    return datasets.load_dataset(folder, cache_dir=f"{folder}/../cache")["train"]["image"]


def read_dask(folder):
    return pytest.importorskip("dask.dataframe").read_parquet(folder)["image"].compute()


def read_spark(folder):
    session = pytest.importorskip("pyspark.sql").SparkSession.builder.master("local[1]").getOrCreate()
    return [row.image for row in session.read.parquet(folder).select("image").collect()]


READERS = [function for name, function in sorted(globals().items()) if name.startswith("read_") and name != "read_unit"]


@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
def test_one_table(folder, read):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert sorted(read(folder)) == NAMES
