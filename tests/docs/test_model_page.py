"""docs/model.md shows the package's own code, and the shapes of a real forward pass."""

import re
from pathlib import Path

import pytest
import torch

from deformable_detr import DeformableDETR, presets

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/model.md").read_text(encoding="utf-8")
QUOTES = re.findall(r'```python title="([\w/]+\.py)"\n(.*?)```', PAGE, re.DOTALL)


def plain_lines(text: str) -> str:
    return "\n".join(line.strip() for line in text.strip().splitlines()) + "\n"


@pytest.mark.parametrize(("file", "code"), QUOTES)
def test_quoted_code_is_that_of_the_package(file, code):
    source = plain_lines((ROOT / "src/deformable_detr" / file).read_text(encoding="utf-8"))
    position = 0
    for part in re.split(r"^\.\.\.$", code, flags=re.MULTILINE):
        position = source.find(plain_lines(part), position)
        assert position >= 0, f"{file} has no longer, in this order:\n{part}"


def test_the_page_quotes_every_part():
    files = {file for file, _ in QUOTES}
    assert {"model/attention.py", "ops/reference.py", "training/matcher.py", "training/criterion.py"} <= files


def test_shapes_of_the_diagram():
    model = DeformableDETR(presets.small(num_classes=6, backbone_weights="none")).eval()
    shapes = []
    modules = (model.backbone, model.projections, model.encoder, model.proposals)
    for module in modules:
        module.register_forward_hook(lambda _, __, output: shapes.append(output))
    with torch.no_grad():
        outputs = model(torch.rand(1, 3, 480, 640))
    stride4, *maps = shapes[0]
    queries = shapes[3][0]
    tensors = [stride4, *maps, *shapes[1], shapes[2][0], queries.content, queries.reference_points]
    tensors += [outputs["layer_logits"], outputs["layer_boxes"], outputs["layer_logits"][:3]]
    diagram = PAGE[PAGE.index("## From pixels") : PAGE.index("## Feature levels")]
    for tensor in tensors:
        assert str(tuple(tensor.shape)) in diagram
    assert shapes[2][0].shape[1] == sum(x.shape[2] * x.shape[3] for x in shapes[1]) == 4800 + 1200 + 300 + 80
