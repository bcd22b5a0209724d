"""Posterior methods, which sample p(x_0 | y) given an observation y. One file per method."""

__all__ = [
    "DAPS", "DDNM", "DDRM", "DMPS", "DPS", "ILVR", "JFPS", "MMPS", "MMSE", "SDA", "TDS", "TMPD",
    "CustomStep", "DiffPIR", "Guidance", "Guided", "Observation", "PiGDM", "PnPDM",
    "PrecisionWeighted", "REDDiff", "Replacement", "Residual", "TruncatedReverseSDE",
]  # fmt: skip

from diffusion_lab.guidance.base import CustomStep, Guidance, Guided, Observation
from diffusion_lab.guidance.daps import DAPS
from diffusion_lab.guidance.ddnm import DDNM
from diffusion_lab.guidance.ddrm import DDRM
from diffusion_lab.guidance.diffpir import DiffPIR
from diffusion_lab.guidance.dmps import DMPS
from diffusion_lab.guidance.dps import DPS
from diffusion_lab.guidance.ilvr import ILVR
from diffusion_lab.guidance.jfps import JFPS
from diffusion_lab.guidance.mmps import MMPS
from diffusion_lab.guidance.mmse import MMSE
from diffusion_lab.guidance.pigdm import PiGDM
from diffusion_lab.guidance.pnpdm import PnPDM
from diffusion_lab.guidance.precision_weighted import PrecisionWeighted
from diffusion_lab.guidance.reddiff import REDDiff
from diffusion_lab.guidance.replacement import Replacement
from diffusion_lab.guidance.residual import Residual
from diffusion_lab.guidance.sda import SDA
from diffusion_lab.guidance.tds import TDS
from diffusion_lab.guidance.tmpd import TMPD
from diffusion_lab.guidance.truncated import TruncatedReverseSDE
