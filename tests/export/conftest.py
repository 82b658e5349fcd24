"""Models traced and converted once per session; each conversion takes seconds."""

import copy
from types import SimpleNamespace

import pytest

from deformable_detr.export import ExportOptions, export, export_model
from tests.support.models import tiny, write_pseudo_labeled_dataset


@pytest.fixture(scope="session")
def model():
    """The query options of the small preset; the graph of two decoder layers has parts that an exporter may merge."""
    return tiny(decoder_layers=2, iterative_query_pos=True, look_forward_twice=True)


@pytest.fixture(scope="session")
def data(model, tmp_path_factory):
    return write_pseudo_labeled_dataset(tmp_path_factory.mktemp("int8") / "set", model, images=6)


@pytest.fixture(scope="session")
def exported(model, data, tmp_path_factory):
    """An ONNX file of any size with post-processing, the result and report lines of its export, and the graph."""
    path, lines, graphs = tmp_path_factory.mktemp("export") / "tiny.onnx", [], []
    convert = export.convert_to_onnx

    def recorded(program, metadata):
        graphs.append(convert(program, metadata))
        return graphs[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "convert_to_onnx", recorded)
        result = export_model(model, path, "onnx", ExportOptions(post_processing=True, data=data), lines.append)
    return SimpleNamespace(path=path, result=result, lines=lines, graph=graphs[0])


@pytest.fixture
def converted(exported, monkeypatch):
    """Let exports of `model` to ONNX and OpenVINO reuse the graph of `exported`."""
    monkeypatch.setattr(export, "trace", lambda *_: None)

    def convert(program, metadata):
        graph = copy.deepcopy(exported.graph)
        del graph.metadata_props[:]
        for key, text in metadata.to_strings().items():
            graph.metadata_props.add(key=key, value=text)
        return graph

    monkeypatch.setattr(export, "convert_to_onnx", convert)
