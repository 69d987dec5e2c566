"""What stands and moves on a street: cars, people, bicycles, trees, poles, signs, fences."""

from __future__ import annotations

import itertools
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from street.canvas import BICYCLIST, CAR, FENCE, IGNORE, PEDESTRIAN, POLE, SIGN, TREE, Canvas, Colour, Point
from street.ground import contact

Points = npt.NDArray[np.float64]

PAINTS: tuple[Colour, ...] = (
    (205, 208, 210), (150, 154, 156), (48, 48, 50), (92, 66, 40), (48, 44, 168),
    (160, 92, 52), (86, 96, 102), (224, 226, 226), (56, 92, 64), (120, 150, 170),
)  # fmt: skip
CLOTHES: tuple[Colour, ...] = (
    (52, 48, 46), (120, 72, 40), (60, 60, 160), (170, 170, 172),
    (84, 110, 70), (60, 140, 200), (40, 42, 92), (140, 120, 96),
)  # fmt: skip
SKIN: tuple[Colour, ...] = ((150, 178, 224), (96, 130, 182), (58, 80, 120))


def pick(rng: np.random.Generator, colours: tuple[Colour, ...]) -> Colour:
    """One of the colours."""
    return colours[int(rng.integers(len(colours)))]


class Frustum:
    """A body between a lower and an upper rectangle, both level: a box when they are alike.

    Args:
        low: x0, x1, y, z0, z1 of the lower rectangle, metres.
        high: the same of the upper one.
    """

    FACES: ClassVar = {
        "near": ((0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 1, 0)),
        "far": ((1, 0, 1), (0, 0, 1), (0, 1, 1), (1, 1, 1)),
        "left": ((0, 0, 1), (0, 0, 0), (0, 1, 0), (0, 1, 1)),
        "right": ((1, 0, 0), (1, 0, 1), (1, 1, 1), (1, 1, 0)),
        "top": ((0, 1, 0), (1, 1, 0), (1, 1, 1), (0, 1, 1)),
    }
    NORMALS: ClassVar = {"near": (0, 0, -1), "far": (0, 0, 1), "left": (-1, 0, 0), "right": (1, 0, 0), "top": (0, 1, 0)}

    def __init__(self, low: tuple[float, ...], high: tuple[float, ...]) -> None:
        self.levels = (low, high)

    def face(self, name: str) -> Points:
        """The face's four corners: lower left, lower right, upper right, upper left, seen from outside."""
        corners = []
        for right, up, far in self.FACES[name]:
            x0, x1, y, z0, z1 = self.levels[up]
            corners.append((x1 if right else x0, y, z1 if far else z0))
        return np.array(corners)

    def draw(self, canvas: Canvas, colour: Colour, label: int) -> None:
        """Its visible faces, each lit by its direction."""
        for name, normal in self.NORMALS.items():
            corners = self.face(name)
            if canvas.faces(corners):
                canvas.polygon(corners, canvas.lit(colour, normal), label)

    def panel(self, canvas: Canvas, name: str, area: tuple[float, ...], colour: Colour, label: int) -> None:
        """Part of a face, if that is visible. area: left, right, bottom, top as shares 0..1; `colour` is final."""
        a, b, c, d = self.face(name)
        if canvas.faces((a, b, c, d)):
            left, right, bottom, top = area
            corners = [
                (a * (1 - u) + b * u) * (1 - v) + (d * (1 - u) + c * u) * v
                for u, v in ((left, bottom), (right, bottom), (right, top), (left, top))
            ]
            canvas.polygon(corners, colour, label)


