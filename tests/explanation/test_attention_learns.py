"""Training moves the attention to the objects: compare a trained model with random weights."""

import os

import pytest
import torch

from deformable_detr import DeformableDETR, train
from deformable_detr.data.dataset import open_dataset
from deformable_detr.explanation import trace

pytestmark = pytest.mark.slow

IMAGES = 12


@pytest.fixture(scope="module")
def cards_model(shared, tmp_path_factory):
    """The run in DEFORMABLE_DETR_CARDS_RUN, or the small preset trained for some minutes."""
    if given := os.environ.get("DEFORMABLE_DETR_CARDS_RUN"):
        return DeformableDETR.from_pretrained(given)
    out = tmp_path_factory.mktemp("cards") / "run"
    weights = shared / "weights" / "tf_efficientnet_lite0.timm.fp32.safetensors"
    if not weights.is_file():
        pytest.skip(f"no weights of the small preset's backbone at {weights}")
    changes = {"backbone_weights": str(weights), "image_size": 192, "eval_every": 100}
    minutes = float(os.environ.get("DEFORMABLE_DETR_CARDS_MINUTES", "8"))  # of two slow cores
    train(shared / "data" / "playing_cards", out, preset="small", minutes=minutes, **changes)
    return DeformableDETR.from_pretrained(out)


def best_detections(model, dataset):
    """Per image: (explanation of the best detection, the labeled card nearest to it)."""
    from torchvision.ops import box_convert, box_iou

    found = []
    for index in range(0, len(dataset), max(1, len(dataset) // IMAGES)):
        image, target = dataset[index]
        cards = box_convert(target.boxes, "cxcywh", "xyxy") * torch.tensor([*image.shape[:0:-1]] * 2)
        explained = trace(model, image, threshold=0.0, top_k=1).detection(0)
        found.append((explained, cards[box_iou(explained.box[None], cards)[0].argmax()]))
    return found


def mean_shares(explained, boxes):
    """Mean share of the attention inside one box per image: (first, last decoder layer)."""
    inside = [one.attention_inside_box(box)[[0, -1]] for one, box in zip(explained, boxes, strict=True)]
    return torch.stack(inside).mean(0).tolist()


def test_attention_goes_to_the_card(cards_model, shared):
    dataset = open_dataset(shared / "data" / "playing_cards", split="val")
    torch.manual_seed(0)
    untrained_model = DeformableDETR(cards_model.config.replace(backbone_weights="none")).eval()
    trained, cards = zip(*best_detections(cards_model, dataset), strict=True)
    untrained, other_cards = zip(*best_detections(untrained_model, dataset), strict=True)
    detected = [one.box for one in trained]

    on_card, untrained_on_card = mean_shares(trained, cards), mean_shares(untrained, other_cards)
    in_box, untrained_in_box = mean_shares(trained, detected), mean_shares(untrained, detected)
    in_own_box = mean_shares(untrained, [one.box for one in untrained])
    print("first and last decoder layer:")
    print(f"inside the detected box {in_box}, random weights {untrained_in_box}")
    print(f"inside the labeled card {on_card}, random weights {untrained_on_card}")
    print(f"random weights, inside their own box {in_own_box}")
    for ours, random in zip(in_box, untrained_in_box, strict=True):
        assert ours > random + 0.1
    assert on_card[-1] > untrained_on_card[-1] + 0.1
    assert on_card[-1] > on_card[0]
    assert on_card[-1] > 0.6
