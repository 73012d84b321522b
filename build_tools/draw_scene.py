"""Draws the image of `segkernels demo`, a landscape, with its exact labels and rough labels.

    python build_tools/draw_scene.py

Writes segkernels/cli/scene/*.png. The scene is drawn with numpy and Pillow from a fixed seed, at
twice the final size, and then averaged, so that pixels at edges mix colours as in a photograph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]

CLASSES = ("sky", "mountain", "lake", "meadow", "tree", "house", "path")
#: One colour per class, then black for unknown pixels.
COLOURS = (
    (112, 186, 255),
    (150, 128, 176),
    (38, 102, 200),
    (168, 206, 72),
    (24, 122, 62),
    (224, 74, 60),
    (236, 186, 104),
    (0, 0, 0),
)
UNKNOWN = len(CLASSES)

_SKY, _MOUNTAIN, _LAKE, _MEADOW, _TREE, _HOUSE, _PATH = range(len(CLASSES))
_WIDTH, _HEIGHT = 480, 360
_ZOOM = 2
_W, _H = _WIDTH * _ZOOM, _HEIGHT * _ZOOM
_HORIZON = 330  # the far shore: row in the drawing, which has twice the final size


@dataclass(frozen=True)
class Scene:
    """An image with its exact and rough labels."""

    #: (360, 480, 3) uint8.
    image: npt.NDArray[np.uint8]
    #: (360, 480) uint8, the exact class of each pixel.
    truth: npt.NDArray[np.uint8]
    #: (360, 480) uint8, the rough labels; UNKNOWN for unlabelled pixels.
    rough: npt.NDArray[np.uint8]


def draw_scene(seed: int = 7) -> Scene:
    """Draw the landscape; deterministic for a given seed."""
    canvas = _Canvas(np.random.default_rng(seed))
    canvas.sky()
    canvas.mountains()
    canvas.lake()
    canvas.meadow()
    canvas.path()
    canvas.house(560, 452)
    canvas.forest()
    image, truth = canvas.downsample()
    return Scene(image, truth, _paint_roughly(truth, np.random.default_rng(seed + 1)))


class _Canvas:
    """The drawing: colours and labels, drawn from the background to the foreground."""

    def __init__(self, random: np.random.Generator) -> None:
        self.random = random
        self.pixels = np.zeros((_H, _W, 3), np.float32)
        self.labels = np.zeros((_H, _W), np.uint8)
        self.y, self.x = np.mgrid[0:_H, 0:_W].astype(np.float32)

    def put(self, where: Bools, colour: Floats, label: int) -> None:
        self.pixels[where] = np.broadcast_to(colour, self.pixels.shape)[where]
        self.labels[where] = label

    def noise(self, across: int, down: int, octaves: int = 4) -> Floats:
        return _noise(self.random, across, down, octaves)

    def sky(self) -> None:
        height = np.clip(self.y / _HORIZON, 0, 1)[..., None]
        blue, warm = _rgb(88, 142, 208), _rgb(238, 214, 190)
        colour = blue + (warm - blue) * height**1.7
        sun = np.exp(-(((self.x - 250) / 230) ** 2) - ((self.y - 235) / 120) ** 2)
        colour = colour + sun[..., None] * _rgb(34, 20, -8)
        cover = self.noise(5, 7) + 0.35 * self.noise(18, 26) - 0.5 * np.abs(self.y / 130 - 1)
        cloud = np.clip(cover * 0.95 + 0.12, 0, 1)[..., None] * 0.85
        white = _rgb(252, 246, 240) - 26 * np.clip(self.noise(9, 12), 0, 1)[..., None]
        self.put(self.y < _H, colour + (white - colour) * cloud, _SKY)

    def mountains(self) -> None:
        ridges = (
            (205.0, 95.0, _rgb(140, 144, 166), _rgb(172, 174, 188), 3),
            (268.0, 62.0, _rgb(92, 100, 112), _rgb(124, 128, 130), 5),
        )
        for level, relief, shade, light, detail in ridges:
            crest = level - relief * self.noise(detail, 1, 7)[_H // 2]
            rock = self.noise(22, 30, 5) + 0.5 * self.noise(60, 70, 3)
            # Light from the left: the slope of a smooth noise field shades the rock.
            slope = np.gradient(self.noise(14, 7, 6), axis=1) + 0.4 * np.gradient(rock, axis=1)
            faces = 0.5 + 0.5 * np.tanh(14 * slope)
            colour = shade + (light - shade) * faces[..., None] + 7 * rock[..., None]
            haze = np.clip((self.y - crest) / 190, 0, 1)[..., None] * 0.45
            self.put(self.y > crest, colour + (_rgb(196, 196, 204) - colour) * haze, _MOUNTAIN)

    def lake(self) -> None:
        shore = _HORIZON + 5 * self.noise(7, 1, 4)[_H // 2]
        depth = np.clip(self.y - shore, 0, None)
        # A reflection: each row shows the row as far above the shore, displaced by waves.
        waves = self.noise(10, 90, 3) * (1.5 + depth / 22)
        rows = np.clip(shore - 1.35 * depth + 2.5 * waves, 0, _H - 1).astype(int)
        columns = np.clip(self.x + waves, 0, _W - 1).astype(int)
        mirrored = self.pixels[rows, columns]
        deep = _rgb(22, 84, 124)
        colour = mirrored + (deep - mirrored) * np.clip(0.55 + depth / 400, 0, 0.85)[..., None]
        glint = np.clip(self.noise(26, 150, 2) - 0.35, 0, 1)[..., None]
        self.put(self.y > shore, colour + glint * 55, _LAKE)

    def meadow(self) -> None:
        bank = 430 + 26 * self.noise(3, 1, 5)[_H // 2] - 62 * np.exp(-(((self.x - 800) / 300) ** 2))
        bank -= 46 * np.exp(-(((self.x - 40) / 190) ** 2))
        near = np.clip((self.y - bank) / (_H - bank), 0, 1)
        blades = self.noise(110, 50, 3) * (5 + 12 * near) + 13 * self.noise(10, 16, 4)
        far, close = _rgb(170, 190, 96), _rgb(136, 162, 62)
        colour = far + (close - far) * near[..., None] + blades[..., None] * _rgb(1, 1, 0.6)
        self.put(self.y > bank, colour, _MEADOW)
        flowers = (self.noise(240, 180, 1) > 0.93) & (near > 0.25) & (self.y > bank)
        self.put(flowers, _rgb(226, 196, 96) + 0 * colour, _MEADOW)

    def path(self) -> None:
        along = np.clip((self.y - 500) / (_H - 500), 0, 1)
        middle = 600 - 300 * along**1.3 + 46 * np.sin(along * 5.2)
        half = 9 + 50 * along + 5 * self.noise(12, 30, 3)
        gravel = 9 * self.noise(160, 120, 3) + 8 * self.noise(12, 20, 3)
        colour = _rgb(206, 180, 142) + gravel[..., None]
        self.put((np.abs(self.x - middle) < half) & (self.y > 500), colour, _PATH)

    def shadow(self, centre: tuple[float, float], size: tuple[float, float], dark: float) -> None:
        spot = ((self.x - centre[0]) / size[0]) ** 2 + ((self.y - centre[1]) / size[1]) ** 2
        self.pixels *= (1 - dark * np.exp(-(spot**2)))[..., None]

    def house(self, left: int, top: int) -> None:
        self.shadow((left + 128, top + 92), (110, 15), 0.42)
        planks = 4 * np.sin(self.y * 0.9) + 5 * self.noise(40, 40, 3)
        front = _rgb(232, 222, 204) + planks[..., None]
        side = _rgb(190, 178, 164) + planks[..., None]
        tiles = _rgb(168, 66, 48) + (9 * np.sign(np.sin(self.y * 0.75)) * 0.7)[..., None]
        tiles = tiles + 10 * self.noise(70, 40, 3)[..., None]
        brick = _rgb(146, 74, 58) + 10 * self.noise(120, 120, 2)[..., None]
        pane = _rgb(58, 70, 88) + 14 * self.noise(60, 60, 2)[..., None]
        x, y = left, top
        parts = [
            ([(x + 118, y - 62), (x + 118, y - 22), (x + 134, y - 22), (x + 134, y - 62)], brick),
            ([(x, y), (x, y + 92), (x + 70, y + 92), (x + 70, y), (x + 35, y - 44)], front),
            ([(x + 70, y), (x + 70, y + 92), (x + 172, y + 88), (x + 172, y)], side),
            ([(x + 32, y - 51), (x + 75, y + 6), (x + 182, y + 4), (x + 146, y - 49)], tiles),
            ([(x + 38, y - 46), (x + 32, y - 51), (x - 10, y + 6), (x - 2, y + 8)], tiles),
            ([(x + 25, y + 48), (x + 25, y + 92), (x + 46, y + 92), (x + 46, y + 48)], brick),
            ([(x + 26, y + 4), (x + 26, y + 28), (x + 45, y + 28), (x + 45, y + 4)], pane),
            ([(x + 88, y + 30), (x + 88, y + 58), (x + 112, y + 58), (x + 112, y + 30)], pane),
            ([(x + 132, y + 30), (x + 132, y + 57), (x + 156, y + 57), (x + 156, y + 30)], pane),
        ]
        for corners, colour in parts:
            self.put(_polygon(corners), colour, _HOUSE)

    def forest(self) -> None:
        for x, foot, height in ((884, 436, 150), (838, 430, 112), (926, 452, 176)):
            self.conifer(x, foot, height)
        for x, foot, height in ((52, 470, 210), (112, 452, 150), (12, 500, 236)):
            self.conifer(x, foot, height)
        self.broadleaf(300, 560, 96)
        self.broadleaf(872, 648, 128)

    def conifer(self, x: int, foot: int, height: int) -> None:
        self.shadow((x + 30, foot), (height * 0.34, 9), 0.28)
        trunk = _rgb(84, 62, 46) + 8 * self.noise(120, 40, 2)[..., None]
        self.put(
            _polygon([(x - 4, foot - 24), (x - 4, foot), (x + 4, foot), (x + 4, foot - 24)]),
            trunk,
            _TREE,
        )
        needles = 15 * self.noise(130, 110, 3) + 9 * self.noise(30, 40, 3)
        lit = np.clip((x - self.x) / (height * 0.3), -1, 1)[..., None] * _rgb(15, 17, 6)
        colour = _rgb(42, 78, 50) + needles[..., None] * _rgb(0.8, 1, 0.7) + lit
        down = (self.y - (foot - height)) / (height - 16)
        # Tiers of branches: a cone whose width is reset at each tier.
        tier = 0.55 * down + 0.45 * np.mod(down * 6, 1) * (0.25 + 0.75 * down)
        half = height * 0.27 * tier + 3 * self.noise(90, 90, 3) * (down > 0.04)
        self.put((np.abs(self.x - x) < half) & (down > 0) & (down < 1), colour, _TREE)

    def broadleaf(self, x: int, foot: int, size: int) -> None:
        self.shadow((x + 0.35 * size, foot), (size * 0.75, size * 0.11), 0.3)
        trunk = _rgb(98, 74, 54) + 12 * self.noise(160, 30, 2)[..., None]
        wide = size * 0.07
        self.put(
            _polygon(
                [
                    (x - wide, foot - size),
                    (x - 1.4 * wide, foot + 2),
                    (x + 1.4 * wide, foot + 2),
                    (x + wide, foot - size),
                ]
            ),
            trunk,
            _TREE,
        )
        ragged = 0.20 * self.noise(26, 20, 5)
        leaves = 20 * self.noise(100, 80, 3) + 12 * self.noise(34, 28, 3)
        for dx, dy, radius in (
            (0, -1.25, 0.62),
            (-0.5, -0.95, 0.44),
            (0.5, -1.0, 0.46),
            (0.12, -0.75, 0.42),
        ):
            across, down = (self.x - x) / size - dx, (self.y - foot) / size - dy
            inside = np.hypot(across, 1.1 * down) / radius + ragged < 1
            lit = np.clip(-(across + 1.3 * down) / radius, -1, 1)[..., None] * _rgb(24, 24, 9)
            colour = _rgb(62, 94, 42) + leaves[..., None] * _rgb(0.9, 1, 0.6) + lit
            self.put(inside, colour, _TREE)

    def downsample(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        """Average the colours of each block and add camera noise; take its most frequent class."""
        blocks = (_HEIGHT, _ZOOM, _WIDTH, _ZOOM)
        small = self.pixels.reshape(*blocks, 3).mean(axis=(1, 3))
        small += self.random.normal(0, 3.0, small.shape).astype(np.float32)
        shares = [
            (self.labels == label).reshape(blocks).sum(axis=(1, 3)) for label in range(len(CLASSES))
        ]
        return (
            np.clip(small, 0, 255).round().astype(np.uint8),
            np.argmax(shares, axis=0).astype(np.uint8),
        )


def _paint_roughly(
    truth: npt.NDArray[np.uint8], random: np.random.Generator
) -> npt.NDArray[np.uint8]:
    """Make rough labels: outlines smoothed and shifted, with unknown pixels between regions.

    The exact labels are warped by a few pixels and each class mask is blurred. A pixel gets the
    label of the class with the largest value if that value exceeds a threshold, else UNKNOWN.
    """
    rows, columns = np.mgrid[0:_HEIGHT, 0:_WIDTH]
    warp = [8.0 * _noise(random, 9, 7, 2, _WIDTH, _HEIGHT) for _ in range(2)]
    warped = truth[
        np.clip(rows + warp[0], 0, _HEIGHT - 1).astype(int),
        np.clip(columns + warp[1], 0, _WIDTH - 1).astype(int),
    ]
    blobs = np.stack(
        [
            np.asarray(
                Image.fromarray(((warped == label) * 255).astype(np.uint8)).filter(
                    ImageFilter.GaussianBlur(5.0)
                ),
                np.float32,
            )
            for label in range(len(CLASSES))
        ]
    )
    certain = 255 * (0.72 + 0.22 * _noise(random, 8, 6, 2, _WIDTH, _HEIGHT))
    painted: npt.NDArray[np.uint8] = blobs.argmax(axis=0).astype(np.uint8)
    painted[blobs.max(axis=0) < certain] = UNKNOWN
    return painted


def _noise(
    random: np.random.Generator,
    across: int,
    down: int,
    octaves: int,
    width: int = _W,
    height: int = _H,
) -> Floats:
    """Fractal noise from about -1 to 1: random grids of increasing detail, decreasing amplitude."""
    total = np.zeros((height, width), np.float32)
    share = 0.0
    for octave in range(octaves):
        columns, rows = min(across << octave, width), min(down << octave, height)
        grid = random.uniform(-1, 1, (rows + 2, columns + 2)).astype(np.float32)
        fine = Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC)
        total += np.asarray(fine) * 0.5**octave
        share += 0.25**octave
    total /= np.float32(np.sqrt(share) * 0.9)
    return total


def _polygon(corners: Sequence[tuple[float, float]]) -> Bools:
    mask = Image.new("1", (_W, _H))
    ImageDraw.Draw(mask).polygon(corners, fill=1)
    return np.asarray(mask)


def _rgb(red: float, green: float, blue: float) -> Floats:
    return np.array([red, green, blue], np.float32)


def main() -> None:
    """Write the image and the two label maps."""
    folder = Path(__file__).resolve().parent.parent / "segkernels" / "cli" / "scene"
    scene = draw_scene()
    palette = [value for colour in COLOURS for value in colour]
    for name, pixels in (
        ("image", scene.image),
        ("labels", scene.rough),
        ("truth", scene.truth),
    ):
        output = Image.fromarray(pixels)
        if name != "image":
            output.putpalette(palette)
        output.save(folder / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
