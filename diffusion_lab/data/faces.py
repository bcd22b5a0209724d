r"""Procedural faces: synthetic portraits, each a pure function of (seed, index).

The built-in dataset needs no download or licence and has any number of images. The factors of a
face (skin, hair, glasses, smile, pose, light, ...) are computed from uniform numbers of the keyed
stream (seed, "faces", index) and drawn in two coordinate systems:

    frame   x to the right and y down, both in [-1, 1], for shoulders and background;
    face    u, v: the frame shifted, scaled and tilted, so that the eyes are on v = 0, the chin is
            near v = 0.65, the crown near v = -0.6 and the cheeks are near u = +-0.47.

Every part is given by a signed distance or by a band between two curves. Its coverage of a pixel
is a ramp one pixel wide, which is the exact area for a straight edge. The parts are composited
from front to back: each covers a part of the area that earlier parts left free. A pixel stores
the weight of every palette colour, so that a part writes one plane instead of three; one matrix
product with the palette of the face gives the colours. Shading is a field in [-1, 1] that mixes
the dark, the plain and the light tone of a colour.
"""

__all__ = ["HAIR_STYLES", "draw_faces", "face_factors", "render_faces"]

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_lab.data.face_canvas import Canvas, bump, make_palette
from diffusion_lab.data.face_factors import HAIR_STYLES, face_factors

CHUNK = 1 << 17  # pixels drawn at once: the overhead of a call is small, the planes take 15 MiB
SIZES = tuple(1 << k for k in range(3, 11))


def _head(c: Canvas) -> tuple[Tensor, Tensor]:
    """Distance to the outline of the head, and a radius: 0 in its middle, 1 on the outline."""
    f = c.f
    down = (c.v.clamp(min=0) / (0.66 + 0.03 * f["chin"] - 0.02 * f["feminine"])).square_()
    up = c.v.clamp(max=0) / 0.6
    square = 0.25 + 0.2 * f["jaw"] - 0.2 * f["feminine"]
    narrow = f["wide"] * (1 - (0.17 + 0.06 * f["feminine"]) * down)
    fall = down * (1 - square + square * down) + up.square_()
    radius = ((c.u / narrow).square_() + fall).sqrt_()
    return (radius - 1) * (narrow + 0.15 * fall), radius


def _strands(c: Canvas) -> Tensor:
    """Waves in [-1, 1] along the hair, as sums of products, which need few sines."""
    f = c.f
    bend = 2.5 * torch.sin(5 * c.y + 3 * f["strand_y"]) * (0.3 + c.style["wave"] * 15)
    kx = (16 + 4 * f["strand_x"]) * c.x + 3 * f["strand_x"]
    locks = torch.sin(kx) * torch.cos(bend) + torch.cos(kx) * torch.sin(bend)  # sin(kx + bend)
    waves = 0.6 * locks
    waves += 0.4 * torch.sin(2.3 * kx + 1) * torch.cos(9 * c.y + 2 * f["strand_y"])
    curls = locks.mul_(torch.sin(21 * c.y + 3 * f["strand_y"]))
    curls += torch.sin(1.9 * kx + 2) * torch.sin(29 * c.y + 5 * f["strand_x"])
    return waves + c.style["curl"] * (0.7 * curls - 0.8 * waves)


