"""Factors of procedural faces: colours, shapes and pose, from the random numbers of each face."""

__all__ = ["HAIR_STYLES", "face_factors", "hue_to_rgb"]

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion_lab.rng import KeyedGenerator, make_key

# The random numbers of a face. A new one is appended, so that the others keep their values.
UNIFORM = """
    shift_x shift_y scale tilt yaw width jaw chin feminine age tone undertone light_x light_y
    hair_style hair_colour hair_shade volume part hairline length strand_x strand_y
    eye_distance eye_size eye_open eye_tilt eye_colour gaze_x gaze_y brow_height brow_width
    brow_tilt nose_width nose_length smile mouth_open mouth_width lips lip_colour blush
    glasses rim_shape rim_size rim_colour rim_width beard beard_kind beard_length
    neckline neck_depth shoulder cloth_hue cloth_chroma cloth_value
    back_hue back_chroma back_value back_angle back_contrast back_shift blob_x blob_y blob
""".split()

# Colours of skin (from light to dark), hair (the last two are grey and white) and irises, and
# their probabilities for fair, dark and old people.
SKIN = ("f8dbc8", "eec4a8", "dba884", "b67e5a", "855840", "58392c")
HAIR = "1e1919 3a281f 5c3e2b 845e3e c49c64 e0c292 843c24 b66036 848282 cecbc8".split()
HAIR_FAIR = (0.08, 0.17, 0.22, 0.17, 0.16, 0.08, 0.07, 0.05, 0.0, 0.0)
HAIR_DARK = (0.68, 0.26, 0.06, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
HAIR_OLD = (0.12, 0.1, 0.1, 0.08, 0.1, 0.0, 0.0, 0.0, 0.3, 0.2)
IRIS = ("3e261a", "684226", "80683a", "567452", "547ea4", "788c96")
IRIS_FAIR = (0.12, 0.22, 0.14, 0.16, 0.24, 0.12)
IRIS_DARK = (0.72, 0.26, 0.02, 0.0, 0.0, 0.0)

HAIR_STYLES = ("bald", "receding", "crop", "swept", "curly", "bob", "long", "wavy", "bun")
STYLES_MASCULINE = (0.08, 0.12, 0.32, 0.28, 0.1, 0.02, 0.05, 0.03, 0.0)
STYLES_FEMININE = (0.0, 0.0, 0.04, 0.06, 0.14, 0.24, 0.24, 0.18, 0.1)


def hue_to_rgb(hue: Tensor, chroma: Tensor, value: Tensor) -> Tensor:
    """RGB (N, 3) of a hue (in turns) on a smooth colour wheel."""
    wheel = torch.cos(2 * math.pi * (hue[:, None] - torch.arange(3, device=hue.device) / 3))
    return value[:, None] * (1 - chroma[:, None] * (0.5 - 0.5 * wheel))


def _choose(u: Tensor, weights: Tensor) -> Tensor:
    """The category (N,) in which u ~ U[0, 1) falls, for weights (N, K) that sum to 1."""
    return (u[:, None] >= weights.cumsum(1)[:, :-1]).sum(1)


def _rgb(names: Sequence[str], like: Tensor) -> Tensor:
    """Colours (K, 3) in [0, 1] from hexadecimal names."""
    return like.new_tensor([list(bytes.fromhex(name)) for name in names]) / 255


def _mix(first: tuple[float, ...], second: tuple[float, ...], share: Tensor) -> Tensor:
    a, b = share.new_tensor(first), share.new_tensor(second)
    return a + (b - a) * share[:, None]


def face_factors(index: Tensor, *, seed: int = 0) -> dict[str, Tensor]:
    """Returns the factors of each face, for `render_faces`, for labels and for tests.

    Arguments:
        index: Indices of the faces, int64, of shape (N,).
        seed: Seed of the dataset.

    Returns:
        Colours (N, 3) in [0, 1]: skin, hair, iris, lip, rim, cloth, collar, background. Bool (N,):
        glasses, sunglasses, beard, moustache, feminine. Category (N,), int64: hair_style, in
        `HAIR_STYLES`. All others are (N,): fractions in [0, 1), shapes and pose in [-1, 1).
    """
    draw = KeyedGenerator(make_key(seed, "faces", index)).uniform(len(UNIFORM))
    u = dict(zip(UNIFORM, draw.unbind(1), strict=True))
    f = {name: 2 * value - 1 for name, value in u.items()}  # most are symmetric
    f |= {name: u[name] for name in ("age", "tone", "mouth_open", "blush", "blob", "beard_length")}

    f["feminine"] = feminine = u["feminine"] < 0.5
    fair = (1.35 - 2.2 * u["tone"]).clamp(0, 1)  # dark skin comes with dark hair and eyes
    old = (u["age"] > 0.82).float()[:, None]
    hair = _mix(HAIR_DARK, HAIR_FAIR, fair)
    hair = _choose(u["hair_colour"], hair + old * (hair.new_tensor(HAIR_OLD) - hair))
    eyes = _choose(u["eye_colour"], _mix(IRIS_DARK, IRIS_FAIR, fair))
    f["hair_style"] = _choose(
        u["hair_style"], _mix(STYLES_MASCULINE, STYLES_FEMININE, feminine.float())
    )
    f["glasses"] = u["glasses"] < 0.22
    f["sunglasses"] = u["glasses"] < 0.02
    beard = (u["beard"] < 0.4) & ~feminine
    f["moustache"] = beard & (u["beard_kind"] < 0.7)
    f["beard"] = beard & (u["beard_kind"] > 0.2)
    f["smile"] = 1.1 * u["smile"] ** 0.7 - 0.1

    skin = _rgb(SKIN, draw)
    place = u["tone"] * (len(SKIN) - 1)
    low = place.long()
    skin = torch.lerp(skin[low], skin[low + 1], (place - low)[:, None])
    f["skin"] = skin * (1 + 0.035 * f["undertone"][:, None] * draw.new_tensor((1.0, 0.1, -1.4)))
    f["hair"] = _rgb(HAIR, draw)[hair] * (1 + 0.15 * f["hair_shade"][:, None])
    f["iris"] = _rgb(IRIS, draw)[eyes]
    natural = f["skin"] * draw.new_tensor((0.84, 0.6, 0.6))
    made_up = hue_to_rgb(
        0.04 * f["lip_colour"] - 0.02, 0.62 + 0 * place, 0.5 + 0.25 * (1 - u["tone"])
    )
    make_up = (feminine * u["lip_colour"] * 0.8)[:, None]
    f["lip"] = torch.lerp(natural, made_up, make_up)
    f["rim"] = hue_to_rgb(
        u["rim_shape"] * 7, 0.5 * u["rim_width"], 0.08 + 0.3 * u["rim_colour"] ** 2
    )
    f["cloth"] = hue_to_rgb(u["cloth_hue"], 0.65 * u["cloth_chroma"], 0.2 + 0.7 * u["cloth_value"])
    f["collar"] = hue_to_rgb(u["back_shift"], 0.2 * u["cloth_hue"], 0.75 + 0.2 * u["blob"])
    f["background"] = hue_to_rgb(
        u["back_hue"], 0.5 * u["back_chroma"], 0.3 + 0.55 * u["back_value"]
    )
    return f
