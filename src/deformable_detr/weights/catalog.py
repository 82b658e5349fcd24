"""The pretrained models that have a short name, with what their authors publish about them.

AP is on COCO val2017, in percent, from the README of the authors' repository: of RT-DETR its PyTorch code's, of LW-DETR
the paper's figures, of DINO that of detrex where its files are the source.
"""

import difflib
from dataclasses import dataclass
from pathlib import Path

import torch

COCO, OBJECTS365, BOTH = "COCO", "Objects365", "Objects365, COCO"
PERMISSIVE = ("Apache-2.0", "MIT", "BSD-3-Clause", "BSD-2-Clause")
HEADER = ("name", "family", "input", "AP", "parameters (M)", "training data", "license", "source")
_DETREX = "https://github.com/IDEA-Research/detrex-storage/releases/download"
_DRIVE = "https://drive.google.com"


@dataclass(frozen=True)
class PretrainedModel:
    """One row of the catalog.

    Attributes:
        name: Short name.
        source: Hub id, or the address of a release file.
        family: Model family.
        image_size: Shortest side of the input in pixels; the side of a square without `max_size`.
        max_size: Limit of the longest side; None: images are stretched to a square.
        ap: AP on COCO val2017, in percent; None: not published.
        parameters: In millions.
        license: SPDX name; None: the authors state none for the weights.
        data: Datasets with boxes that it was trained on, in this order.
    """

    name: str
    source: str
    family: str
    image_size: int
    max_size: int | None
    ap: float | None
    parameters: float
    data: str
    license: str | None = "Apache-2.0"

    @property
    def is_release(self) -> bool:
        """Whether the source is a file at an address, not a hub id."""
        return self.source.startswith("https://")

    @property
    def is_manual(self) -> bool:
        """Whether the file cannot be downloaded without a browser."""
        return self.source.startswith(_DRIVE)

    @property
    def file(self) -> str:
        """Name of the release file."""
        return self.source.rpartition("/")[2]

    def cells(self) -> tuple[str, ...]:
        """Return the row as texts, in the order of `HEADER`."""
        size = f"{self.image_size}×{self.image_size}" if self.max_size is None else f"{self.image_size}–{self.max_size}"
        ap = "—" if self.ap is None else f"{self.ap:.1f}"
        license = self.license or "not stated"
        return (self.name, self.family, size, ap, f"{self.parameters:g}", self.data, license, self.source)


def _official(variant: str, hub: str, ap: float, parameters: float) -> PretrainedModel:
    name, source = f"deformable-detr-r50{variant}", f"SenseTime/deformable-detr{hub}"
    return PretrainedModel(name, source, "Deformable DETR", 800, 1333, ap, parameters, COCO)


def _dino(variant: str, source: str, ap: float, parameters: float) -> PretrainedModel:
    return PretrainedModel(f"dino-{variant}", source, "DINO", 800, 1333, ap, parameters, COCO)


def _square(
    name: str, source: str, family: str, size: int, ap: float | None, parameters: float, data: str = COCO
) -> PretrainedModel:
    return PretrainedModel(name, source, family, size, None, ap, parameters, data)


def _rtdetr(variant: str, ap: float, parameters: float, data: str = COCO) -> PretrainedModel:
    depth, _, suffix = variant.partition("-")
    source = f"PekingU/rtdetr_{depth}vd{'_' + suffix.replace('-', '_') if suffix else ''}"
    return _square(f"rtdetr-{variant}", source, "RT-DETR", 640, ap, parameters, data)


def _rtdetrv2(variant: str, ap: float, parameters: float) -> PretrainedModel:
    return _square(f"rtdetrv2-{variant}", f"PekingU/rtdetr_v2_{variant}vd", "RT-DETRv2", 640, ap, parameters)


def _dfine(variant: str, hub: str, ap: float | None, parameters: float, data: str = COCO) -> PretrainedModel:
    return _square(f"dfine-{variant}", f"ustc-community/dfine-{hub}", "D-FINE", 640, ap, parameters, data)


def _lw_detr(size: str, ap: float, parameters: float) -> PretrainedModel:
    return _square(f"lw-detr-{size}", f"AnnaZhang/lwdetr_{size}_60e_coco", "LW-DETR", 640, ap, parameters, BOTH)


def _rf_detr(size: str, pixels: int, ap: float, parameters: float) -> PretrainedModel:
    return _square(f"rf-detr-{size}", f"Roboflow/rf-detr-{size}", "RF-DETR", pixels, ap, parameters, BOTH)


