"""Image batches, targets, and detections in common formats."""

import io
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from deformable_detr import UserError
from deformable_detr.structures import Detections, ImageBatch
from deformable_detr.utils.rle import decode_masks, encode_masks
from deformable_detr.visualize.draw import NOTEBOOK_SIDE, draw


def detections(image=None, count=2):
    boxes = torch.tensor([[10.0, 20.0, 60.5, 90.0], [0.0, 0.0, 5.0, 7.25]])[:count]
    scores, labels = torch.tensor([0.875, 0.5])[:count], torch.tensor([1, 0])[:count]
    names = ("犬", "cat")[:count]
    return Detections(boxes, scores, labels, torch.tensor([17, 3])[:count], names, (100, 200), image)


def masked(image=None, count=2):
    """Return detections whose masks reach two pixels beyond their boxes, and the masks (N, 100, 200)."""
    result = detections(image, count)
    rows, columns = torch.arange(100)[:, None] + 0.5, torch.arange(200) + 0.5
    x1, y1, x2, y2 = result.boxes[:, :, None, None].unbind(1)
    masks = (columns > x1 - 2) & (columns < x2 + 2) & (rows > y1 - 2) & (rows < y2 + 2)
    return replace(result, segmentations=encode_masks(masks)), masks


def test_normalize():
    pixels = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(2, 4, 5, dtype=torch.bool)
    mask[1, :, 3:] = True
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.25, 0.3])
    batch = ImageBatch(pixels, mask).normalize(mean, std)
    expected = (pixels.double() / 255 - mean.double()[:, None, None]) / std.double()[:, None, None]
    expected[1, :, :, 3:] = 0
    torch.testing.assert_close(batch.pixels, expected.float(), atol=1e-6, rtol=1e-6)
    assert batch.padding_mask is mask
    assert len(batch) == 2
    with pytest.raises(TypeError, match="uint8"):
        batch.normalize(mean, std)


def test_to_moves_all_tensors():
    batch = ImageBatch(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), torch.zeros(1, 2, 2, dtype=torch.bool))
    assert batch.to("meta").pixels.device.type == batch.to("meta").padding_mask.device.type == "meta"


def test_to_dict_survives_json(tmp_path):
    path = tmp_path / "a.png"
    expected = {
        "image": str(path),
        "height": 100,
        "width": 200,
        "detections": [
            {"box": [10.0, 20.0, 60.5, 90.0], "score": 0.875, "label": 1, "category_id": 17, "name": "犬"},
            {"box": [0.0, 0.0, 5.0, 7.25], "score": 0.5, "label": 0, "category_id": 3, "name": "cat"},
        ],
    }
    assert json.loads(json.dumps(detections(path).to_dict())) == expected
    in_memory = detections(np.zeros((100, 200, 3), np.uint8), count=0).to_dict()
    assert in_memory == {"image": None, "height": 100, "width": 200, "detections": []}


def test_to_coco_has_sizes_and_original_ids():
    assert detections().to_coco(42) == [
        {"image_id": 42, "category_id": 17, "bbox": [10.0, 20.0, 50.5, 70.0], "score": 0.875},
        {"image_id": 42, "category_id": 3, "bbox": [0.0, 0.0, 5.0, 7.25], "score": 0.5},
    ]
    assert json.loads(json.dumps(detections().to_coco("x")))[0]["image_id"] == "x"
    assert detections(count=0).to_coco(1) == []


@pytest.mark.parametrize("count", [0, 1, 2])
def test_to_supervision(count):
    theirs = detections(count=count).to_supervision()
    assert len(theirs) == count
    np.testing.assert_array_equal(theirs.xyxy, detections(count=count).boxes.numpy())
    np.testing.assert_array_equal(theirs.confidence, detections(count=count).scores.numpy())
    assert theirs.class_id.tolist() == [1, 0][:count]
    assert theirs.data["class_name"].tolist() == ["犬", "cat"][:count]
    assert theirs.data["category_id"].tolist() == [17, 3][:count]


def test_to_supervision_names_the_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(UserError, match=r"pip install 'deformable-detr\[supervision\]'"):
        detections().to_supervision()


def test_repr_is_one_short_line():
    assert repr(detections("table.jpg")) == "Detections(2 in table.jpg: 犬 0.88, cat 0.50)"
    assert repr(detections(count=0)) == "Detections(0 in an image)"


def test_save_gives_the_path_back(tmp_path):
    drawn = detections(np.full((100, 200, 3), 128, np.uint8)).save(tmp_path / "new" / "drawn.png")
    assert drawn == tmp_path / "new" / "drawn.png"
    assert Image.open(drawn).mode == "RGB"


@pytest.mark.parametrize("count", [0, 1, 2])
def test_masks_in_all_formats(count):
    result, masks = masked(count=count)
    plain = replace(result, segmentations=None)
    assert torch.equal(result.masks, masks)
    assert repr(result) == repr(plain)
    assert plain.masks is None

    for records, plain_records, key in (
        (result.to_dict()["detections"], plain.to_dict()["detections"], "mask"),
        (result.to_coco(7), plain.to_coco(7), "segmentation"),
    ):
        records = json.loads(json.dumps(records))
        rles = [record.pop(key) for record in records]
        assert torch.equal(decode_masks(rles, (100, 200)), masks)
        assert records == plain_records

    theirs = result.to_supervision()
    assert theirs.mask.dtype == bool
    np.testing.assert_array_equal(theirs.mask, masks.numpy())
    assert plain.to_supervision().mask is None


def test_masks_are_cropped_to_their_boxes_on_request():
    result, masks = masked()
    cropped = result.crop_masks()
    for mask, box in zip(cropped.masks, result.boxes, strict=True):
        rows, columns = (mask.any(axis).nonzero()[:, 0] for axis in (1, 0))
        edges = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        assert (torch.stack(edges) - box).abs().max() <= 0.5
    assert (cropped.masks <= masks).all()
    assert torch.equal(result.masks, masks)
    assert torch.equal(cropped.crop_masks().masks, cropped.masks)
    plain = detections()
    assert plain.crop_masks() is plain


def test_masks_outside_their_boxes_are_cropped_to_nothing():
    result, _ = masked(count=1)
    moved = replace(result, boxes=torch.tensor([[150.0, 20.0, 190.0, 90.0]]))
    assert not moved.crop_masks().masks.any()
    degenerate = replace(result, boxes=torch.tensor([[30.0, 30.0, 30.0, 30.0]]))
    assert not degenerate.crop_masks().masks.any()


def shown(detections):
    """Return the picture that a notebook shows, or None."""
    data = detections._repr_png_()
    return data and Image.open(io.BytesIO(data))


def test_notebooks_show_the_picture(tmp_path):
    image = np.full((100, 200, 3), 90, np.uint8)
    picture = shown(detections(image))
    assert picture.format == "PNG"
    assert np.array_equal(picture.convert("RGB"), draw(detections(image)))
    assert not np.array_equal(picture.convert("RGB").resize((200, 100)), image)
    assert shown(detections()) is None  # no image to draw on
    large = replace(detections(np.zeros((3000, 6000, 3), np.uint8)), image_size=(3000, 6000))
    assert shown(large).size == (NOTEBOOK_SIDE, NOTEBOOK_SIDE // 2)


def test_notebooks_say_why_there_is_no_picture(tmp_path, caplog):
    assert shown(detections(tmp_path / "moved.png")) is None
    assert len(caplog.messages) == 1
    assert "moved.png" in caplog.messages[0]
