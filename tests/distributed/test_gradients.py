"""Gradients of two processes are those of one with the same images, whatever each of them has got."""

import pytest

from tests.support.distributed_jobs import CASES
from tests.support.processes import launch

EXACT = 1e-10


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    ended = launch("gradients", tmp_path_factory.mktemp("job"))
    assert [process.code for process in ended] == [0, 0], ended[0].output[-2000:] + ended[1].output[-2000:]
    return [process.results for process in ended]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_have_the_gradients_of_one(figures, case):
    for results in figures:
        assert results[case]["ddp"] <= EXACT
        assert results[case]["size"] > 1e-3


def test_the_cases_are_what_they_say(figures):
    passes = {case: [results[case]["passes"] for results in figures] for case in CASES}
    assert passes["mixed"] == [[2], [2]]
    assert passes["uneven last batch"] == [[2], [1]]
    assert passes["no image on one rank"] == [[1], [0]]
    assert passes["accumulation"] == [[2, 2], [2, 1]]
    assert passes["accumulation with an empty pass"] == [[2, 1], [2, 0]]


@pytest.mark.parametrize(
    ("mistake", "case"),
    [
        ("local num_boxes", "mixed"),
        ("local num_boxes", "accumulation"),
        ("halved", "fewer boxes than ranks"),
        ("halved", "all empty"),
        ("local noise", "mixed"),
    ],
)
def test_the_comparison_notices(figures, mistake, case):
    assert all(results[case][mistake] > 1e-6 for results in figures)
