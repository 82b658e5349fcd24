"""The same images as a folder, Parquet and WebDataset shards for predict-dataset, and its results."""

import io
import tarfile
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

BAD = {"a03.jpg": b"", "a07.jpg": b"no image at all", "b/c02.png": None}  # None: truncated to half


def encoded_images(count=14):
    """Yield file names and bytes; the files in BAD are broken."""
    random = np.random.default_rng(0)
    names = [f"a{i:02}.{'jpg' if i % 2 else 'png'}" for i in range(count - 4)] + [f"b/c{i:02}.png" for i in range(4)]
    for index, name in enumerate(names):
        pixels = random.integers(0, 255, (40 + 7 * (index % 5), 90 - 11 * (index % 4), 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG" if name.endswith("jpg") else "PNG")
        data = buffer.getvalue()
        if name in BAD:
            data = data[: len(data) // 2] if BAD[name] is None else BAD[name]
        yield name, data


def as_folder(folder, files):
    for name, data in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes(b"")
    return folder


def as_parquet(path, files, groups=5, struct=False):
    files = list(files)
    images = [{"bytes": data, "path": name} for name, data in files] if struct else [data for _, data in files]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if struct else pa.binary()
    table = pa.table({"name": [name for name, _ in files], "image": pa.array(images, kind)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=groups)
    return path


def as_tar(path, files, mode="w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, data in files:
            for member, content in ((name, data), (name.rsplit(".", 1)[0] + ".json", b"{}")):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def read_rows(out):
    """Return all result rows of a folder by image."""
    rows = [row for path in sorted(out.glob("part-*.parquet")) for row in pq.read_table(path).to_pylist()]
    assert duplicates(rows) == []
    return {row["image"]: row for row in rows}


def duplicates(rows):
    return [image for image, count in Counter(row["image"] for row in rows).items() if count > 1]
