r"""Features of the Inception network that the Fréchet Inception Distance is defined by.

The network of 2015 as torch-fidelity ported it from TensorFlow: images are enlarged to 299 x 299
as TensorFlow 1 did it (bilinear, corners not aligned, no anti-aliasing), the features are the 2048
numbers after the last pooling. Another port, another resizing or another number format gives
distances that cannot be compared with the literature's.

Sources:
    Heusel et al., "GANs trained by a two time-scale update rule", 2017 (FID).
    Obukhov et al., torch-fidelity, 2020 (the port, and its weights).
"""

__all__ = ["Inception"]

from torch import Tensor, nn

from diffusion_lab.errors import ConfigError
from diffusion_lab.metric.features import (
    INCEPTION,
    damaged,
    find_weights,
    load_weights,
    sha256,
)

DIGEST = "6726825d"  # how the hash of the original weights begins


class Inception(nn.Module):
    """Maps uint8 images (B, H, W, 3) to features (B, 2048).

    Arguments:
        weights: The file of weights; None takes the one in torch's cache, or downloads it there.

    Attributes:
        name: What distinguishes these features from others, also in file names. With weights that
            are not the original ones it says so, and no figure is called FID.
        dim: Their number d.

    Raises:
        ConfigError: If torch-fidelity or the weights are missing, or cannot be used.
    """

    dim = 2048

    def __init__(self, weights: str | None = None) -> None:
        super().__init__()
        try:
            from torch_fidelity import feature_extractor_inceptionv3 as fidelity
        except ImportError as error:
            raise ConfigError(
                "extractor=inception needs torch-fidelity; pip install 'diffusion-lab[fid]'"
            ) from error
        path = find_weights(weights, fidelity.URL_INCEPTION_V3)
        digest = sha256(path)
        self.name = INCEPTION if digest.startswith(DIGEST) else f"inception-{digest[:8]}"
        load_weights(path)  # torch-fidelity itself would run code that the file may hold
        try:
            self.network = fidelity.FeatureExtractorInceptionV3(
                INCEPTION, ["2048"], feature_extractor_weights_path=str(path)
            )
        except (RuntimeError, TypeError) as error:
            raise damaged(path, error) from error
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "Inception":
        """Stays in evaluation mode: its norms must not follow our images."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images.permute(0, 3, 1, 2))[0]
