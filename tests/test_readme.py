"""The README: its length, links, picture, footnotes, and the figures of its table."""

import json
import re
import statistics
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
RESULTS = ROOT / "benchmarks" / "results"


def cells(row):
    """Return the cells of a row of the table, from the second on."""
    line = next(line for line in TEXT.splitlines() if line.startswith(f"| {row}"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def mean_ap50(file, method):
    runs = [run for run in json.loads((RESULTS / file).read_text()) if run["data"] == "playing_cards"]
    runs = [run.get("curve", [run])[-1]["AP50"] for run in runs if run["method"] == method]
    assert len(runs) == 3
    return statistics.mean(runs)


def test_length():
    assert len(TEXT.splitlines()) <= 150


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", TEXT))))
def test_linked_files_exist(target):
    assert target.startswith("https://") or (ROOT / target).exists()


def test_anchors_exist():
    for file, anchor in re.findall(r"\]\((docs/[^)#]+)#([^)]+)\)", TEXT):
        headings = re.findall(r"^#+ (.+)$", (ROOT / file).read_text(), re.MULTILINE)
        assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings], anchor


def test_picture_moves_and_is_small():
    path = ROOT / re.findall(r"!\[[^]]*\]\((docs/[^)]+)\)", TEXT)[0]
    assert path.stat().st_size < 1.5e6
    with Image.open(path) as image:
        assert image.n_frames > 1


def test_footnotes_are_defined_once_and_used():
    defined = re.findall(r"^\[\^(\d+)\]:", TEXT, re.MULTILINE)
    used = re.findall(r"\[\^(\d+)\](?!:)", TEXT)
    assert len(set(defined)) == len(defined)
    assert set(used) == set(defined)


def test_figures_are_those_of_the_results():
    ours, _, theirs, *_ = cells("AP50 after six epochs")
    assert float(ours) == round(mean_ap50("small_sets.json", "ours"), 3)
    assert float(theirs) == round(mean_ap50("convergence_192.json", "transformers-refine"), 3)
    rows = json.loads((RESULTS / "model_refine_default_cpu.json").read_text())["rows"]
    ratios = [row["ratio"] for row in rows if (row["variant"], row["precision"]) == ("optimised", "fp32")]
    assert cells("Speed on a CPU")[0] == " to ".join(f"{ratio:.1f}×" for ratio in sorted(ratios))