def _hair(c: Canvas) -> tuple[Tensor, Tensor, Tensor]:
    """Distance to the hair in front, coverage of the hair behind the face, and shade of both."""
    f, s, wide = c.f, c.style, c.f["wide"]
    strands = _strands(c)
    below = (c.v - 0.02).clamp(min=0)
    grow = 1 + 0.4 * f["volume"]
    breadth = wide + grow * s["side"] + s["flare"] * below
    rise = 0.6 + grow * s["top"]
    up = (c.v / rise).clamp_(max=0)
    radius = ((c.u / breadth).square_() + up.square()).sqrt_()
    outline = (radius - 1) * breadth + s["wave"] * strands
    bottom = s["bottom"] * (1 + 0.12 * f["length"]) + 0.02 * strands
    back = torch.maximum(outline, c.v - bottom + 0.25 * c.u.square())
    knot = (c.u.square() + (c.v + rise + 0.06).square()).sqrt_() - (s["knot"] + 0.03 * f["length"])
    t = (c.u - s["part"] * f["part"]) / wide
    t2 = t.square()
    steep = s["drop"] * t2 * t2
    line = s["front"] + 0.03 * f["hairline"] + s["arch"] * t2 + steep * t2
    slope = t * (2 * s["arch"] + 6 * steep) / wide
    front = (c.v - line + 0.025 * strands) * (1 + slope.square_()).rsqrt_()
    front = torch.maximum(torch.maximum(front, outline), c.v - bottom)
    shade = (
        (0.5 - 0.22 * s["curl"]) * strands
        - 0.5 * below
        + 0.35 * f["light_x"] * c.u
        - 0.25 * (c.v + 0.45)
    )
    return front, c.inside(torch.minimum(back, knot)), shade


def _glasses(c: Canvas) -> None:
    """Rims, bridge, temples and the tint of the lenses."""
    f = c.f
    side = c.s.abs()
    round_ = 0.5 + 0.5 * f["rim_shape"]
    half_x, half_y = 0.165 + 0.015 * f["rim_size"], 0.115 + 0.03 * round_ + 0.01 * f["rim_size"]
    corner = 0.04 + 0.09 * round_
    x = (side - f["eye"] - 0.01).abs_() - half_x + corner
    y = (c.v - 0.025).abs_() - half_y + corner
    lens = (x.clamp(min=0).square_() + y.clamp(min=0).square_()).sqrt_()
    lens += torch.maximum(x, y).clamp_(max=0) - corner
    thick = 0.017 + 0.009 * f["rim_width"]
    cover = c.band(lens, -thick, thick)
    outer = f["eye"] + 0.01 + half_x
    bar = c.band(c.v, -0.035 - 0.8 * thick, -0.035 + 0.8 * thick)
    gap = ((side < f["eye"] + 0.01 - half_x) | (side > outer)) & (side < f["wide"])
    cover = torch.maximum(cover, bar * gap)
    inner = c.inside(lens)
    glare = inner * (0.5 * bump(c.s - f["eye"] - 0.06, c.v + 0.02, 0.14, 0.12))
    glare += inner * (0.5 * bump(c.s + f["eye"] - 0.06, c.v + 0.02, 0.14, 0.12))
    c.paint("rim", cover * f["glasses"])
    c.paint("white", 0.5 * glare * f["glasses"])
    c.paint("rim", inner * (0.82 * f["sunglasses"]))


def _brows(c: Canvas) -> None:
    f = c.f
    t = (c.s.abs() - f["eye"] - 0.005) / 0.15
    thick = (0.03 - 0.008 * f["feminine"] + 0.008 * f["brow_width"]) * (1 - t.square())
    middle = -0.145 - 0.018 * f["brow_height"] + (0.03 + 0.01 * f["brow_tilt"]) * t.square()
    middle += (0.012 * f["brow_tilt"] - 0.004) * t
    c.paint("brow", c.band(c.v, middle - thick, middle + thick) * 0.9)