def draw_car(canvas: Canvas, x: float, z: float, *, towards: bool, van: bool) -> None:
    """A car whose middle stands at (x, z), facing the camera (`towards`) or away from it."""
    paint = pick(canvas.rng, PAINTS)
    half, length, belt, roof = (0.97, 5.0, 1.12, 2.1) if van else (0.88, 4.2, 0.9, 1.45)
    contact(canvas, x, z, 2 * half + 0.4, length + 0.5)
    z0, z1, inner = z - length / 2, z + length / 2, half - 0.16
    behind, ahead = (0.1, 1.4) if van else (0.35, 1.35)  # how far the cabin stays from the back and the front
    rake = (0.2, 0.75) if van else (0.6, 0.85)
    first, second = (ahead, behind) if towards else (behind, ahead)
    lean = rake[::-1] if towards else rake

    for along in (0.85, length - 0.85):
        for side in (-1, 1):
            tyre = [
                (x + side * half - dx * side, y, z0 + along - 0.3) for dx, y in ((0, 0), (0.2, 0), (0.2, 0.4), (0, 0.4))
            ]
            canvas.polygon(tyre, canvas.lit((22, 22, 24)), CAR)
    skirt = Frustum((x - half, x + half, 0.2, z0, z1), (x - half, x + half, 0.46, z0 - 0.06, z1 + 0.06))
    hull = Frustum((x - half, x + half, 0.42, z0, z1), (x - half + 0.05, x + half - 0.05, belt, z0 + 0.07, z1 - 0.07))
    cabin = Frustum(
        (x - half + 0.06, x + half - 0.06, belt, z0 + first, z1 - second),
        (x - inner + 0.04, x + inner - 0.04, roof, z0 + first + lean[0], z1 - second - lean[1]),
    )
    skirt.draw(canvas, (0.45 * paint[0], 0.45 * paint[1], 0.45 * paint[2]), CAR)
    hull.draw(canvas, paint, CAR)
    _car_ends(canvas, hull, skirt, towards=towards)
    for along in (0.85, length - 0.85):
        for side in (-1, 1):
            if (side > 0) == (x < 0):  # the flank that shows
                _wheel(canvas, x + side * (half + 0.005), z0 + along)
    cabin.draw(canvas, paint, CAR)
    for name, areas in {
        "near": ((0.07, 0.93, 0.1, 0.86),),
        "left": ((0.06, 0.46, 0.1, 0.86), (0.52, 0.94, 0.1, 0.86)),
        "right": ((0.06, 0.46, 0.1, 0.86), (0.52, 0.94, 0.1, 0.86)),
    }.items():
        for area in areas:
            left, right, bottom, top = area
            middle = (bottom + top) / 2
            for part, shine in (((left, right, bottom, middle), 0.16), ((left, right, middle, top), 0.3)):
                b, g, r = (24 + shine * c for c in canvas.light.horizon)
                cabin.panel(canvas, name, part, (b, g, r), CAR)


def _car_ends(canvas: Canvas, hull: Frustum, skirt: Frustum, *, towards: bool) -> None:
    glow = 0.6 + canvas.light.windows
    lamp: Colour = (215 * glow, 232 * glow, 240 * glow) if towards else (38 * glow, 36 * glow, 190 * glow)
    for left in (0.03, 0.79):
        hull.panel(canvas, "near", (left, left + 0.18, 0.45, 0.82), lamp, CAR)
    if towards:
        hull.panel(canvas, "near", (0.26, 0.74, 0.3, 0.66), canvas.lit((38, 38, 40)), CAR)
    plate: Colour = (222, 228, 228) if towards else (110, 205, 225)
    skirt.panel(canvas, "near", (0.35, 0.65, 0.5, 1.0), canvas.lit(plate, (0, 0, -1)), CAR)


def _wheel(canvas: Canvas, x: float, z: float) -> None:
    turn = np.linspace(0, 2 * np.pi, 21)[:-1]
    for radius, colour in ((0.33, (26, 26, 28)), (0.2, (132, 134, 136))):
        ring = [(x, 0.33 + radius * np.sin(a), z + radius * np.cos(a)) for a in turn]
        canvas.polygon(ring, canvas.lit(colour), CAR)


