r"""Features of the Inception network that defines the Fréchet inception distance (FID).

The network of 2015 in the port of torch-fidelity from TensorFlow. Images are scaled to 299 x 299
as in TensorFlow 1 (bilinear, corners not aligned, no anti-aliasing). The features are the 2048
numbers after the last pooling. With another port, scaling or number format, distances are not
comparable with the literature.

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

DIGEST = "6726825d"  # prefix of the hash of the original weights


class Inception(nn.Module):
    """Maps uint8 images (B, H, W, 3) to features (B, 2048).

    Arguments:
        weights: The file of weights; None uses the cache of torch, and downloads it if missing.

    Attributes:
        name: Identifies the features, also in file names. With other weights than the original
            ones it contains their hash, and no metric is called FID.
        dim: The number d of features.

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
        load_weights(path)  # torch-fidelity itself executes code in the file
        try:
            self.network = fidelity.FeatureExtractorInceptionV3(
                INCEPTION, ["2048"], feature_extractor_weights_path=str(path)
            )
        except (RuntimeError, TypeError) as error:
            raise damaged(path, error) from error
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "Inception":
        """Keeps evaluation mode, so that the statistics of the norms do not change."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.network(images.permute(0, 3, 1, 2))[0]
        return features