def _eyes(c: Canvas) -> None:
    """Lashes, catchlights, pupils, irises and whites."""
    f = c.f
    sign = torch.where(c.s < 0, -1.0, 1.0)
    x = c.s.abs() - f["eye"]
    size = 1 + 0.08 * f["eye_size"]
    t = x / (0.126 * size)
    y = c.v + (0.06 + 0.08 * f["eye_tilt"]) * x
    arch = 1 - t.square()
    upper = -(0.07 + 0.012 * f["eye_open"]) * size * arch
    lower = (0.041 + 0.004 * f["eye_open"] - 0.008 * f["smile"]) * size * arch
    eye = c.band(y, upper, lower)
    lash = (0.017 + 0.008 * f["feminine"]) * (1.15 - t.square()).clamp_(0, 1)
    gaze_x = x * sign - 0.022 * f["gaze_x"]
    gaze_y = y + 0.012 - 0.01 * f["gaze_y"]
    ball = (gaze_x.square() + gaze_y.square()).sqrt_()
    glint = ((gaze_x - 0.022 * f["light_x"]).square_() + (gaze_y + 0.024).square_()).sqrt_()
    c.paint("dark", c.band(y, upper - lash, upper + 0.6 * lash))
    c.paint("white+", c.inside(glint - 0.017) * eye)
    c.paint("dark", c.inside(ball - 0.03) * eye)
    c.paint("iris", c.inside(ball - 0.066 * size) * eye, gaze_y * 20)
    c.paint("white", eye, -0.9 + (y - upper) * 16)
    crease = c.band(y, 1.25 * upper - 0.03, 1.25 * upper - 0.014)
    c.paint("skin-", crease * (0.5 * arch.clamp(0, 1)))


def _nose(c: Canvas) -> None:
    """Nostrils and the line of the wings; the shading is part of the skin."""
    f, side = c.f, c.s.abs()
    wide = 0.092 + 0.014 * f["nose_width"] - 0.01 * f["feminine"] + 0.012 * f["tone"]
    y = c.v - f["tip"]
    t = (side - 0.5 * wide) / (0.38 * wide)
    c.paint("dark", c.band(y, -0.016 * (1 - t.square()), 0.014 * (1 - t.square())) * 0.55)
    wing = (side - wide) + 9 * (y + 0.025).square()
    c.paint("skin-", c.band(wing, wing * 0 - 0.016, wing * 0 + 0.012) * (0.5 * (y.abs() < 0.06)))


def _mouth(c: Canvas) -> None:
    f = c.f
    half = 0.175 + 0.02 * f["mouth_width"] + 0.03 * f["smile"]
    t = c.s / half
    t2 = t.square()
    arch = (1 - t2).clamp_(min=0)
    middle = f["mouth"] - (0.065 * f["smile"] - 0.006) * t2
    full = 1 + 0.22 * f["lips"] + 0.15 * f["feminine"]
    gap = 0.075 * (f["mouth_open"] - 0.45).clamp(0, 0.5) * (f["smile"] > 0.2) * arch
    bow = 0.04 * full * arch * (0.8 + 0.45 * (t2 * 4).clamp_(max=1) * (1 - 0.4 * t2))
    pout = 0.06 * full * arch
    edge = 0.008 * arch + 0.002
    teeth = c.band(c.v, middle - gap, middle + 0.7 * gap)
    c.paint("white", teeth * (arch > 0.12), -0.35 - 0.9 * t2)
    c.paint("mouth", c.band(c.v, middle - gap - edge, middle + gap + edge) * (0.9 * (arch > 0)))
    c.paint("lip", c.band(c.v, middle - gap - bow, middle), -0.45 + 0 * t2)
    y = (c.v - middle - gap) / pout.clamp(min=0.01)
    c.paint("lip", c.band(c.v, middle, middle + gap + pout), 1.2 * y * (1 - y) * arch - 0.1)


def _beard(c: Canvas, outline: Tensor) -> None:
    """A moustache above the mouth and a beard along the jaw, from stubble to full."""
    f = c.f
    t = c.s / 0.2
    y = c.v - f["mouth"] + 0.045 * f["smile"] * t.square()
    lip = c.band(y, -0.115 + 0.075 * t.square(), -0.03 + 0 * t) * (t.abs() < 1)
    dense = 0.45 + 0.5 * f["beard_length"]
    side = c.u / f["wide"]
    line = f["mouth"] + 0.1 - 0.47 * side.square() - 0.1 * (1 - (3 * side).square()).clamp(min=-1)
    jaw = c.inside(outline - 0.05 * f["beard_length"]) * c.inside(line - c.v, 0.06)
    c.paint("beard", torch.maximum(lip * f["moustache"], jaw * f["beard"]) * dense)