CATALOG: tuple[PretrainedModel, ...] = (
    _official("", "", 44.5, 40),
    _official("-refine", "-with-box-refine", 46.2, 41),
    _official("-two-stage", "-with-box-refine-two-stage", 46.9, 41),
    _official("-single-scale", "-single-scale", 39.4, 34),
    _official("-single-scale-dc5", "-single-scale-dc5", 41.5, 34),
    # detrex's trainings, whose files can be downloaded, and the longest of the authors. Parameters: counted here.
    _dino("r50", f"{_DETREX}/v0.1.1/dino_r50_4scale_24ep.pth", 50.6, 47.7),
    _dino("r50-5scale", f"{_DETREX}/v0.2.1/dino_r50_5scale_12ep.pth", 49.6, 48),
    _dino("r50-36ep", f"{_DRIVE}/drive/folders/1qD5m1NmK0kjE5hh-G17XUX751WsEG-h_", 50.9, 47.7),
    _dino("r50-5scale-36ep", f"{_DRIVE}/drive/folders/1qD5m1NmK0kjE5hh-G17XUX751WsEG-h_", 51.2, 48),
    _dino("swin-l", f"{_DETREX}/v0.2.0/dino_swin_large_384_4scale_36ep.pth", 58.1, 218),
    _dino("swin-l-5scale", f"{_DETREX}/v0.2.1/dino_swin_large_384_5scale_36ep.pth", 58.5, 218.3),
    _rtdetr("r18", 46.4, 20),
    _rtdetr("r34", 48.9, 31),
    _rtdetr("r50", 53.1, 42),
    _rtdetr("r101", 54.3, 76),
    _rtdetr("r18-coco-o365", 49.0, 20, BOTH),
    _rtdetr("r50-coco-o365", 55.2, 42, BOTH),
    _rtdetr("r101-coco-o365", 56.2, 76, BOTH),
    _rtdetrv2("r18", 48.1, 20),
    _rtdetrv2("r34", 49.9, 31),
    _rtdetrv2("r50", 53.4, 42),
    _rtdetrv2("r101", 54.3, 76),
    _dfine("n", "nano-coco", 42.8, 4),
    _dfine("s", "small-coco", 48.5, 10),
    _dfine("m", "medium-coco", 52.3, 19),
    _dfine("l", "large-coco", 54.0, 31),
    _dfine("x", "xlarge-coco", 55.8, 62),
    _dfine("s-obj365", "small-obj365", None, 10, OBJECTS365),
    _dfine("m-obj365", "medium-obj365", None, 19, OBJECTS365),
    _dfine("l-obj365", "large-obj365", None, 31, OBJECTS365),
    _dfine("x-obj365", "xlarge-obj365", None, 62, OBJECTS365),
    _dfine("s-obj2coco", "small-obj2coco", 50.7, 10, BOTH),
    _dfine("m-obj2coco", "medium-obj2coco", 55.1, 19, BOTH),
    _dfine("l-obj2coco", "large-obj2coco-e25", 57.3, 31, BOTH),
    _dfine("x-obj2coco", "xlarge-obj2coco", 59.3, 62, BOTH),
    # The other sizes are on the hub only in the authors' own format. S has a backbone distilled from DINOv3.
    _square("deimv2-n", "harshaljanjani/DEIMv2_HGNetv2_N_COCO_Transformers", "DEIMv2", 640, 43.0, 3.6),
    PretrainedModel(
        "deimv2-s", "harshaljanjani/DEIMv2_DINOv3_S_COCO_Transformers", "DEIMv2", 640, None, 50.9, 9.7, COCO, None
    ),
    _lw_detr("tiny", 42.6, 12.1),
    _lw_detr("small", 48.0, 14.6),
    _lw_detr("medium", 52.5, 28.2),
    _lw_detr("large", 56.1, 46.8),
    _lw_detr("xlarge", 58.3, 118),
    _rf_detr("nano", 384, 48.4, 30.5),
    _rf_detr("small", 512, 53.0, 32.1),
    _rf_detr("base", 560, 53.3, 29),
    _rf_detr("medium", 576, 54.7, 33.7),
    _rf_detr("large", 704, 56.5, 33.9),
)


def find_model(name: str) -> PretrainedModel | None:
    """Return the model with a short name."""
    return next((model for model in CATALOG if model.name == name), None)


def hint(name: str) -> str:
    """Return what to do about a name that is not in the catalog, for the end of an error."""
    close = difflib.get_close_matches(name.lower().replace("_", "-"), [model.name for model in CATALOG], n=1)
    nearest = f" did you mean {close[0]}?" if close else ""
    return f";{nearest} `deformable-detr models` lists the names of pretrained models"


def license_notice(model: PretrainedModel) -> str | None:
    """Return one line about a license that is not permissive; None for the others."""
    if model.license in PERMISSIVE:
        return None
    if model.license is None:
        return f"{model.name}: its authors state no license for the weights; check {model.source} before you use them"
    return f"{model.name}: the weights have the license {model.license}; check it before you use them"


def release_folder() -> Path:
    """Return the folder of downloaded release files."""
    return Path(torch.hub.get_dir()) / "deformable_detr"


def untold_fields(path: Path) -> dict[str, int]:
    """Return the config fields that a downloaded release file does not tell: detrex saves no settings."""
    is_detrex = any(
        path.name == model.source.rpartition("/")[2] for model in CATALOG if model.source.startswith(_DETREX)
    )
    return {"num_heads": 8} if is_detrex and path.parent == release_folder() else {}