def draw_person(canvas: Canvas, x: float, z: float, *, foot: float = 0.0, label: int = PEDESTRIAN) -> None:
    """Somebody walking across the view; `foot` is the height of the ground there."""
    rng = canvas.rng
    tall = float(rng.uniform(0.88, 1.06))
    coat, trousers, skin = pick(rng, CLOTHES), pick(rng, CLOTHES), pick(rng, SKIN)
    stride, way = float(rng.uniform(0.05, 0.32)), float(rng.choice([-1, 1]))
    if label != BICYCLIST:
        contact(canvas, x, z, 0.6, 0.4)

    def at(side: float, y: float) -> Point:
        return (x + side * way, foot + y * tall, z)

    def limb(a: Point, b: Point, radius: float, colour: Colour, shade: float = 1.0) -> None:
        tone = canvas.lit([shade * c for c in colour])
        canvas.limb(a, b, radius * tall, tone, label)

    knee = stride * 0.6
    limb(at(0.22 * stride, 1.36), at(-stride * 0.9, 0.86), 0.05, coat, 0.75)  # far arm
    limb(at(-0.06, 0.88), at(-knee + 0.08, 0.48), 0.085, trousers, 0.8)
    limb(at(-knee + 0.08, 0.48), at(-stride, 0.07), 0.065, trousers, 0.8)
    limb(at(-stride, 0.05), at(-stride + 0.16, 0.04), 0.045, (30, 32, 36))
    limb(at(0.06, 0.88), at(knee, 0.48), 0.085, trousers)
    limb(at(knee, 0.48), at(stride, 0.07), 0.065, trousers)
    limb(at(stride, 0.05), at(stride + 0.16, 0.04), 0.045, (30, 32, 36))
    limb(at(0, 0.9), at(0.02, 1.32), 0.17, coat)
    limb(at(-0.1, 1.38), at(0.12, 1.38), 0.09, coat)
    limb(at(0.02, 1.36), at(stride * 0.9, 0.9), 0.05, coat, 0.9)
    limb(at(stride * 0.9, 0.88), at(stride * 0.95, 0.84), 0.045, skin)
    _head(canvas, at(0.03, 1.62), 0.115 * tall, skin, label)


def _head(canvas: Canvas, centre: Point, radius: float, skin: Colour, label: int) -> None:
    hair: Colour = ((30, 36, 44), (60, 90, 120), (40, 60, 90), (150, 150, 150))[int(canvas.rng.integers(4))]
    x, y, z = centre
    canvas.limb((x, y - 1.6 * radius, z), centre, radius * 0.5, canvas.lit(skin), label)
    canvas.disc((x, y + 0.03, z), radius * 1.06, canvas.lit(hair), label)
    canvas.disc((x + 0.02, y - 0.02, z), radius * 0.85, canvas.lit(skin), label)


def draw_bicyclist(canvas: Canvas, x: float, z: float) -> None:
    """A rider seen from behind, a little from the side."""
    rng = canvas.rng
    contact(canvas, x, z, 0.7, 1.7)
    coat, trousers, skin, frame = (pick(rng, group) for group in (CLOTHES, CLOTHES, SKIN, PAINTS))
    lean = float(rng.uniform(0.35, 0.7)) * float(rng.choice([-1, 1]))  # how far it is turned out of our direction

    def at(side: float, y: float, along: float) -> Point:
        return (x + side + lean * along, y, z + along * 0.8)

    def limb(a: Point, b: Point, radius: float, colour: Colour) -> None:
        canvas.limb(a, b, radius, canvas.lit(colour), BICYCLIST)

    for hub in (0.52, -0.52):
        turn = np.linspace(0, 2 * np.pi, 17)
        rim = [at(0, 0.34 + 0.33 * np.sin(a), hub + 0.33 * np.cos(a)) for a in turn]
        for a, b in itertools.pairwise(rim):
            limb(a, b, 0.025, (34, 34, 36))
    saddle, bar, crank = at(0, 0.92, -0.22), at(0, 1.02, 0.4), at(0, 0.34, 0.0)
    for a, b in ((saddle, crank), (crank, at(0, 0.8, 0.38)), (at(0, 0.8, -0.16), at(0, 0.8, 0.38)),
                 (at(0, 0.34, -0.52), crank), (at(0, 0.34, -0.52), saddle), (at(0, 0.34, 0.52), bar)):  # fmt: skip
        limb(a, b, 0.022, frame)
    limb(at(-0.22, 1.02, 0.4), at(0.22, 1.02, 0.4), 0.02, (40, 40, 42))
    for side, pedal in ((-0.1, 0.2), (0.1, 0.48)):
        knee = at(side * 1.3, pedal + 0.45, 0.22)
        limb(at(side, 0.95, -0.2), knee, 0.085, trousers)
        limb(knee, at(side, pedal, 0.02), 0.06, trousers)
        limb(at(side, pedal, 0.0), at(side, pedal, 0.14), 0.045, (28, 28, 30))
    for side in (-1, 1):
        limb(at(side * 0.17, 1.42, 0.1), at(side * 0.22, 1.06, 0.38), 0.05, coat)
    limb(at(0, 1.0, -0.22), at(0, 1.4, 0.08), 0.17, coat)
    limb(at(-0.1, 1.42, 0.1), at(0.1, 1.42, 0.1), 0.09, coat)
    _head(canvas, at(0, 1.66, 0.16), 0.12, skin, BICYCLIST)