def _relief(c: Canvas, radius: Tensor) -> Tensor:
    """Light on the face: its direction, the curvature of the head and the relief of the parts."""
    f = c.f
    u, tip, place = c.s, f["tip"], f["mouth"]
    lx, side = f["light_x"], u.abs()
    shade = 0.12 + 0.75 * lx * c.u - (0.25 + 0.1 * f["light_y"]) * c.v
    shade -= 0.55 * radius.square().square_()
    shade += 0.35 * bump(u - 0.1 * lx, c.v + 0.34, 0.3, 0.2)  # forehead
    shade += 0.4 * bump(side - 0.24, c.v - 0.22, 0.16, 0.12)  # cheekbones
    shade -= 0.4 * bump(side - 0.16, c.v + 0.03, 0.2, 0.13)  # sockets
    shade += 0.45 * bump(u - 0.02 * lx, c.v - 0.6 * tip, 0.055, 0.3)  # bridge
    shade += 0.4 * bump(u - 0.02 * lx, c.v - tip + 0.06, 0.06, 0.07)  # tip
    shade -= 0.5 * bump(u + 0.07 * (lx + 0.3 * torch.sign(lx)), c.v - 0.6 * tip, 0.07, 0.32)
    shade -= 0.55 * bump(u, c.v - tip - 0.03, 0.13, 0.05)  # below the nose
    shade -= 0.4 * bump(u, c.v - place - 0.11, 0.15, 0.06)  # below the lip
    shade += 0.25 * bump(u, c.v - place - 0.19, 0.13, 0.09)  # chin
    fold = (side - 0.12 - 0.6 * (c.v - tip)).square_() * 900
    fold = (1 - fold).clamp_(min=0) * ((c.v > tip - 0.04) & (c.v < place))
    shade -= fold * (0.3 * f["age"].square() + 0.1 * f["smile"].clamp(min=0))
    return shade


def _skin(c: Canvas, hair: Tensor) -> None:
    """Beard, cheeks, head and ears; the hair, given by its distance, casts a soft shadow."""
    f = c.f
    outline, radius = _head(c)
    _beard(c, outline)
    head = c.inside(outline)
    blush = bump(c.s.abs() - 0.27, c.v - 0.25, 0.17, 0.14) * (0.08 + 0.35 * f["blush"])
    c.paint("blush", blush * head)
    shade = _relief(c, radius) - 0.5 * c.inside(hair - 0.04, 0.1)
    c.paint("skin", head, shade)
    ear = ((c.u.abs() - f["wide"] - 0.01) / 0.07).square_() + ((c.v - 0.08) / 0.14).square()
    c.paint("skin", c.inside((ear.sqrt_() - 1) * 0.08), -0.5 + 0.5 * f["light_x"] * c.u)


def _body(c: Canvas, hair: Tensor, shade: Tensor) -> None:
    """Neck and clothes, and the hair behind them, which falls over the shoulders."""
    f = c.f
    low = c.crop(0.6, 1, 0.5)
    x, y, side = low.x, low.y, low.x.abs()
    slope = 0.2 + 0.03 * f["shoulder"] + 0.06 * f["feminine"]
    top = 0.86 + 0.03 * f["shoulder"] + slope * side.square()
    vee = f["neckline"] > 0.2
    deep = 0.96 + 0.06 * f["neck_depth"] + 0.07 * vee
    deep = deep - torch.where(vee, 0.75 * side, 1.9 * side.square())
    edge = torch.maximum(top, deep) - y
    cloth = low.inside(edge)
    neck = 0.27 - 0.045 * f["feminine"] + 0.7 * (y - 0.68).clamp(min=0).square()
    skin = torch.maximum(low.inside(side - neck), low.inside(top - y) * (deep > top)) * (1 - cloth)
    drop = 0.7 * bump(low.u, low.v - 0.62, 0.4, 0.28)  # shadow of the chin
    low.paint("skin", skin, -0.35 + 0.5 * f["light_x"] * x - drop - side.square())
    over = low.inside(0.19 + 0.3 * (y - 0.85) - side)
    hair[low.window] *= torch.maximum(over, 1 - cloth)
    c.paint("hair", hair, shade - 0.35)
    low.paint("collar", low.inside(edge.abs() - 0.03) * ((f["neckline"] < -0.3) * cloth))
    folds = 0.35 * torch.sin(9 * x + 5 * y * f["shoulder"])
    low.paint("cloth", cloth, 0.5 * f["light_x"] * x - 0.9 * (side - 0.25).square() + folds * side)


