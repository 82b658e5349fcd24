"""Drawn detections: readable at any image size, written atomically."""

import itertools
import re
import time

import numpy as np
import pytest
import torch
from matplotlib import font_manager
from PIL import Image

from deformable_detr.structures import Detections
from deformable_detr.utils.errors import UserError
from deformable_detr.visualize import draw as drawing
from deformable_detr.visualize import fonts
from deformable_detr.visualize.draw import PALETTE, draw
from deformable_detr.visualize.fonts import legible


def detections(image, boxes, names=None, scores=None, labels=None):
    N = len(boxes)
    labels = torch.tensor(labels if labels is not None else range(N), dtype=torch.int64)
    scores = torch.tensor(scores if scores is not None else [0.9] * N)
    size = image.shape[:2] if isinstance(image, np.ndarray) else Image.open(image).size[::-1]
    names = tuple(names or ["cat"] * N)
    return Detections(
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), scores, labels, labels, names, size, image
    )


def gray_image(height=400, width=600):
    return np.full((height, width, 3), 128, np.uint8)


def record_labels(monkeypatch, result):
    """Return the texts and rectangles of the drawn labels, the best last, and the image."""
    texts, rectangles = [], []

    class RecordingDraw(drawing.ImageDraw.ImageDraw):
        def rectangle(self, xy, fill=None, outline=None, width=1):
            if fill is not None:
                rectangles.append([xy[0], xy[1], xy[2] + 1, xy[3] + 1])
            super().rectangle(xy, fill, outline, width)

        def text(self, xy, text, **options):
            left, top, right, bottom = self.textbbox(xy, text, font=options["font"], anchor=options["anchor"])
            background = rectangles[-1]
            assert background[0] <= left
            assert background[1] <= top
            assert right <= background[2]
            assert bottom <= background[3]
            texts.append(text)
            super().text(xy, text, **options)

    monkeypatch.setattr(drawing.ImageDraw, "Draw", RecordingDraw)
    drawn_image = draw(result)
    return texts, rectangles, drawn_image


def intersection_area(a, b):
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


@pytest.mark.parametrize("size", [(20, 30), (400, 600)])
def test_image_without_detections_is_not_changed(tmp_path, size):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    detections(pixels, []).save(tmp_path / "unchanged.png")
    assert (np.asarray(Image.open(tmp_path / "unchanged.png")) == pixels).all()


def test_lines_are_on_the_box_and_the_source_is_not_modified():
    image = gray_image()
    drawn_image = np.asarray(draw(detections(image, [[100, 100, 300, 250]])))
    assert (image == 128).all()
    color = [int(PALETTE[0][i : i + 2], 16) for i in (1, 3, 5)]
    for x, y in [(100, 180), (300, 180), (200, 100), (200, 250)]:
        assert drawn_image[y, x].tolist() == color
    changed = (drawn_image != 128).any(-1)
    assert not changed[130:240, 110:290].any()  # interior
    assert not changed[260:].any()
    assert not changed[:, 310:].any()


@pytest.mark.parametrize(
    ("size", "drawn_size"), [((16, 32), (320, 160)), ((100, 200), (400, 200)), ((320, 100), (100, 320))]
)
def test_small_images_and_their_boxes_are_enlarged(size, drawn_size):
    height, width = size
    result = detections(gray_image(height, width), [[width / 2, height / 2, width, height]])
    drawn_image = draw(result)
    assert drawn_image.size == drawn_size
    row = np.asarray(drawn_image)[round(drawn_size[1] * 0.9)]
    color = [int(PALETTE[0][i : i + 2], 16) for i in (1, 3, 5)]
    columns = (row == color).all(-1).nonzero()[0]
    assert columns.min() == pytest.approx(drawn_size[0] / 2, abs=2)
    assert columns.max() == drawn_size[0] - 1  # the line on the image border is visible


def test_line_width_and_text_scale_with_the_image(monkeypatch):
    heights, lines = [], []
    for scale in (1, 2, 4):
        image = gray_image(600 * scale, 800 * scale)
        box = [[100 * scale, 200 * scale, 700 * scale, 500 * scale]]
        _, [rectangle], drawn_image = record_labels(monkeypatch, detections(image, box))
        heights.append(rectangle[3] - rectangle[1])
        lines.append((np.asarray(drawn_image)[350 * scale, : 400 * scale] != 128).any(-1).sum())
    assert heights[1] == pytest.approx(2 * heights[0], rel=0.15)
    assert heights[2] == pytest.approx(4 * heights[0], rel=0.15)
    assert lines[0] >= 3
    assert lines[0] + 2 <= lines[1] <= lines[2] - 4


def test_labels_stay_inside_and_do_not_overlap(monkeypatch):
    boxes = [
        [0, 0, 60, 60],
        [540, 0, 600, 60],
        [560, 380, 600, 400],
        [0, 350, 30, 400],
        [0, 0, 600, 400],
        [5, 5, 65, 65],
    ]
    texts, rectangles, _ = record_labels(
        monkeypatch, detections(gray_image(), boxes, scores=[0.931, 0.9, 0.8, 0.7, 0.6, 0.5])
    )
    assert texts[-1] == "cat 0.93"  # the best is drawn last
    for left, top, right, bottom in rectangles:
        assert left >= 0
        assert top >= 0
        assert right <= 600
        assert bottom <= 400
    assert not any(intersection_area(a, b) for a, b in itertools.combinations(rectangles, 2))


def test_labels_of_equal_boxes_do_not_overlap(monkeypatch):
    _, rectangles, _ = record_labels(monkeypatch, detections(gray_image(), [[200, 150, 400, 300]] * 6))
    assert not any(intersection_area(a, b) for a, b in itertools.combinations(rectangles, 2))