def draw_tree(canvas: Canvas, x: float, z: float, *, height: float, spread: float) -> None:
    """Trunk, boughs, and a crown of leaf clumps, lighter towards the sun."""
    rng = canvas.rng
    contact(canvas, x, z, 0.7, 0.5)
    bark, leaf = (
        canvas.lit((62, 78, 92)),
        ((38, 84, 62), (34, 92, 84), (48, 78, 54), (42, 96, 100))[int(rng.integers(4))],
    )
    stem = height * 0.42
    for step in range(8):
        a, b = stem * step / 8, stem * (step + 1) / 8
        canvas.limb((x, a, z), (x, b, z), 0.16 - 0.008 * step, bark, TREE)
    middle = np.array([x, height * 0.68, z])
    reach = np.array([spread, height * 0.34, spread])
    for _ in range(5):
        end = middle + reach * rng.uniform(-0.6, 0.6, 3)
        canvas.limb((x, stem * 0.95, z), tuple(end), 0.05, bark, TREE)
    clumps = rng.standard_normal((30, 3))
    clumps *= (rng.uniform(0.35, 0.85, 30) / np.linalg.norm(clumps, axis=1))[:, None]
    # discs of less than a pixel add nothing, so a tree has as many as its size in the picture asks for
    count = int(np.clip(9 * spread * canvas.focal / max(z, 4.0), 150, 3500))
    size = spread * 0.1 * (520 / count) ** 0.4
    leaves = (clumps[rng.integers(30, size=count)] + rng.standard_normal((count, 3)) * 0.16) * reach
    leaves = leaves[np.argsort(-leaves[:, 2])]
    where = leaves / reach
    deep = np.clip(where[:, 1] * 0.35 + (where @ canvas.sun) * 0.45, -0.6, 0.8)
    shade = canvas.light.ambient * (0.85 + 0.3 * where[:, 1]) + canvas.light.direct * (0.5 + deep)
    shade = np.clip(shade, 0.12, 2) * rng.uniform(0.72, 1.28, count)
    radii = rng.uniform(0.7, 1.4, count) * size
    canvas.discs(middle + leaves, radii, 1.15 * shade[:, None] * np.array(leaf), TREE)


def draw_lamp(canvas: Canvas, x: float, z: float) -> None:
    """A street lamp whose arm reaches over the road."""
    metal, arm = canvas.lit((92, 96, 94)), 1.5 if x < 0 else -1.5
    contact(canvas, x, z, 0.5, 0.4)
    canvas.limb((x, 0, z), (x, 1.1, z), 0.1, metal, POLE)
    canvas.limb((x, 1.0, z), (x, 7.2, z), 0.065, metal, POLE)
    canvas.limb((x, 7.2, z), (x + arm, 7.55, z), 0.04, metal, POLE)
    head = (150, 225, 250) if canvas.light.windows > 0.3 else canvas.lit((120, 122, 122))
    canvas.limb((x + arm, 7.52, z), (x + arm * 1.35, 7.52, z), 0.09, head, POLE)


