"""The world of the mini zoo: eight image tasks, and the captioned images of pre-training.

Every image is [32, 32, 3] uint8. All but the handwritten digits are drawn from a random stream of
their own: the streams of two splits, tasks or seeds never meet. Pre-training sees clean drawings from
`pretrain_world`; the tasks draw similar things another way (clutter, noise, blur, tints, inversion),
so the base knows something about each task, and not enough.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont

SIZE = 32
SPLIT_SIZES = {"train": 8000, "val": 300, "test": 500}
Array = np.ndarray
Rng = np.random.Generator
Color = tuple[int, int, int]

FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSerif", "DejaVuSerif-Bold",
    "DejaVuSansMono", "DejaVuSansMono-Bold", "STIXGeneral", "STIXGeneralBol", "cmss10", "cmtt10",
)  # fmt: skip
COLORS: dict[str, Color] = {
    "red": (214, 48, 49), "green": (46, 160, 67), "blue": (40, 90, 200), "yellow": (240, 200, 40),
    "orange": (240, 130, 30), "purple": (130, 60, 170), "pink": (240, 130, 180),
    "brown": (130, 85, 50), "black": (20, 20, 20), "white": (240, 240, 240),
    "gray": (128, 128, 128), "cyan": (60, 190, 200),
}  # fmt: skip
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LETTERS = tuple("ABCDEFGHIJ")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "crescent", "heart")
TEXTURES = (
    "horizontal stripes", "vertical stripes", "diagonal stripes", "checkerboard", "polka dots",
    "bricks", "waves", "speckles",
)  # fmt: skip
AERIAL = (
    "forest", "farmland", "river", "highway", "residential area", "coastline", "desert",
    "parking lot",
)  # fmt: skip
SIGNS = (
    "stop", "yield", "no entry", "turn left", "turn right", "go straight", "parking",
    "warning", "speed limit",
)  # fmt: skip
SCENES = (
    "beach", "mountains", "city skyline", "night sky", "sunset", "snowy field", "road", "waterfall",
)  # fmt: skip


# ---- Drawing -------------------------------------------------------------------------------------


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    return ImageFont.truetype(str(folder / f"{name}.ttf"), size)


def _pick(rng: Rng, items: tuple) -> object:
    return items[rng.integers(len(items))]


def _jitter(rng: Rng, color: Color, amount: float) -> Color:
    return tuple(int(np.clip(c + rng.uniform(-amount, amount), 0, 255)) for c in color)


def _two_colors(rng: Rng, contrast: int = 180) -> tuple[Color, Color]:
    """Two random colours whose channels differ by `contrast` in sum at least."""
    while True:
        a, b = rng.integers(0, 256, (2, 3))
        if abs(a - b).sum() >= contrast:
            return tuple(map(int, a)), tuple(map(int, b))


def _canvas(color: Color) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (SIZE, SIZE), color)
    return image, ImageDraw.Draw(image)


def _glyph(rng: Rng, text: str, size: int, turn: float, shear: float, shift: float) -> Image.Image:
    """Mask [32, 32] of one character, turned, sheared and shifted at random."""
    mask = Image.new("L", (64, 64), 0)
    font = _font(str(_pick(rng, FONTS)), size)
    ImageDraw.Draw(mask).text((32, 32), text, fill=255, font=font, anchor="mm")
    angle, lean = np.deg2rad(rng.uniform(-turn, turn)), rng.uniform(-shear, shear)
    cos, sin = np.cos(angle), np.sin(angle)
    a, b, c, d = cos, -sin + lean, sin, cos
    x, y = rng.uniform(-shift, shift, 2)
    offsets = 32 - a * (16 + x) - b * (16 + y), 32 - c * (16 + x) - d * (16 + y)
    return mask.transform(
        (SIZE, SIZE), Image.Transform.AFFINE, (a, b, offsets[0], c, d, offsets[1]),
        Image.Resampling.BILINEAR,
    )  # fmt: skip


def _star(x: float, y: float, r: float, points: int, inner: float, turn: float) -> list:
    angles = turn + np.pi * np.arange(2 * points) / points - np.pi / 2
    radii = np.where(np.arange(2 * points) % 2 == 0, r, inner * r)
    return list(zip(x + radii * np.cos(angles), y + radii * np.sin(angles), strict=True))


def _polygon(x: float, y: float, r: float, sides: int, turn: float) -> list:
    angles = turn + 2 * np.pi * np.arange(sides) / sides - np.pi / 2
    return list(zip(x + r * np.cos(angles), y + r * np.sin(angles), strict=True))


def _shape(
    draw: ImageDraw.ImageDraw, rng: Rng, kind: str, r: float, ink: Color, paper: Color
) -> None:
    x, y = 16 + rng.uniform(-3, 3, 2)
    turn = rng.uniform(-0.25, 0.25)
    box = (x - r, y - r, x + r, y + r)
    if kind == "circle":
        draw.ellipse(box, fill=ink)
    elif kind == "square":
        draw.polygon(_polygon(x, y, 1.25 * r, 4, turn + np.pi / 4), fill=ink)
    elif kind == "triangle":
        draw.polygon(_polygon(x, y, 1.2 * r, 3, turn), fill=ink)
    elif kind == "star":
        draw.polygon(_star(x, y, 1.25 * r, 5, 0.42, turn), fill=ink)
    elif kind == "cross":
        draw.polygon(_cross(x, y, 1.1 * r, 0.36 * r, turn), fill=ink)
    elif kind == "ring":
        draw.ellipse(box, outline=ink, width=max(3, int(0.35 * r)))
    elif kind == "crescent":
        draw.ellipse(box, fill=ink)
        draw.ellipse((x - 0.45 * r, y - 0.95 * r, x + 1.45 * r, y + 0.75 * r), fill=paper)
    elif kind == "heart":
        draw.polygon(_heart(x, y, r), fill=ink)
    elif kind == "hexagon":
        draw.polygon(_polygon(x, y, 1.1 * r, 6, turn), fill=ink)
    else:  # arrow
        draw.polygon([(x - r, y), (x, y - r), (x + r, y)], fill=ink)
        draw.rectangle((x - 0.35 * r, y, x + 0.35 * r, y + r), fill=ink)


def _cross(x: float, y: float, r: float, w: float, turn: float) -> list:
    corners = [(-w, -r), (w, -r), (w, -w), (r, -w), (r, w), (w, w), (w, r), (-w, r), (-w, w),
               (-r, w), (-r, -w), (-w, -w)]  # fmt: skip
    cos, sin = np.cos(turn), np.sin(turn)
    return [(x + cos * a - sin * b, y + sin * a + cos * b) for a, b in corners]


def _heart(x: float, y: float, r: float) -> list:
    t = np.linspace(0, 2 * np.pi, 24)
    dx = 16 * np.sin(t) ** 3
    dy = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return list(zip(x + dx * r / 15, y + dy * r / 15, strict=True))


def _texture(rng: Rng, kind: str, ink: Color, paper: Color) -> Array:
    """[32, 32, 3] two-colour pattern."""
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(float)
    period, phase = rng.uniform(5, 9), rng.uniform(0, 9, 2)
    x, y = x + phase[0], y + phase[1]
    if kind == "horizontal stripes":
        on = np.sin(2 * np.pi * y / period) > 0
    elif kind == "vertical stripes":
        on = np.sin(2 * np.pi * x / period) > 0
    elif kind == "diagonal stripes":
        on = np.sin(2 * np.pi * (x + y) / (1.4 * period)) > 0
    elif kind == "checkerboard":
        on = (np.sin(2 * np.pi * x / (1.5 * period)) > 0) ^ (
            np.sin(2 * np.pi * y / (1.5 * period)) > 0
        )
    elif kind == "polka dots":
        on = np.hypot((x % period) - period / 2, (y % period) - period / 2) < 0.33 * period
    elif kind == "bricks":
        row = np.floor(y / (0.7 * period))
        on = (y % (0.7 * period) > 1.2) & ((x + row * period * 0.7) % (1.4 * period) > 1.2)
    elif kind == "waves":
        on = np.sin(2 * np.pi * (y + 2.5 * np.sin(2 * np.pi * x / 14)) / period) > 0
    elif kind == "speckles":
        on = np.kron(rng.random((16, 16)) < 0.3, np.ones((2, 2))) > 0
    elif kind == "grid":
        on = (x % period < 1.5) | (y % period < 1.5)
    else:  # rings
        on = np.sin(2 * np.pi * np.hypot(x - 16 - phase[0], y - 16 - phase[1]) / period) > 0
    return np.where(on[..., None], ink, paper).astype(float)


def _blobs(rng: Rng, cells: int) -> Array:
    """Smooth random field [32, 32] in 0..1."""
    coarse = Image.fromarray((255 * rng.random((cells, cells))).astype(np.uint8))
    return np.asarray(coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC), float) / 255


def _aerial(rng: Rng, kind: str) -> Image.Image:
    greens = _jitter(rng, (70, 120, 60), 20)
    ground = {"desert": (205, 175, 120), "parking lot": (110, 110, 112), "forest": (35, 85, 40)}
    image, draw = _canvas(_jitter(rng, ground.get(kind, greens), 15))
    side = rng.integers(2)
    if kind == "forest":
        for x, y, r in zip(*rng.uniform(0, SIZE, (2, 60)), rng.uniform(1.5, 3.5, 60), strict=True):
            draw.ellipse((x - r, y - r, x + r, y + r), fill=_jitter(rng, (40, 100, 45), 30))
    elif kind == "farmland":
        for i in range(0, SIZE, 11):
            for j in range(0, SIZE, 11):
                field = _pick(rng, ((160, 160, 70), (110, 150, 60), (190, 160, 90), (80, 120, 50)))
                draw.rectangle((i, j, i + 9, j + 9), fill=_jitter(rng, field, 15))
    elif kind in ("river", "highway"):
        t = np.linspace(-2, SIZE + 2, 18)
        bend = rng.uniform(3, 7) if kind == "river" else rng.uniform(0, 1)
        s = rng.uniform(10, 22) + bend * np.sin(t / rng.uniform(4, 7) + rng.uniform(0, 6))
        path = list(zip(t, s, strict=True)) if side else list(zip(s, t, strict=True))
        if kind == "river":
            draw.line(path, fill=_jitter(rng, (50, 100, 160), 20), width=int(rng.integers(5, 9)))
        else:
            draw.line(path, fill=_jitter(rng, (95, 95, 98), 12), width=9)
            draw.line(path, fill=(235, 225, 170), width=1)
    elif kind == "residential area":
        for i in range(1, SIZE, 8):
            for j in range(1, SIZE, 8):
                roof = _pick(rng, ((170, 80, 60), (150, 100, 80), (190, 110, 90)))
                x, y = i + rng.uniform(0, 1.5), j + rng.uniform(0, 1.5)
                draw.rectangle((x, y, x + 4.5, y + 4.5), fill=_jitter(rng, roof, 20))
    elif kind == "coastline":
        edge = rng.uniform(10, 22) + 3 * np.sin(np.linspace(0, rng.uniform(3, 8), 12))
        t = np.linspace(-1, SIZE, 12)
        for shift, color in ((0, (225, 205, 150)), (4, (40, 110, 170))):
            edge_points = list(zip(t, edge + shift, strict=True))
            area = [*edge_points, (SIZE, SIZE), (0, SIZE)]
            draw.polygon(area if side else [(b, a) for a, b in area], fill=_jitter(rng, color, 15))
    elif kind == "desert":
        for y in range(0, SIZE, 5):
            t = np.linspace(-1, SIZE, 12)
            wave = y + 2 * np.sin(t / 4 + rng.uniform(0, 1.5))
            draw.line(
                list(zip(t, wave, strict=True)), fill=_jitter(rng, (175, 140, 90), 12), width=2
            )
    else:  # parking lot
        for i in range(1, SIZE, 6):
            for j in range(1, SIZE, 11):
                if rng.random() < 0.75:
                    draw.rectangle(
                        (i, j, i + 3, j + 7),
                        fill=_jitter(rng, COLORS[str(_pick(rng, tuple(COLORS)))], 20),
                    )
            draw.line([(i + 4.5, 0), (i + 4.5, SIZE)], fill=(200, 200, 200))
    return image


def _sign(rng: Rng, kind: str, paper: Color) -> Image.Image:
    image, draw = _canvas(paper)
    x, y = 16 + rng.uniform(-2, 2, 2)
    r = rng.uniform(11, 14)
    disc, red = (x - r, y - r, x + r, y + r), _jitter(rng, (205, 30, 40), 18)
    blue, white = _jitter(rng, (30, 80, 180), 18), (240, 240, 240)
    if kind == "stop":
        draw.polygon(_polygon(x, y, 1.08 * r, 8, np.pi / 8), fill=red)
        draw.text((x, y), "ST", fill=white, font=_font("DejaVuSans-Bold", 11), anchor="mm")
    elif kind == "yield":
        draw.polygon(_polygon(x, y - 2, 1.25 * r, 3, np.pi), fill=red)
        draw.polygon(_polygon(x, y - 2, 0.7 * r, 3, np.pi), fill=white)
    elif kind == "no entry":
        draw.ellipse(disc, fill=red)
        draw.rectangle((x - 0.7 * r, y - 0.2 * r, x + 0.7 * r, y + 0.2 * r), fill=white)
    elif kind in ("turn left", "turn right", "go straight"):
        draw.ellipse(disc, fill=blue)
        h = 0.6 * r
        arrow = [(-h, 0), (0, -h), (0, -h / 3), (h, -h / 3), (h, h / 3), (0, h / 3), (0, h)]
        if kind == "turn right":
            arrow = [(-a, b) for a, b in arrow]
        elif kind == "go straight":
            arrow = [(b, a) for a, b in arrow]
        draw.polygon([(x + a, y + b) for a, b in arrow], fill=white)
    elif kind == "parking":
        draw.rectangle(disc, fill=blue)
        draw.text((x, y), "P", fill=white, font=_font("DejaVuSans-Bold", 20), anchor="mm")
    elif kind == "warning":
        draw.polygon(_polygon(x, y, 1.2 * r, 4, 0), fill=_jitter(rng, (245, 195, 30), 15))
        draw.rectangle((x - 1.5, y - 0.55 * r, x + 1.5, y + 0.2 * r), fill=(20, 20, 20))
        draw.rectangle((x - 1.5, y + 0.4 * r, x + 1.5, y + 0.65 * r), fill=(20, 20, 20))
    else:  # speed limit
        draw.ellipse(disc, fill=white, outline=red, width=3)
        number = str(_pick(rng, ("30", "50", "60", "80")))
        draw.text((x, y), number, fill=(20, 20, 20), font=_font("DejaVuSans-Bold", 11), anchor="mm")
    return image


def _gradient(draw: ImageDraw.ImageDraw, top: Color, bottom: Color, height: int) -> None:
    for y in range(height):
        mix = y / max(1, height - 1)
        draw.line(
            [(0, y), (SIZE, y)],
            fill=tuple(int(a + mix * (b - a)) for a, b in zip(top, bottom, strict=True)),
        )


def _scene(rng: Rng, kind: str) -> Image.Image:
    image, draw = _canvas((0, 0, 0))
    horizon = int(rng.integers(14, 21))
    sky = {"night sky": ((8, 10, 35), (25, 30, 70)), "sunset": ((70, 50, 110), (250, 140, 50)),
           "snowy field": ((170, 190, 215), (215, 225, 235))}  # fmt: skip
    top, bottom = sky.get(kind, ((90, 150, 220), (180, 210, 240)))
    _gradient(draw, _jitter(rng, top, 15), _jitter(rng, bottom, 15), SIZE)
    ground = (0, horizon, SIZE, SIZE)
    if kind == "beach":
        draw.rectangle(ground, fill=_jitter(rng, (30, 120, 175), 15))
        draw.rectangle((0, horizon + 6, SIZE, SIZE), fill=_jitter(rng, (230, 205, 150), 15))
    elif kind == "mountains":
        for x in rng.uniform(-2, SIZE, 4):
            h, w = rng.uniform(10, 18), rng.uniform(8, 13)
            peak = horizon + 6 - h
            draw.polygon(
                [(x - w, SIZE - 6), (x, peak), (x + w, SIZE - 6)],
                fill=_jitter(rng, (95, 95, 105), 20),
            )
            draw.polygon(
                [(x - w / 5, peak + 4), (x, peak), (x + w / 5, peak + 4)], fill=(240, 240, 245)
            )
        draw.rectangle((0, SIZE - 6, SIZE, SIZE), fill=_jitter(rng, (70, 120, 60), 15))
    elif kind == "city skyline":
        for x in range(-1, SIZE, 5):
            top_edge = rng.uniform(6, 20)
            draw.rectangle((x, top_edge, x + 4, SIZE), fill=_jitter(rng, (70, 75, 90), 25))
            for w in range(int(top_edge) + 2, SIZE, 4):
                draw.point([(x + 1, w), (x + 3, w)], fill=(250, 230, 140))
    elif kind == "night sky":
        draw.point([tuple(p) for p in rng.uniform(0, SIZE, (30, 2))], fill=(250, 250, 230))
        x, y = rng.uniform(6, 26), rng.uniform(5, 14)
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=(245, 240, 210))
    elif kind == "sunset":
        x = rng.uniform(8, 24)
        draw.ellipse((x - 5, horizon - 6, x + 5, horizon + 4), fill=(255, 225, 120))
        draw.rectangle(ground, fill=_jitter(rng, (50, 35, 70), 15))
    elif kind == "snowy field":
        draw.rectangle(ground, fill=(240, 244, 250))
        for x in rng.uniform(2, 30, 3):
            h = rng.uniform(6, 11)
            draw.polygon(
                [(x - 3, horizon + 4), (x, horizon + 4 - h), (x + 3, horizon + 4)],
                fill=_jitter(rng, (35, 75, 50), 15),
            )
    elif kind == "road":
        draw.rectangle(ground, fill=_jitter(rng, (90, 130, 70), 20))
        x = rng.uniform(13, 19)
        draw.polygon(
            [(x - 1, horizon), (x + 1, horizon), (28, SIZE), (4, SIZE)],
            fill=_jitter(rng, (85, 85, 88), 12),
        )
        draw.line([(x, horizon), (16, SIZE)], fill=(240, 230, 160))
    else:  # waterfall
        draw.rectangle((0, 6, SIZE, SIZE), fill=_jitter(rng, (80, 80, 70), 20))
        x, w = rng.uniform(11, 21), rng.uniform(3, 6)
        draw.rectangle((x - w, 6, x + w, SIZE - 6), fill=(215, 230, 245))
        draw.rectangle((0, SIZE - 6, SIZE, SIZE), fill=_jitter(rng, (60, 120, 170), 15))
    return image


def _camera(
    rng: Rng, image: Image.Image | Array, noise: float = 0, blur: float = 0, tint: float = 0,
    invert: float = 0,
) -> Array:  # fmt: skip
    """What separates a task's pictures from the clean world: blur, tint, inversion, noise."""
    if blur and isinstance(image, Image.Image):
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, blur)))
    pixels = np.asarray(image, float)
    if tint:
        pixels = pixels * rng.uniform(1 - tint, 1, 3) + rng.uniform(-60, 60) * tint
    if invert and rng.random() < invert:
        pixels = 255 - pixels
    if noise:
        pixels = pixels + rng.normal(0, noise, pixels.shape)
    return np.clip(pixels, 0, 255).astype(np.uint8)


