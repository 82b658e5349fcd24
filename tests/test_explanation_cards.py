"""What training does to the attention: on a card it goes to the card, with random weights it does not."""

import os

import pytest
import torch

from deformable_detr import DeformableDETR, train
from deformable_detr.data.coco import open_dataset
from deformable_detr.explanation import trace

pytestmark = pytest.mark.slow

IMAGES = 12


@pytest.fixture(scope="module")
def cards_model(shared, tmp_path_factory):
    """A run that DEFORMABLE_DETR_CARDS_RUN names, else the small preset after some minutes on small images."""
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


def shares(model, dataset):
    """Mean shares of the best detection's attention, (first, last layer): inside the labelled card nearest to it, and
    inside its own box.
    """
    from torchvision.ops import box_convert, box_iou

    on_card, in_box = [], []
    for index in range(0, len(dataset), max(1, len(dataset) // IMAGES)):
        image, target = dataset[index]
        cards = box_convert(target.boxes, "cxcywh", "xyxy") * torch.tensor([*image.shape[:0:-1]] * 2)
        explained = trace(model, image, threshold=0.0, top_k=1).detection(0)
        card = cards[box_iou(explained.box[None], cards)[0].argmax()]
        on_card.append(explained.shares_inside(card)[[0, -1]])
        in_box.append(explained.shares_inside()[[0, -1]])
    return torch.stack(on_card).mean(0).tolist(), torch.stack(in_box).mean(0).tolist()


def test_attention_goes_to_the_card(cards_model, shared):
    dataset = open_dataset(shared / "data" / "playing_cards", split="val")
    torch.manual_seed(0)
    config = cards_model.config.replace(backbone_weights="none")
    trained, trained_box = shares(cards_model, dataset)
    untrained, untrained_box = shares(DeformableDETR(config).eval(), dataset)
    print(f"first and last layer: inside the labelled card {trained}, random weights {untrained};")
    print(f"inside the detected box {trained_box}, random weights {untrained_box}")
    assert trained[-1] > untrained[-1] + 0.1
    assert trained[-1] > trained[0]
    assert trained[-1] > 0.6
