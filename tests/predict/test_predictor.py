"""Prediction: every type of source gives the same boxes in pixels of the original image."""

import gc
import re
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deformable_detr.config.schema import ModelConfig
from deformable_detr.predict import inputs, predictor
from deformable_detr.predict.predictor import model_categories, predict, predict_each, predict_iter
from deformable_detr.structures import Detections
from deformable_detr.utils.errors import UserError
from tests.support.red_box import RedBoxFinder

BOX = [40, 20, 100, 80]  # x1, y1, x2, y2


def make_image(height=120, width=160, box=BOX):
    array = np.full((height, width, 3), 230, np.uint8)
    x1, y1, x2, y2 = box
    array[y1:y2, x1:x2] = (200, 10, 20)
    return array


def test_fixed_input_size():
    model = RedBoxFinder(resize="fixed", image_size=64, image_width=96)
    images = [make_image(), make_image(120, 320, [200, 20, 260, 80])]
    for detections, box in zip(predict(model, images, batch_size=2), (BOX, [200, 20, 260, 80]), strict=True):
        check(detections, box, 4)
    assert model.input_shapes == [(2, 3, 64, 96)]


def check(detections, box=BOX, pixels=2.6):
    assert isinstance(detections, Detections)
    assert detections.names == ("red",)
    assert detections.labels.tolist() == [1]
    assert detections.category_ids.tolist() == [17]
    assert detections.scores.tolist() == pytest.approx([0.9])
    assert detections.boxes[0].tolist() == pytest.approx(box, abs=pixels)  # one pixel of the resized image


def test_source_types_of_one_image(tmp_path):
    array = make_image()
    Image.fromarray(array).save(tmp_path / "a.png")
    sources = [tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(array), array]
    sources.append(torch.from_numpy(array).permute(2, 0, 1))
    model = RedBoxFinder()
    for source in sources:
        result = predict(model, source)
        check(result)
        assert result.image_size == (120, 160)
    assert set(model.input_shapes) == {(1, 3, 64, 85)}  # resized as in evaluation


def test_boxes_are_relative_to_the_upright_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90° clockwise
    Image.fromarray(make_image()).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    result = predict(RedBoxFinder(), tmp_path / "turned.jpg")
    assert result.image_size == (160, 120)
    check(result, [120 - 80, 40, 120 - 20, 100], pixels=3)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_lists_keep_their_order_for_any_batch_size(batch_size):
    boxes = [[10, 20, 50, 60], [100, 0, 160, 120], [0, 0, 30, 30], [60, 60, 90, 90], [5, 5, 25, 100]]
    sizes = [(120, 160), (130, 300), (90, 60), (100, 100), (200, 40)]
    images = [make_image(*size, box=box) for size, box in zip(sizes, boxes, strict=True)]
    model = RedBoxFinder()
    results = predict(model, images, batch_size=batch_size)
    assert isinstance(results, list)
    for detections, box, size in zip(results, boxes, sizes, strict=True):
        check(detections, box, pixels=4)
        assert detections.image_size == size
    assert [shape[0] for shape in model.input_shapes] == [
        len(images[i : i + batch_size]) for i in range(0, 5, batch_size)
    ]


def test_folders(tmp_path):
    for name in ("b.png", "a.PNG", "c.jpg"):
        Image.fromarray(make_image()).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "inner.png").mkdir()
    results = predict(RedBoxFinder(), tmp_path)
    assert [detections.image.name for detections in results] == ["a.PNG", "b.png", "c.jpg"]
    assert [d.to_dict()["image"] for d in results] == [str(tmp_path / n) for n in ("a.PNG", "b.png", "c.jpg")]


def test_hidden_files_of_folders_are_ignored(tmp_path):
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    (tmp_path / "._a.png").write_bytes(b"\0\5\x16\7")
    assert [path.name for path in predictor.folder_images(tmp_path)] == ["a.png"]


def test_files_of_folders_in_unread_formats_are_named(tmp_path, caplog):
    for name in ("d.heic", "a.HEIC", "c.dng", ".hidden.heic", "b.avif.psd"):
        (tmp_path / name).write_bytes(b"")
    words = "left out 4 files in formats that are not read (a.HEIC, b.avif.psd, c.dng, …); convert to JPEG or PNG"
    with pytest.raises(UserError) as caught:
        predictor.folder_images(tmp_path)
    assert str(caught.value) == f"folder {tmp_path} contains no images ({words})"
    Image.new("RGB", (8, 6)).save(tmp_path / "e.png")
    assert len(predict(RedBoxFinder(), tmp_path)) == 1
    assert caplog.messages == [f"folder {tmp_path}: {words}"]


def test_empty_input_and_no_detections(tmp_path):
    model = RedBoxFinder()
    assert predict(model, []) == []
    empty = make_image(box=[0, 0, 0, 0])
    result = predict(model, empty)
    assert (len(result), result.names, tuple(result.boxes.shape)) == (0, (), (0, 4))
    assert result.to_coco(1) == result.to_dict()["detections"] == []


def test_threshold_and_top_k():
    model = RedBoxFinder()
    assert len(predict(model, make_image(), threshold=0.91)) == 0
    all_detections = predict(model, make_image(), threshold=0.0)
    assert len(all_detections) == 5 * 2  # all (query, class) pairs, fewer than top_k
    assert all_detections.scores.tolist() == sorted(all_detections.scores.tolist(), reverse=True)
    assert len(predict(model, make_image(), threshold=0.0, top_k=3)) == 3


def test_iterator_uses_constant_memory():
    """An endless source is read one batch at a time, and processed images are freed."""
    alive = []

    def endless_images():
        while True:
            image = make_image()
            alive.append(weakref.ref(image))
            yield image

    for count, result in enumerate(predict_iter(RedBoxFinder(), endless_images(), batch_size=2), start=1):
        check(result)
        assert len(alive) <= count + 1
        if count == 20:
            break
    del result
    gc.collect()
    assert sum(reference() is not None for reference in alive) <= 2