# ---- The tasks -----------------------------------------------------------------------------------


def _plate(rng: Rng, label: int, alphabet: tuple[str, ...]) -> Array:
    """One character as on a house, with neighbours left and right."""
    ink, paper = _two_colors(rng, 220)
    image, _ = _canvas(paper)
    middle = rng.uniform(-2.5, 2.5)
    for side in (-21, 21):
        beside = _glyph(rng, alphabet[rng.integers(10)], 28, 8, 0.1, 2)
        image.paste(ink, (int(side + middle), 0), beside)
    mask = _glyph(rng, alphabet[label], int(rng.integers(30, 36)), 10, 0.15, 1.5)
    image.paste(ink, (int(middle), 0), mask)
    return _camera(rng, image, noise=14, blur=0.9, tint=0.2)


def _draw_number(rng: Rng, label: int) -> Array:
    return _plate(rng, label, tuple("0123456789"))


def _draw_letter(rng: Rng, label: int) -> Array:
    ink, paper = (20, 20, 20), (235, 235, 235)
    image, draw = _canvas(paper)
    image.paste(ink, (0, 0), _glyph(rng, LETTERS[label], int(rng.integers(28, 38)), 20, 0.25, 2))
    for _ in range(2):
        draw.line(
            [tuple(p) for p in rng.uniform(0, SIZE, (2, 2))], fill=_pick(rng, (ink, paper)), width=2
        )
    return _camera(rng, image, noise=22, blur=0.8, invert=0.5)


