"""Training moves attention to the objects, compared with random weights."""

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
    """The model of DEFORMABLE_DETR_CARDS_RUN, or the small preset trained for some epochs."""
    if run_folder := os.environ.get("DEFORMABLE_DETR_CARDS_RUN"):
        return DeformableDETR.from_pretrained(run_folder)
    out = tmp_path_factory.mktemp("cards") / "run"
    weights = shared / "weights" / "tf_efficientnet_lite0.timm.fp32.safetensors"
    if not weights.is_file():
        pytest.skip(f"no weights of the small preset's backbone at {weights}")
    changes = {"backbone_weights": str(weights), "image_size": 192, "eval_every": 100}
    train(shared / "data" / "playing_cards", out, preset="small", epochs=16, **changes)
    return DeformableDETR.from_pretrained(out)


def best_detections(model, dataset):
    """Return, per image, the explanation of the best detection and the labeled card nearest to it."""
    from torchvision.ops import box_convert, box_iou

    detections = []
    for index in range(0, len(dataset), max(1, len(dataset) // IMAGES)):
        image, target = dataset[index]
        cards = box_convert(target.boxes, "cxcywh", "xyxy") * torch.tensor([*image.shape[:0:-1]] * 2)
        explanation = trace(model, image, threshold=0.0, top_k=1).detection(0)
        detections.append((explanation, cards[box_iou(explanation.box[None], cards)[0].argmax()]))
    return detections


def mean_shares(explanations, boxes):
    """Return the mean share of attention inside one box per image, in the first and last decoder layer."""
    inside = [
        explanation.attention_inside_box(box)[[0, -1]] for explanation, box in zip(explanations, boxes, strict=True)
    ]
    return torch.stack(inside).mean(0).tolist()


def test_attention_moves_to_the_card(cards_model, shared):
    dataset = open_dataset(shared / "data" / "playing_cards", split="val")
    torch.manual_seed(0)
    untrained_model = DeformableDETR(cards_model.config.replace(backbone_weights="none")).eval()
    trained, cards = zip(*best_detections(cards_model, dataset), strict=True)
    untrained, other_cards = zip(*best_detections(untrained_model, dataset), strict=True)
    detected = [explanation.box for explanation in trained]

    on_card, untrained_on_card = mean_shares(trained, cards), mean_shares(untrained, other_cards)
    in_box, untrained_in_box = mean_shares(trained, detected), mean_shares(untrained, detected)
    in_predicted_box = mean_shares(untrained, [explanation.box for explanation in untrained])
    print("first and last decoder layer:")
    print(f"inside the detected box {in_box}, random weights {untrained_in_box}")
    print(f"inside the labeled card {on_card}, random weights {untrained_on_card}")
    print(f"random weights, inside their predicted box {in_predicted_box}")
    for trained_share, random_share in zip(in_box, untrained_in_box, strict=True):
        assert trained_share > random_share + 0.1
    assert on_card[-1] > untrained_on_card[-1] + 0.1
    assert on_card[-1] > on_card[0]
    assert on_card[-1] > 0.6
