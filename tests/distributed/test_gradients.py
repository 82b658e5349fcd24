"""Gradients of two processes equal those of one process on the same images."""

import pytest

from tests.support.distributed_jobs import CASES
from tests.support.processes import launch

EXACT = 1e-10


@pytest.fixture(scope="module")
def job_results(tmp_path_factory):
    processes = launch("gradients", tmp_path_factory.mktemp("job"))
    assert [process.code for process in processes] == [0, 0], processes[0].output[-2000:] + processes[1].output[-2000:]
    return [process.results for process in processes]


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_those_of_one_process(job_results, case):
    for results in job_results:
        assert results[case]["ddp"] <= EXACT
        assert results[case]["size"] > 1e-3


def test_cases_are_split_as_described(job_results):
    passes = {case: [results[case]["passes"] for results in job_results] for case in CASES}
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
        ("local num_masks", "mixed"),
        ("local num_masks", "accumulation"),
        ("halved", "fewer boxes than ranks"),
        ("halved", "all empty"),
        ("local noise", "mixed"),
    ],
)
def test_comparison_detects_mistakes(job_results, mistake, case):
    assert all(results[case][mistake] > 1e-6 for results in job_results)