def _draw_shape(rng: Rng, label: int) -> Array:
    ink, paper = _two_colors(rng, 240)
    image, draw = _canvas(paper)
    for _ in range(6):
        color = tuple(map(int, rng.integers(0, 256, 3)))
        draw.line([tuple(p) for p in rng.uniform(0, SIZE, (2, 2))], fill=color, width=1)
    _shape(draw, rng, SHAPES[label], rng.uniform(8, 11.5), ink, paper)
    return _camera(rng, image, noise=25, blur=0.6)


def _draw_texture(rng: Rng, label: int) -> Array:
    ink, paper = _two_colors(rng, 150)
    pixels = _texture(rng, TEXTURES[label], ink, paper)
    light = 0.45 + 0.8 * _blobs(rng, 3)[..., None]
    return _camera(rng, pixels * light, noise=24)


def _draw_aerial(rng: Rng, label: int) -> Array:
    image = _aerial(rng, AERIAL[label])
    haze = 70 * _blobs(rng, 4)[..., None] * np.array([1.0, 1.0, 1.1])
    return _camera(rng, 0.7 * np.asarray(image, float) + haze, noise=10, tint=0.3)


def _draw_sign(rng: Rng, label: int) -> Array:
    image = _sign(rng, SIGNS[label], tuple(map(int, rng.integers(40, 220, 3))))
    dusk = rng.uniform(0.35, 1.0)
    smear = image.filter(ImageFilter.BoxBlur(rng.uniform(0, 1.3)))
    return _camera(rng, dusk * np.asarray(smear, float), noise=12, tint=0.3)