def test_every_module_keeps_its_mode():
    model = RedBoxFinder().train()
    model.frozen.eval()
    predict(model, make_image())
    assert (model.training, model.frozen.training, model.moving.training) == (True, False, True)
    assert torch.is_grad_enabled()


def test_concurrent_predictions_stay_in_eval_mode():
    """The first thread to finish must not restore training mode for the others."""
    model = RedBoxFinder().train()
    barrier, first_done, modes = threading.Barrier(2), threading.Event(), []
    forward = model.forward

    def slow_forward(*args):
        barrier.wait(30)
        if threading.current_thread().name == "second":
            first_done.wait(30)
        modes.append(model.moving.training)
        return forward(*args)

    model.forward = slow_forward
    first, second = (
        threading.Thread(target=predict, args=(model, make_image()), name=name) for name in ("first", "second")
    )
    first.start()
    second.start()
    first.join(60)
    first_done.set()
    second.join(60)
    assert modes == [False, False]
    assert model.moving.training


def test_modes_are_restored_after_an_error():
    model = RedBoxFinder().train()
    model.forward = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        predict(model, make_image())
    assert model.moving.training


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 1.5}, "threshold 1.5: must be from 0 to 1"),
        ({"top_k": 0}, "top_k 0: must be 1 or more"),
        ({"batch_size": 0}, "batch_size 0: must be 1 or more"),
    ],
)
def test_invalid_options_are_reported(settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        predict(RedBoxFinder(), make_image(), **settings)
    with pytest.raises(UserError, match=re.escape(message)):
        predict_iter(RedBoxFinder(), [], **settings)  # immediately, not at the first image


def test_invalid_images_and_folders_are_reported(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.jpg"):
        predict(RedBoxFinder(), tmp_path / "nowhere.jpg")
    Image.fromarray(make_image()).save(tmp_path / "good.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "good.jpg").read_bytes()[:600])
    with pytest.raises(UserError, match=r"cut\.jpg"):
        predict(RedBoxFinder(), [tmp_path / "good.jpg", tmp_path / "cut.jpg"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty contains no images"):
        predict(RedBoxFinder(), tmp_path / "empty")


def test_default_class_names_and_ids():
    config = ModelConfig(num_classes=2)
    assert [(c.id, c.name) for c in model_categories(config)] == [(0, "class 0"), (1, "class 1")]


@pytest.mark.parametrize("two_stage", [False, True])
def test_real_model(two_stage, tmp_path):
    from deformable_detr import DeformableDETR

    torch.manual_seed(0)
    config = ModelConfig(
        backbone="resnet10t", backbone_weights="none", hidden_dim=32, num_heads=2, encoder_layers=1, decoder_layers=1,
        ffn_dim=64, num_queries=10, image_size=64, num_classes=2, class_names=("a", "b"), category_ids=(5, 9),
        refine=two_stage, two_stage=two_stage,
    )  # fmt: skip
    model = DeformableDETR(config).train()
    images = [make_image(), make_image(90, 200)]
    results = model.predict(images, threshold=0.0, batch_size=2)
    for detections, (height, width) in zip(results, [(120, 160), (90, 200)], strict=True):
        assert len(detections) == 20
        assert set(detections.category_ids.tolist()) <= {5, 9}
        assert torch.isfinite(detections.boxes).all()
        assert (detections.boxes >= 0).all()
        assert (detections.boxes <= torch.tensor([width, height, width, height])).all()
    detections.save(tmp_path / "drawn.png")
    assert Image.open(tmp_path / "drawn.png").size == (400, 180)  # images under 320 pixels are doubled
    assert model.training
    model(torch.randn(2, 3, 64, 64))["pred_boxes"].sum().backward()  # training still works after prediction


def test_predict_each_yields_an_error_for_an_invalid_image(tmp_path):
    for name in "abcde":
        Image.fromarray(make_image()).save(tmp_path / f"{name}.png")
    (tmp_path / "c.png").write_bytes(b"not an image")
    names = []
    for result in predict_each(RedBoxFinder(), tmp_path, batch_size=2):
        if isinstance(result, UserError):
            names.append(None)
            assert "c.png" in str(result)
        else:
            check(result)
            names.append(Path(result.path).stem)
    assert names == ["a", "b", None, "d", "e"]
    stems = []
    with pytest.raises(UserError, match=r"c\.png"):
        stems.extend(Path(detections.path).stem for detections in predict_iter(RedBoxFinder(), tmp_path))
    assert stems == ["a", "b"]


def test_files_are_prefetched_within_a_limit(tmp_path, monkeypatch):
    for number in range(60):
        Image.fromarray(make_image()).save(tmp_path / f"{number:02}.png")
    read, threads, done = [], set(), threading.Event()
    original = inputs.read_image

    def record_read(source):
        if source.stem == "00":
            time.sleep(0.05)  # a slow first file must not change the order
        threads.add(threading.current_thread())
        read.append(source.stem)
        if len(read) > 1:
            done.set()
        return original(source)

    monkeypatch.setattr(inputs, "read_image", record_read)
    max_prefetched = 2 * 8 + 2  # twice the threads, plus one batch
    order = []
    for result in predict_iter(RedBoxFinder(), tmp_path):
        order.append(Path(result.path).stem)
        assert done.wait(10)  # the next file is read ahead
        assert len(read) <= len(order) + max_prefetched
        if len(order) == 30:
            break
    assert order == [f"{number:02}" for number in range(30)]
    assert threading.main_thread() not in threads
    del result
    gc.collect()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)
    assert len(read) < 60
