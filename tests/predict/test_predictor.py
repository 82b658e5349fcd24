"""Prediction: every form of source gives the same boxes in pixels of the original image."""

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
from deformable_detr.predict import predictor
from deformable_detr.predict.predictor import model_categories, predict, predict_each, predict_iter
from deformable_detr.structures import Detections
from deformable_detr.utils.errors import UserError
from tests.support.red_box import RedBoxFinder

BOX = [40, 20, 100, 80]  # x1, y1, x2, y2


def picture(height=120, width=160, box=BOX):
    array = np.full((height, width, 3), 230, np.uint8)
    x1, y1, x2, y2 = box
    array[y1:y2, x1:x2] = (200, 10, 20)
    return array


def check(found, box=BOX, pixels=2.6):
    assert isinstance(found, Detections)
    assert found.names == ("red",)
    assert found.labels.tolist() == [1]
    assert found.category_ids.tolist() == [17]
    assert found.scores.tolist() == pytest.approx([0.9])
    assert found.boxes[0].tolist() == pytest.approx(box, abs=pixels)  # one pixel of the resized image


def test_forms_of_one_image(tmp_path):
    array = picture()
    Image.fromarray(array).save(tmp_path / "a.png")
    sources = [tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(array), array]
    sources.append(torch.from_numpy(array).permute(2, 0, 1))
    model = RedBoxFinder()
    for source in sources:
        found = predict(model, source)
        check(found)
        assert found.image_size == (120, 160)
    assert set(model.input_shapes) == {(1, 3, 64, 85)}  # the evaluation's resize


def test_boxes_are_those_of_the_upright_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    Image.fromarray(picture()).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    found = predict(RedBoxFinder(), tmp_path / "turned.jpg")
    assert found.image_size == (160, 120)
    check(found, [120 - 80, 40, 120 - 20, 100], pixels=3)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_lists_keep_their_order_in_any_batch(batch_size):
    boxes = [[10, 20, 50, 60], [100, 0, 160, 120], [0, 0, 30, 30], [60, 60, 90, 90], [5, 5, 25, 100]]
    sizes = [(120, 160), (130, 300), (90, 60), (100, 100), (200, 40)]
    images = [picture(*size, box=box) for size, box in zip(sizes, boxes, strict=True)]
    model = RedBoxFinder()
    found = predict(model, images, batch_size=batch_size)
    assert isinstance(found, list)
    for detections, box, size in zip(found, boxes, sizes, strict=True):
        check(detections, box, pixels=4)
        assert detections.image_size == size
    assert [shape[0] for shape in model.input_shapes] == [
        len(images[i : i + batch_size]) for i in range(0, 5, batch_size)
    ]


def test_folders(tmp_path):
    for name in ("b.png", "a.PNG", "c.jpg"):
        Image.fromarray(picture()).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "inner.png").mkdir()
    found = predict(RedBoxFinder(), tmp_path)
    assert [detections.image.name for detections in found] == ["a.PNG", "b.png", "c.jpg"]
    assert [d.to_dict()["image"] for d in found] == [str(tmp_path / n) for n in ("a.PNG", "b.png", "c.jpg")]


def test_hidden_files_of_folders_are_left_out(tmp_path):
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    (tmp_path / "._a.png").write_bytes(b"\0\5\x16\7")
    assert [path.name for path in predictor.folder_images(tmp_path)] == ["a.png"]


def test_nothing_to_do_and_nothing_found(tmp_path):
    model = RedBoxFinder()
    assert predict(model, []) == []
    empty = picture(box=[0, 0, 0, 0])
    found = predict(model, empty)
    assert (len(found), found.names, tuple(found.boxes.shape)) == (0, (), (0, 4))
    assert found.to_coco(1) == found.to_dict()["detections"] == []


def test_threshold_and_top_k():
    model = RedBoxFinder()
    assert len(predict(model, picture(), threshold=0.91)) == 0
    everything = predict(model, picture(), threshold=0.0)
    assert len(everything) == 5 * 2  # all pairs: fewer than top_k
    assert everything.scores.tolist() == sorted(everything.scores.tolist(), reverse=True)
    assert len(predict(model, picture(), threshold=0.0, top_k=3)) == 3


def test_any_number_of_images_in_constant_memory():
    """An endless source is read a batch at a time, and nothing keeps the images that are done with."""
    alive = []

    def endless():
        while True:
            image = picture()
            alive.append(weakref.ref(image))
            yield image

    for count, found in enumerate(predict_iter(RedBoxFinder(), endless(), batch_size=2), start=1):
        check(found)
        assert len(alive) <= count + 1
        if count == 20:
            break
    del found
    gc.collect()
    assert sum(reference() is not None for reference in alive) <= 2


def test_every_module_keeps_its_mode():
    model = RedBoxFinder().train()
    model.frozen.eval()
    predict(model, picture())
    assert (model.training, model.frozen.training, model.moving.training) == (True, False, True)
    assert torch.is_grad_enabled()