def _draw_scene(rng: Rng, label: int) -> Array:
    image = _scene(rng, SCENES[label])
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = np.asarray(image, float)
    gray = pixels.mean(-1, keepdims=True)
    return _camera(rng, gray + rng.uniform(-0.2, 0.5) * (pixels - gray), noise=16, tint=0.25)


@dataclass(frozen=True)
class Task:
    """One classification task: what its pictures show and how its classes are put into words."""

    name: str
    title: str
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    description: str
    draw: Callable[[Rng, int], Array] | None = None


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("digits", "Digits", DIGITS, ("the digit {}", "a handwritten digit {}"),
             "real handwritten digits: scikit-learn's copy of the UCI optical digits (CC BY 4.0)"),
        Task("numbers", "Numbers", DIGITS, ("the number {}", "a photo of the digit {}"),
             "house numbers with neighbours left and right, blurred and noisy", _draw_number),
        Task("letters", "Letters", LETTERS, ("the letter {}", "a photo of the letter {}"),
             "A to J in many fonts, turned, scratched, half of them inverted", _draw_letter),
        Task("shapes", "Shapes", SHAPES, ("a {}", "a picture of a {}"),
             "shapes over clutter and noise", _draw_shape),
        Task("textures", "Textures", TEXTURES, ("a texture of {}", "a pattern of {}"),
             "two-colour patterns under uneven light", _draw_texture),
        Task("aerial", "Aerial", AERIAL, ("an aerial view of a {}", "a {} from above"),
             "land from above through haze", _draw_aerial),
        Task("signs", "Signs", SIGNS, ("a {} sign", "a traffic sign: {}"),
             "traffic signs at dusk, smeared", _draw_sign),
        Task("scenes", "Scenes", SCENES, ("a scene of a {}", "a photo of a {}"),
             "landscapes with faded colours and grain", _draw_scene),
    )
}  # fmt: skip


