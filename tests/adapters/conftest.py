"""A small RT-DETR repository with random weights."""

import pytest
from tests.support.transformers_models import write_repository


@pytest.fixture(scope="module")
def rt_detr(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rt_detr")
    write_repository(folder, "rt_detr")
    return folder
