"""ResNets of any depth and width (He et al. 2015), for checkpoints whose ResNet has no timm name."""

from torch import Tensor, nn

from ..config.schema import ResNetShape
from .layers import ACTIVATIONS


class ResNet(nn.Module):
    """The feature maps at chosen indices, index i with stride 2 << i: (B, C_i, H_i, W_i). Names are torchvision's."""

    def __init__(self, shape: ResNetShape, out_indices: tuple[int, ...]) -> None:
        super().__init__()
        from timm.models import FeatureInfo

        self.conv1 = nn.Conv2d(3, shape.stem, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(shape.stem)
        self.act1 = ACTIVATIONS[shape.activation]()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        stages = [{"num_chs": shape.stem, "reduction": 2, "module": "act1"}]
        width = shape.stem
        for index, (depth, out) in enumerate(zip(shape.depths, shape.widths, strict=True)):
            blocks = [_Block(shape, width if i == 0 else out, out, 2 if i == 0 and index else 1) for i in range(depth)]
            self.add_module(f"layer{index + 1}", nn.Sequential(*blocks))
            stages.append({"num_chs": out, "reduction": 4 << index, "module": f"layer{index + 1}"})
            width = out
        self.out_indices = out_indices
        self.feature_info = FeatureInfo(stages, out_indices)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, pixels: Tensor) -> list[Tensor]:
        x = self.act1(self.bn1(self.conv1(pixels)))
        maps = [x]
        x = self.maxpool(x)
        for index in range(1, self.out_indices[-1] + 1):
            x = self.get_submodule(f"layer{index}")(x)
            maps.append(x)
        return [maps[index] for index in self.out_indices]


class _Block(nn.Module):
    """Basic: two 3×3 convolutions. Bottleneck: 1×1, 3×3, 1×1, the inner ones with a quarter of the channels."""

    def __init__(self, shape: ResNetShape, width: int, out: int, stride: int) -> None:
        super().__init__()
        inner = max(1, out // 4)
        convolutions = [(width, out, 3, stride), (out, out, 3, 1)]
        if shape.block == "bottleneck":
            first = stride if shape.stride_first else 1
            convolutions = [(width, inner, 1, first), (inner, inner, 3, stride // first), (inner, out, 1, 1)]
        self.depth = len(convolutions)
        for index, (a, b, size, step) in enumerate(convolutions, 1):
            self.add_module(f"conv{index}", nn.Conv2d(a, b, size, stride=step, padding=size // 2, bias=False))
            self.add_module(f"bn{index}", nn.BatchNorm2d(b))
        self.activation = ACTIVATIONS[shape.activation]()
        self.downsample = None
        if stride != 1 or width != out:
            self.downsample = nn.Sequential(nn.Conv2d(width, out, 1, stride=stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        for index in range(1, self.depth + 1):
            x = self.get_submodule(f"bn{index}")(self.get_submodule(f"conv{index}")(x))
            if index < self.depth:
                x = x.relu()
        return self.activation(x + shortcut)
