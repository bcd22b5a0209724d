"""Canvas and palette of procedural faces; `faces` describes the coordinates."""

__all__ = ["Canvas", "bump", "make_palette"]

import copy
import math

import torch
from torch import Tensor

from diffusion_lab.data.face_factors import hue_to_rgb

PALETTE = """
    skin- skin skin+ hair- hair hair+ cloth- cloth cloth+ lip- lip lip+ iris- iris iris+
    white- white white+ back- back back+ brow dark rim beard blush collar mouth
""".split()


def make_palette(f: dict[str, Tensor]) -> Tensor:
    """The colours (N, K, 3) of `PALETTE`; - and + are the dark and the light tone."""
    skin, hair, cloth, lip, iris = (f[k] for k in ("skin", "hair", "cloth", "lip", "iris"))
    back, cream = f["background"], skin.new_tensor((1.0, 0.96, 0.88))
    warm, mouth = skin.new_tensor((0.6, 0.49, 0.46)), skin.new_tensor((0.3, 0.16, 0.16))
    one = torch.ones_like(f["age"])
    glow = hue_to_rgb(0.5 * f["back_hue"] + 0.5 + 0.12 * f["back_shift"], 0.4 * one, one)
    skin_light = skin + (cream - skin) * (0.2 + 0.3 * skin.mean(1, keepdim=True))
    sclera = skin + (0.95 * cream - skin) * 0.84
    colours = [skin * warm, skin, skin_light, hair * 0.44, hair, hair * 1.35 + 0.09]
    colours += [cloth * 0.55, cloth, cloth * 0.8 + 0.2, lip * (warm + 0.08), lip]
    colours += [lip + (cream - lip) * 0.4, iris * 0.5, iris, iris * 1.4 + 0.05, sclera * 0.66]
    colours += [sclera, torch.ones_like(skin), back * 0.62, back, back + (glow - back) * 0.4]
    colours += [hair * 0.62 + 0.1 * skin, 0.26 * skin * warm + 0.03, f["rim"], hair * 0.8]
    colours += [skin * skin.new_tensor((1.0, 0.7, 0.7)), f["collar"], skin * mouth + 0.04]
    return torch.stack(colours, dim=1).clamp(0, 1)


STYLE_SHAPE = {  # one number per style, in the order of HAIR_STYLES; lengths in face units
    "top": (0.0, 0.0, 0.08, 0.15, 0.22, 0.1, 0.09, 0.11, 0.06),  # rise over the crown
    "side": (0.0, 0.025, 0.025, 0.04, 0.17, 0.09, 0.07, 0.11, 0.01),  # width beyond the cheek
    "bottom": (-9.0, 0.13, 0.06, 0.06, 0.32, 0.5, 1.3, 1.2, 0.0),  # where it ends
    "flare": (0.0, 0.0, -0.1, -0.1, 0.0, 0.1, 0.06, 0.1, 0.0),  # widening on the way down
    "front": (-9.0, -0.72, -0.4, -0.4, -0.36, -0.2, -0.42, -0.42, -0.44),  # hairline, at the part
    "arch": (0.0, 0.1, 0.06, 0.1, 0.08, 0.0, 0.16, 0.18, 0.12),  # its fall away from the part
    "drop": (0.0, 0.62, 0.36, 0.36, 0.38, 0.75, 0.75, 0.6, 0.3),  # its fall at the temples
    "part": (0.0, 0.0, 0.05, 0.17, 0.0, 0.04, 0.1, 0.09, 0.0),  # largest shift of the part
    "knot": (-1.0, -1.0, -1.0, -1.0, -1.0, -1.0, -1.0, -1.0, 0.21),  # its radius
    "curl": (0.0, 0.3, 0.3, 0.0, 1.0, 0.0, 0.0, 0.3, 0.0),  # rings instead of strands
    "wave": (0.0, 0.0, 0.005, 0.01, 0.035, 0.006, 0.01, 0.045, 0.004),  # roughness of its edge
}