def _stream(*names: object) -> Rng:
    """Random stream of its own for every combination of names."""
    return np.random.default_rng([zlib.crc32(str(name).encode()) for name in names])


@cache
def _digits() -> dict[str, tuple[Array, Array]]:
    """scikit-learn's 1,797 digits as 32x32 pictures, split 997 / 300 / 500 at random once and for all."""
    from sklearn.datasets import load_digits

    data = load_digits()
    small = [Image.fromarray((image * 15.9).astype(np.uint8)) for image in data.images]
    big = np.stack([np.asarray(i.resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for i in small])
    images, labels = np.repeat(big[..., None], 3, axis=-1), data.target.astype(np.int64)
    order = _stream("digits", "split").permutation(len(labels))
    parts = dict(zip(("train", "val", "test"), np.split(order, [997, 1297]), strict=True))
    return {split: (images[rows], labels[rows]) for split, rows in parts.items()}


def load(task: str, split: str, n: int | None = None, seed: int = 0) -> tuple[Array, Array]:
    """Images [N, 32, 32, 3] uint8 and labels [N] int64 of one split, the same at every call.

    Args:
        task: name in TASKS. split: "train", "val" or "test".
        n: number of images; None takes SPLIT_SIZES, for `digits` all there are.
        seed: of the drawings of the training split; "val" and "test" are the same for every seed.

    Raises:
        ValueError: unknown task or split, or more digits asked for than there are.
    """
    if task not in TASKS or split not in SPLIT_SIZES:
        raise ValueError(f"no split {split!r} of task {task!r}: see TASKS and SPLIT_SIZES")
    draw = TASKS[task].draw
    if draw is None:
        images, labels = _digits()[split]
        if n is not None and n > len(labels):
            raise ValueError(f"{task} has {len(labels)} {split} images, {n} were asked for")
        return images[:n], labels[:n]
    count = SPLIT_SIZES[split] if n is None else n
    rng = _stream(task, split, seed if split == "train" else 0)
    labels = rng.integers(len(TASKS[task].classes), size=count)
    return np.stack([draw(rng, int(label)) for label in labels]), labels


def load_letter_plates(split: str, n: int = 500) -> tuple[Array, Array]:
    """Letters A to J in the style of `numbers`: a ninth set that no model was trained on."""
    rng = _stream("letter plates", split)
    labels = rng.integers(len(LETTERS), size=n)
    return np.stack([_plate(rng, int(label), LETTERS) for label in labels]), labels


def to_tensor(images: Array) -> torch.Tensor:
    """[N, 32, 32, 3] uint8 -> [N, 3, 32, 32] float32, mean 0 and deviation 1 or so."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1).mul(1.6)


# ---- The world of pre-training -------------------------------------------------------------------


def _caption(rng: Rng, phrases: tuple[str, ...], **words: str) -> str:
    return str(_pick(rng, phrases)).format(**words)


def _world_glyph(rng: Rng) -> tuple[Image.Image, str]:
    names = tuple(COLORS)
    ink, paper = rng.choice(len(names), 2, replace=False)
    image, _ = _canvas(_jitter(rng, COLORS[names[paper]], 15))
    is_digit = rng.random() < 0.55
    text = str(rng.integers(10)) if is_digit else chr(65 + rng.integers(26))
    size = int(rng.integers(18, 34))
    image.paste(_jitter(rng, COLORS[names[ink]], 15), (0, 0), _glyph(rng, text, size, 12, 0.15, 4))
    noun = str(_pick(rng, ("digit", "number"))) if is_digit else "letter"
    word = DIGITS[int(text)] if is_digit else text
    phrases = ("the {noun} {word}", "a photo of the {noun} {word}", "the {noun} {word} in {ink}",
               "a {ink} {noun} {word} on {paper}", "a printed {noun} {word}")  # fmt: skip
    return image, _caption(rng, phrases, noun=noun, word=word, ink=names[ink], paper=names[paper])


def _world_shape(rng: Rng) -> tuple[Image.Image, str]:
    names = tuple(COLORS)
    ink, paper = rng.choice(len(names), 2, replace=False)
    background = _jitter(rng, COLORS[names[paper]], 15)
    image, draw = _canvas(background)
    kind = str(_pick(rng, (*SHAPES, "hexagon", "arrow")))
    _shape(draw, rng, kind, rng.uniform(6, 13), _jitter(rng, COLORS[names[ink]], 15), background)
    phrases = ("a {kind}", "a picture of a {kind}", "a {ink} {kind}", "a {ink} {kind} on {paper}")
    return image, _caption(rng, phrases, kind=kind, ink=names[ink], paper=names[paper])


def _world_texture(rng: Rng) -> tuple[Image.Image, str]:
    names = tuple(COLORS)
    ink, paper = rng.choice(len(names), 2, replace=False)
    kind = str(_pick(rng, (*TEXTURES, "grid", "rings")))
    pixels = _texture(rng, kind, COLORS[names[ink]], COLORS[names[paper]])
    phrases = ("a texture of {kind}", "a pattern of {kind}", "{kind}", "{ink} and {paper} {kind}")
    caption = _caption(rng, phrases, kind=kind, ink=names[ink], paper=names[paper])
    return Image.fromarray(pixels.astype(np.uint8)), caption


def _world_aerial(rng: Rng) -> tuple[Image.Image, str]:
    kind = str(_pick(rng, AERIAL))
    phrases = ("an aerial view of a {kind}", "a {kind} from above", "a satellite image of a {kind}")
    return _aerial(rng, kind), _caption(rng, phrases, kind=kind)


def _world_sign(rng: Rng) -> tuple[Image.Image, str]:
    kind = str(_pick(rng, SIGNS))
    paper = COLORS[str(_pick(rng, ("white", "gray", "cyan", "green")))]
    phrases = ("a {kind} sign", "a traffic sign: {kind}", "a road sign that says {kind}")
    return _sign(rng, kind, _jitter(rng, paper, 15)), _caption(rng, phrases, kind=kind)


def _world_scene(rng: Rng) -> tuple[Image.Image, str]:
    kind = str(_pick(rng, SCENES))
    phrases = ("a scene of a {kind}", "a photo of a {kind}", "a landscape with a {kind}")
    return _scene(rng, kind), _caption(rng, phrases, kind=kind)


_WORLD = (_world_glyph, _world_shape, _world_texture, _world_aerial, _world_sign, _world_scene)
_WORLD_SHARES = (0.48, 0.14, 0.11, 0.08, 0.11, 0.08)


def pretrain_world(n: int, seed: int = 0) -> tuple[Array, list[str]]:
    """Images [n, 32, 32, 3] uint8 and their captions: none of them belongs to a task."""
    rng = _stream("world", seed)
    pairs = [_WORLD[k](rng) for k in rng.choice(len(_WORLD), n, p=_WORLD_SHARES)]
    return np.stack([np.asarray(image) for image, _ in pairs]), [text for _, text in pairs]