def test_every_thread_that_predicts_has_evaluation_mode():
    """One that ends does not put the others' model back into training."""
    model = RedBoxFinder().train()
    both, first_done, modes = threading.Barrier(2), threading.Event(), []
    forward = model.forward

    def slow(*given):
        both.wait(30)
        if threading.current_thread().name == "second":
            first_done.wait(30)
        modes.append(model.moving.training)
        return forward(*given)

    model.forward = slow
    first, second = (
        threading.Thread(target=predict, args=(model, picture()), name=name) for name in ("first", "second")
    )
    first.start()
    second.start()
    first.join(60)
    first_done.set()
    second.join(60)
    assert modes == [False, False]
    assert model.moving.training


def test_modes_come_back_after_an_error():
    model = RedBoxFinder().train()
    model.forward = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        predict(model, picture())
    assert model.moving.training


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 1.5}, "threshold 1.5: must be from 0 to 1"),
        ({"top_k": 0}, "top_k 0: must be 1 or more"),
        ({"batch_size": 0}, "batch_size 0: must be 1 or more"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        predict(RedBoxFinder(), picture(), **settings)
    with pytest.raises(UserError, match=re.escape(message)):
        predict_iter(RedBoxFinder(), [], **settings)  # at once, not at the first image


def test_bad_images_and_folders_are_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.jpg"):
        predict(RedBoxFinder(), tmp_path / "nowhere.jpg")
    Image.fromarray(picture()).save(tmp_path / "good.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "good.jpg").read_bytes()[:600])
    with pytest.raises(UserError, match=r"cut\.jpg"):
        predict(RedBoxFinder(), [tmp_path / "good.jpg", tmp_path / "cut.jpg"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty contains no images"):
        predict(RedBoxFinder(), tmp_path / "empty")


def test_names_and_ids_of_models_that_have_none():
    config = ModelConfig(num_classes=2)
    assert [(c.id, c.name) for c in model_categories(config)] == [(0, "class 0"), (1, "class 1")]


@pytest.mark.parametrize("two_stage", [False, True])
def test_with_the_real_model(two_stage, tmp_path):
    from deformable_detr import DeformableDETR

    torch.manual_seed(0)
    config = ModelConfig(
        backbone="resnet10t", backbone_weights="none", hidden_dim=32, num_heads=2, encoder_layers=1, decoder_layers=1,
        ffn_dim=64, num_queries=10, image_size=64, num_classes=2, class_names=("a", "b"), category_ids=(5, 9),
        refine=two_stage, two_stage=two_stage,
    )  # fmt: skip
    model = DeformableDETR(config).train()
    images = [picture(), picture(90, 200)]
    found = model.predict(images, threshold=0.0, batch_size=2)
    for detections, (height, width) in zip(found, [(120, 160), (90, 200)], strict=True):
        assert len(detections) == 20
        assert set(detections.category_ids.tolist()) <= {5, 9}
        assert torch.isfinite(detections.boxes).all()
        assert (detections.boxes >= 0).all()
        assert (detections.boxes <= torch.tensor([width, height, width, height])).all()
    detections.save(tmp_path / "drawn.png")
    assert Image.open(tmp_path / "drawn.png").size == (400, 180)  # twice: under 320 pixels
    assert model.training
    model(torch.randn(2, 3, 64, 64))["pred_boxes"].sum().backward()  # prediction left nothing that training stumbles on


def test_a_bad_image_stands_in_its_place(tmp_path):
    for name in "abcde":
        Image.fromarray(picture()).save(tmp_path / f"{name}.png")
    (tmp_path / "c.png").write_bytes(b"no picture")
    names = []
    for found in predict_each(RedBoxFinder(), tmp_path, batch_size=2):
        if isinstance(found, UserError):
            names.append(None)
            assert "c.png" in str(found)
        else:
            check(found)
            names.append(Path(found.path).stem)
    assert names == ["a", "b", None, "d", "e"]
    got = []
    with pytest.raises(UserError, match=r"c\.png"):
        got.extend(Path(found.path).stem for found in predict_iter(RedBoxFinder(), tmp_path))
    assert got == ["a", "b"]


def test_files_are_read_while_the_model_works_but_not_far_ahead(tmp_path, monkeypatch):
    for number in range(60):
        Image.fromarray(picture()).save(tmp_path / f"{number:02}.png")
    read, ran_in, done = [], set(), threading.Event()
    original = predictor.read_image

    def reading(source):
        if source.stem == "00":
            time.sleep(0.05)  # the slowest one first: the order holds all the same
        ran_in.add(threading.current_thread())
        read.append(source.stem)
        if len(read) > 1:
            done.set()
        return original(source)

    monkeypatch.setattr(predictor, "read_image", reading)
    most = 2 * 8 + 2  # twice the threads, and what they hold
    order = []
    for found in predict_iter(RedBoxFinder(), tmp_path):
        order.append(Path(found.path).stem)
        assert done.wait(10)  # the next one is read although nobody asked for it yet
        assert len(read) <= len(order) + most
        if len(order) == 30:
            break
    assert order == [f"{number:02}" for number in range(30)]
    assert threading.main_thread() not in ran_in
    del found
    gc.collect()
    for thread in ran_in:
        thread.join(10)
    assert not any(thread.is_alive() for thread in ran_in)
    assert len(read) < 60