class Canvas:
    """A part of the frame: coordinates, weights of the palette, and the area not yet covered."""

    window: tuple[slice, slice, slice]
    s: Tensor

    def __init__(self, f: dict[str, Tensor], size: int) -> None:
        self.f = {k: v.float()[:, None, None] for k, v in f.items() if v.ndim == 1}
        count, device = len(f["skin"]), f["skin"].device
        style = f["hair_style"]
        self.style = {
            k: torch.tensor(v, device=device)[style][:, None, None] for k, v in STYLE_SHAPE.items()
        }
        f = self.f
        f["wide"] = 0.465 + 0.03 * f["width"] - 0.012 * f["feminine"]
        f["eye"] = 0.2 + 0.012 * f["eye_distance"]
        f["tip"] = 0.27 + 0.02 * f["nose_length"]
        f["mouth"] = f["tip"] + 0.155 + 0.012 * f["chin"]
        scale = 1.02 + 0.06 * f["scale"]
        self.px = 2 / (size * scale)
        axis = (torch.arange(size, device=device) + 0.5) * (2 / size) - 1
        self.x = (axis[None, None, :] - 0.05 * f["shift_x"]) / scale
        self.y = (axis[None, :, None] + 0.06 - 0.04 * f["shift_y"]) / scale
        cos, sin = torch.cos(0.13 * f["tilt"]), torch.sin(0.13 * f["tilt"])
        self.u = self.x * cos + self.y * sin
        self.v = self.y * cos - self.x * sin
        self.left = torch.ones(count, size, size, device=device)
        self.weight = torch.zeros(count, len(PALETTE), size, size, device=device)

    def crop(self, top: float, bottom: float, side: float) -> "Canvas":
        """The rows from top to bottom and |x| < side, as fractions of the frame."""
        size = self.left.shape[-1]
        rows = slice(math.floor(top * size), math.ceil(bottom * size))
        columns = slice(math.floor((0.5 - side) * size), math.ceil((0.5 + side) * size))
        part = copy.copy(self)
        part.window = (slice(None), rows, columns)
        part.x, part.y = self.x[..., columns], self.y[:, rows]
        part.u, part.v, part.left = (z[part.window] for z in (self.u, self.v, self.left))
        part.weight = self.weight[:, :, rows, columns]
        # A turned head moves the features sideways, but not the outline.
        part.s = part.u - 0.05 * self.f["yaw"] * (1 - (part.u / self.f["wide"]).square())
        return part

    def inside(self, distance: Tensor, soft: float = 0.0) -> Tensor:
        """Coverage of the region of negative distance, with an edge `soft` face units wide."""
        return (distance * (-1 / (self.px + soft))).add_(0.5).clamp_(0, 1)

    def band(self, v: Tensor, top: Tensor, bottom: Tensor) -> Tensor:
        """Coverage of top < v < bottom, also correct for bands much thinner than a pixel."""
        return (self.inside(top - v) + self.inside(v - bottom) - 1).clamp_(min=0)

    def paint(self, name: str, cover: Tensor, shade: Tensor | None = None) -> None:
        """Paints behind all earlier parts; shade < 0 is the dark tone and shade > 0 the light."""
        taken = cover * self.left
        self.left -= taken
        plane = PALETTE.index(name)
        if shade is not None:
            dark, light = shade.clamp(-1, 0).mul_(taken), shade.clamp(0, 1).mul_(taken)
            self.weight[:, plane - 1] -= dark
            self.weight[:, plane + 1] += light
            taken.add_(dark).sub_(light)
        self.weight[:, plane] += taken


def bump(x: Tensor, y: Tensor, width: float, height: float) -> Tensor:
    """A soft hill of height 1 that ends at the ellipse of the given half axes."""
    return (1 - (x / width).square() - (y / height).square()).clamp_(min=0).square_()