def draw_sign(canvas: Canvas, x: float, z: float, *, kind: str) -> None:
    """A post with a sign: ``round``, ``triangle``, ``board`` or ``signal`` (a traffic light counts as a sign)."""
    rng = canvas.rng
    contact(canvas, x, z, 0.4, 0.3)
    canvas.limb((x, 0, z), (x, 2.35 if kind != "signal" else 2.2, z), 0.045, canvas.lit((128, 130, 130)), POLE)
    red, white, blue = canvas.lit((48, 40, 190)), canvas.lit((228, 230, 232)), canvas.lit((170, 92, 36))
    if kind == "round":
        outer, inner = (red, white) if rng.random() < 0.6 else (white, blue)
        canvas.disc((x, 2.5, z), 0.34, outer, SIGN)
        canvas.disc((x, 2.5, z), 0.25, inner, SIGN)
        canvas.limb((x - 0.12, 2.5, z), (x + 0.12, 2.5, z), 0.045, canvas.lit((40, 40, 42)), SIGN)
    elif kind == "triangle":
        for size, colour in ((0.46, red), (0.28, white)):
            corners = [(x + size * dx, 2.45 + size * dy, z) for dx, dy in ((-0.87, -0.5), (0.87, -0.5), (0, 1))]
            canvas.polygon(corners, colour, SIGN)
        canvas.limb((x, 2.36, z), (x, 2.54, z), 0.035, canvas.lit((40, 40, 42)), SIGN)
    elif kind == "board":
        wide, colour = float(rng.uniform(0.4, 0.8)), (blue, canvas.lit((70, 120, 50)), white)[int(rng.integers(3))]
        _board(canvas, x, z, (wide, 2.1, 2.9), white)
        _board(canvas, x, z, (wide - 0.05, 2.15, 2.85), colour)
        ink = white if colour is not white else canvas.lit((50, 50, 52))
        for row in (2.32, 2.5, 2.68):
            canvas.limb((x - wide * 0.7, row, z), (x + wide * float(rng.uniform(0.1, 0.7)), row, z), 0.035, ink, SIGN)
    else:
        _board(canvas, x, z, (0.2, 2.15, 3.15), canvas.lit((40, 40, 42)))
        lit = int(rng.integers(3))
        for index, (y, colour) in enumerate(((2.97, (50, 50, 235)), (2.65, (60, 190, 240)), (2.33, (110, 220, 70)))):
            b, g, r = colour if index == lit else tuple(0.25 * c for c in colour)
            canvas.disc((x, y, z), 0.11, (b, g, r), SIGN)


def _board(canvas: Canvas, x: float, z: float, area: tuple[float, float, float], colour: Colour) -> None:
    half, low, high = area
    canvas.polygon([(x - half, low, z), (x + half, low, z), (x + half, high, z), (x - half, high, z)], colour, SIGN)


def draw_fence(canvas: Canvas, x: float, near: float, far: float, *, height: float, wooden: bool) -> None:
    """Boards or railings along the street; labelled as one surface, as in CamVid."""
    base: Colour = (70, 104, 132) if wooden else (64, 68, 62)
    pitch, gap = (0.22, 0.1) if wooden else (0.3, 0.42)
    facing = (1.0, 0.0, 0.0) if x < 0 else (-1.0, 0.0, 0.0)
    for z in np.arange(near, far, pitch)[::-1]:
        end = min(z + pitch, far)
        slat = z + pitch * (1 - gap)
        for (a, b), level in (((z, end), 0.55), ((z, min(slat, end)), float(canvas.rng.uniform(0.92, 1.08)))):
            tone = canvas.lit([level * c for c in base], facing)
            canvas.polygon([(x, 0, a), (x, 0, b), (x, height, b), (x, height, a)], tone, FENCE)
    for y in (0.25, height - 0.12):
        tone = canvas.lit([1.1 * c for c in base], facing)
        canvas.polygon([(x, y, near), (x, y, far), (x, y + 0.1, far), (x, y + 0.1, near)], tone, FENCE)


def draw_bin(canvas: Canvas, x: float, z: float) -> None:
    """A litter bin: it belongs to no class, so its label is to be ignored."""
    contact(canvas, x, z, 0.7, 0.6)
    colour: Colour = ((52, 70, 40), (40, 40, 44), (60, 50, 120))[int(canvas.rng.integers(3))]
    shape = (x - 0.24, x + 0.24, 0.0, z - 0.24, z + 0.24)
    Frustum(shape, (x - 0.27, x + 0.27, 0.95, z - 0.27, z + 0.27)).draw(canvas, colour, IGNORE)
    lid = (x - 0.3, x + 0.3, 0.95, z - 0.3, z + 0.3)
    Frustum(lid, (*lid[:2], 1.05, *lid[3:])).draw(canvas, (34, 36, 36), IGNORE)