@pytest.mark.parametrize("size", [(400, 330), (2000, 40), (40, 2000)])
def test_long_names_are_shortened(monkeypatch, size):
    result = detections(gray_image(*size), [[0, 0, 20, 20]], names=["a name that does not fit into the image " * 20])
    [text], [(left, _, right, _)], _ = record_labels(monkeypatch, result)
    assert left >= 0
    assert right <= size[1]
    assert re.fullmatch(r"(a.*… )?0\.90", text)


def test_many_boxes_are_drawn():
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 300, (300, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(1, 100, (300, 2))], axis=1)
    assert draw(detections(gray_image(), boxes.tolist())).size == (600, 400)
    large = detections(gray_image(3000, 4000), (10 * boxes).tolist())
    start = time.process_time()
    assert draw(large).size == (4000, 3000)
    assert time.process_time() - start < 3  # 20 s if each line costs as much as the image size


@pytest.mark.parametrize("text", ["cat", "собака", "γάτα", "قطة سوداء", "ñandú", "ace of ♠", "♥"])
def test_fonts_have_the_glyphs(caplog, text):
    from matplotlib.ft2font import FT2Font

    text_drawn, file = legible(text, "class 7")
    assert text_drawn == text
    assert set(map(ord, text)) - {32} <= FT2Font(file).get_charmap().keys()
    assert not caplog.records


def test_missing_glyphs_are_never_drawn_as_empty_boxes(caplog, monkeypatch):
    """On a server where DejaVu Sans is the only font."""
    dejavu = fonts._font_files()[:1]
    monkeypatch.setattr(fonts, "_font_files", lambda: dejavu)
    for cached in (fonts.legible, fonts._best_font):
        cached.cache_clear()
    try:
        assert legible("\U0001f9ff bead", "class 7")[0] == "bead"  # a symbol may be dropped
        assert not caplog.records
        assert legible("猫 cat", "class 7") == legible("class 7", "")  # a letter may not
        assert legible("\U0001f9ff", "class 8")[0] == "class 8"
        assert len(caplog.records) == 2
        assert "猫 cat" in caplog.text
        assert "class 7" in caplog.text
        result = detections(gray_image(), [[100, 100, 300, 250]] * 2, names=["猫", "cat"], labels=[4, 5])
        texts, _, _ = record_labels(monkeypatch, result)
        assert texts == ["cat 0.90", "class 4 0.90"]
    finally:
        for cached in (fonts.legible, fonts._best_font):
            cached.cache_clear()


def test_each_name_uses_its_own_font(monkeypatch):
    families = {"猫": "Serif", "cat": "Sans"}
    files = {name: font_manager.findfont(f"DejaVu {kind}") for name, kind in families.items()}
    monkeypatch.setattr(drawing, "legible", lambda name, fallback: (name, files[name]))
    fonts_used = []
    font_of = drawing._font
    monkeypatch.setattr(drawing, "_font", lambda file, size: fonts_used.append(file) or font_of(file, size))
    draw(detections(gray_image(), [[0, 0, 99, 99], [200, 200, 300, 300]], names=["猫", "cat"]))
    assert fonts_used == [files["猫"], files["cat"]]


def test_text_contrast_on_every_color():
    """WCAG 2 requires a contrast of 4.5 to 1; white text alone does not reach it."""

    def luminance(color):
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(a, b):
        high, low = sorted([luminance(a), luminance(b)], reverse=True)
        return (high + 0.05) / (low + 0.05)

    colors = [drawing._color(label) for label in range(21)]
    assert len(set(colors)) == 21
    assert drawing._color(21) == colors[0] == PALETTE[0]
    assert min(contrast(color, drawing._ink(color)) for color in colors) >= 4.5
    assert min(contrast(color, "#FFFFFF") for color in PALETTE) < 4.5
    assert len(set(PALETTE)) == 7


def test_source_types(tmp_path):
    Image.fromarray(gray_image()).save(tmp_path / "a.png")
    tensor = torch.from_numpy(gray_image()).permute(2, 0, 1)
    expected = np.asarray(draw(detections(gray_image(), [[10, 10, 50, 50]])))
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.open(tmp_path / "a.png"), tensor):
        result = Detections(*vars(detections(gray_image(), [[10, 10, 50, 50]])).values())
        drawn_image = draw(Detections(**{**vars(result), "image": source}))
        assert (np.asarray(drawn_image) == expected).all()


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".JPEG", ".webp"])
def test_formats(tmp_path, suffix):
    path = detections(gray_image(), [[10, 10, 50, 50]]).save(tmp_path / f"a{suffix}")
    assert Image.open(path).size == (600, 400)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]  # no temporary file left


def test_failed_save_is_reported_and_loses_no_file(tmp_path):
    result = detections(gray_image(), [[10, 10, 50, 50]])
    with pytest.raises(UserError, match=re.escape("'.xyz' is not an image format")):
        result.save(tmp_path / "a.xyz")
    with pytest.raises(UserError, match="a: '' is not an image format"):
        result.save(tmp_path / "a")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"b\.png cannot be written"):
        result.save(tmp_path / "file" / "b.png")
    assert (tmp_path / "file").read_text() == "mine"

    Image.fromarray(gray_image()).save(tmp_path / "source.png")
    from_file = detections(tmp_path / "source.png", [[10, 10, 50, 50]])
    Image.fromarray(gray_image(50, 50)).save(tmp_path / "source.png")
    with pytest.raises(UserError, match="has changed since the prediction"):
        from_file.save(tmp_path / "c.png")
    (tmp_path / "source.png").unlink()
    with pytest.raises(UserError, match=r"source\.png"):
        from_file.save(tmp_path / "c.png")
    assert not (tmp_path / "c.png").exists()