def _background(c: Canvas) -> None:
    f = c.f
    angle = math.pi * f["back_angle"]
    ramp = (torch.cos(angle) * c.x + torch.sin(angle) * c.y) * (0.3 + 0.2 * f["back_contrast"])
    spot = bump(c.x - 0.8 * f["blob_x"], c.y - 0.8 * f["blob_y"], 0.9, 0.9) * (0.9 * f["blob"])
    c.paint("back", torch.ones_like(c.left), ramp + spot)


def _draw(f: dict[str, Tensor], size: int) -> Tensor:
    """One chunk of `render_faces`."""
    c = Canvas(f, max(size, 32))  # smaller images are averaged, since their pixels are too large
    hair_front, hair_back, hair_shade = _hair(c)
    eyes, mouth, head = c.crop(0.27, 0.62, 0.32), c.crop(0.52, 0.85, 0.2), c.crop(0.12, 0.92, 0.35)
    _glasses(eyes)
    c.paint("hair", c.inside(hair_front), hair_shade)
    _brows(eyes)
    _eyes(eyes)
    _nose(mouth)
    _mouth(mouth)
    _skin(head, hair_front[head.window])
    _body(c, hair_back, hair_shade)
    _background(c)
    image = torch.bmm(make_palette(f).transpose(1, 2), c.weight.flatten(2))
    image = image.reshape(*image.shape[:2], *c.left.shape[1:])
    if size < 32:
        image = F.adaptive_avg_pool2d(image, size)
    image = (image * 255).round_().clamp_(0, 255).to(torch.uint8)
    return image.permute(0, 2, 3, 1)


def render_faces(factors: dict[str, Tensor], *, size: int = 32) -> Tensor:
    """Draws faces from their factors, which may have been edited.

    Arguments:
        factors: Result of `face_factors` for N faces.
        size: Height and width in pixels, a power of two from 8 to 1024.

    Returns:
        Images, uint8 RGB, of shape (N, size, size, 3).

    Raises:
        ValueError: The size is not one of these.
    """
    if size not in SIZES:
        raise ValueError(f"size={size} is not allowed; it must be {', '.join(map(str, SIZES))}")
    count = len(factors["skin"])
    images = factors["skin"].new_empty(count, size, size, 3, dtype=torch.uint8)
    step = max(1, CHUNK // size**2)
    for i in range(0, count, step):
        images[i : i + step] = _draw({k: v[i : i + step] for k, v in factors.items()}, size)
    return images


def draw_faces(index: Tensor, *, seed: int = 0, size: int = 32) -> Tensor:
    """Draws the faces of the given indices, each a pure function of (seed, index).

    Arguments:
        index: Indices of the faces, int64, of shape (N,).
        seed: Seed of the dataset.
        size: Height and width in pixels, a power of two from 8 to 1024; the faces do not depend
            on it.

    Returns:
        Images, uint8 RGB, of shape (N, size, size, 3).

    Raises:
        ValueError: The size is not one of these.
    """
    return render_faces(face_factors(index, seed=seed), size=size)
