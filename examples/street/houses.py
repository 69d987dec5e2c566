"""Buildings: boxes whose faces carry drawn facades, with roofs of three kinds."""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np

from street.canvas import BUILDING, NEAR, Array, Canvas, Colour

WALLS: tuple[Colour, ...] = (
    (92, 112, 158),  # brick
    (82, 98, 132),
    (150, 186, 206),  # sandstone
    (196, 206, 212),  # render
    (138, 150, 158),
    (168, 184, 172),
    (112, 136, 178),
    (176, 196, 222),
)
ROOFS: tuple[Colour, ...] = ((74, 78, 96), (62, 64, 70), (60, 72, 112))
SHOPS: tuple[Colour, ...] = ((60, 50, 150), (110, 70, 40), (60, 110, 60), (40, 40, 46), (60, 150, 190), (150, 140, 130))


@dataclasses.dataclass(frozen=True)
class House:
    """A box along the street: `side` is -1 (left) or 1; metres."""

    side: int
    front: float  # |x| of the face towards the street
    near: float
    far: float
    height: float
    depth: float
    wall: Colour
    roof: Colour
    pitched: bool
    shop: Colour | None
    brick: bool


def random_house(rng: np.random.Generator, *, side: int, front: float, near: float) -> House:
    """A house that starts at distance `near`."""
    length = float(rng.uniform(6, 17))
    floors = int(rng.integers(2, 6))
    index = int(rng.integers(len(WALLS)))
    return House(
        side=side,
        front=front,
        near=near,
        far=near + length,
        height=floors * 3.1 + float(rng.uniform(0.6, 1.4)),
        depth=float(rng.uniform(8, 13)),
        wall=tuple(float(np.clip(c * rng.uniform(0.88, 1.1), 0, 235)) for c in WALLS[index]),
        roof=ROOFS[int(rng.integers(len(ROOFS)))],
        pitched=floors <= 3 and bool(rng.random() < 0.75),
        shop=SHOPS[int(rng.integers(len(SHOPS)))] if rng.random() < 0.5 else None,
        brick=index in (0, 1, 6),
    )


def draw_house(canvas: Canvas, house: House) -> None:
    """End wall, then the face along the street, then the roof."""
    s, x, top = house.side, house.side * house.front, house.height
    back = s * (house.front + house.depth)
    if house.far < NEAR + 1:
        return
    if house.near > 3:
        gable = _facade(canvas, house, house.depth, blind=True) * _level(canvas, (0, 0, -1))
        near = house.near
        corners = [(back, top, near), (x, top, near), (x, 0, near), (back, 0, near)]
        canvas.picture(corners if s < 0 else [corners[i] for i in (1, 0, 3, 2)], gable.astype(np.float32), BUILDING)
    wall = _facade(canvas, house, house.far - house.near, blind=False) * _level(canvas, (-s, 0, 0))
    start = max(house.near, 2.2)  # what is beside or behind the camera is never seen
    cut = int((start - house.near) / (house.far - house.near) * wall.shape[1])
    wall = np.ascontiguousarray(wall[:, cut:], np.float32)
    if s > 0:
        wall = np.ascontiguousarray(wall[:, ::-1])
    ends = (start, house.far) if s < 0 else (house.far, start)
    corners = [(x, top, ends[0]), (x, top, ends[1]), (x, 0, ends[1]), (x, 0, ends[0])]
    canvas.picture(corners, wall, BUILDING)
    _roof(canvas, house, start)


def cast_house(canvas: Canvas, house: House) -> None:
    """The house's shadow on the ground."""
    inner, outer = house.side * house.front, house.side * (house.front + house.depth)
    canvas.cast([(x, y, z) for x in (inner, outer) for y in (0, house.height) for z in (house.near, house.far)])


def _level(canvas: Canvas, normal: tuple[float, float, float]) -> float:
    return canvas.lit((1, 1, 1), normal)[0]


def _roof(canvas: Canvas, house: House, start: float) -> None:
    s, top = house.side, house.height
    x, ridge = s * house.front, s * (house.front + house.depth / 2)
    if house.pitched:
        rise = 3.2
        tone = canvas.lit(house.roof, (-s * 0.6, 0.8, 0))
        for a, b in zip(
            np.linspace(start, house.far, 9)[::-1][1:], np.linspace(start, house.far, 9)[::-1], strict=False
        ):
            canvas.polygon([(x, top, a), (x, top, b), (ridge, top + rise, b), (ridge, top + rise, a)], tone, BUILDING)
        if house.near > 3:
            end = [(x, top, start), (ridge, top + rise, start), (2 * ridge - x, top, start)]
            canvas.polygon(end, canvas.lit(house.wall, (0, 0, -1)), BUILDING)
        _chimney(canvas, house, ridge, top + rise, (start + house.far) / 2)
    else:
        tone = canvas.lit([c * 0.8 for c in house.wall], (-s, 0, 0))
        for a, b in zip(np.linspace(start, house.far, 5)[:-1], np.linspace(start, house.far, 5)[1:], strict=True):
            canvas.polygon([(x, top, a), (x, top, b), (x, top + 0.35, b), (x, top + 0.35, a)], tone, BUILDING)


def _chimney(canvas: Canvas, house: House, x: float, y: float, z: float) -> None:
    if z < 9:
        return
    side = [(x, y - 1, z), (x, y + 1.1, z), (x, y + 1.1, z + 1), (x, y - 1, z + 1)]
    face = [(x - 0.4, y - 1, z), (x + 0.4, y - 1, z), (x + 0.4, y + 1.1, z), (x - 0.4, y + 1.1, z)]
    canvas.polygon(side, canvas.lit((70, 84, 120), (-house.side, 0, 0)), BUILDING)
    canvas.polygon(face, canvas.lit((70, 84, 120), (0, 0, -1)), BUILDING)


def _facade(canvas: Canvas, house: House, length: float, *, blind: bool) -> Array:
    """A wall as a picture seen from the front, its near end at the left."""
    rng = canvas.rng
    scale = float(np.clip(canvas.focal / max(house.near, 5.0), 8, 60))  # pixels a metre
    h, w = max(8, int(house.height * scale)), max(8, int(length * scale))
    wall = np.empty((h, w, 3), np.float32)
    wall[:] = house.wall
    stain = cv2.resize(rng.standard_normal((max(2, h // 40), max(2, w // 40))).astype(np.float32), (w, h))
    wall *= (1 + 0.035 * stain + 0.03 * rng.standard_normal((h, w)).astype(np.float32))[..., None]
    course = round(0.16 * scale)
    if house.brick and course >= 4:
        wall[::course] *= 0.88
        for row in range(0, h, course):
            wall[row : row + course, (row // course % 2) * course :: 2 * course] *= 0.92
    if not blind or rng.random() < 0.4:
        _windows(canvas, house, wall, scale)
    if house.shop is not None and not blind:
        _shop(canvas, house, wall, scale)
    wall[: max(1, int(0.28 * scale))] *= 1.12
    wall[-max(1, int(0.4 * scale)) :] *= 0.8
    return wall


def _windows(canvas: Canvas, house: House, wall: Array, scale: float) -> None:
    rng, light = canvas.rng, canvas.light
    h, w = wall.shape[:2]
    bay, wide, tall = rng.uniform(2.0, 3.2), rng.uniform(0.9, 1.4), rng.uniform(1.3, 1.8)
    bays = max(1, int(w / scale / bay))
    frame: Colour = (225, 228, 228) if rng.random() < 0.7 else (70, 74, 78)
    for floor in range(1 if house.shop is not None else 0, int(house.height / 3.1)):
        for column in range(bays):
            centre = (column + 0.5) * w / bays
            sill = h - (floor * 3.1 + 0.95) * scale
            box = [int(v) for v in (centre - wide / 2 * scale, sill - tall * scale, centre + wide / 2 * scale, sill)]
            if floor == 0 and column == bays // 2:
                door: Colour = (float(rng.uniform(30, 120)), float(rng.uniform(30, 90)), float(rng.uniform(30, 110)))
                cv2.rectangle(wall, (box[0], int(h - 2.2 * scale)), (box[2], h), frame, -1)
                cv2.rectangle(wall, (box[0] + 2, int(h - 2.1 * scale)), (box[2] - 2, h), door, -1)
                continue
            lit = rng.random() < light.windows
            pane = (120, 205, 250) if lit else tuple(rng.uniform(0.75, 1.1) * c for c in (78, 68, 58))
            edge = max(1, int(0.08 * scale))
            cv2.rectangle(wall, (box[0] - edge, box[1] - edge), (box[2] + edge, box[3] + edge), frame, -1)
            cv2.rectangle(wall, tuple(box[:2]), tuple(box[2:]), pane, -1)
            if not lit:  # the sky's reflection in the upper part
                sky = tuple(0.55 * c for c in light.horizon)
                cut = int(box[1] + (box[3] - box[1]) * rng.uniform(0.2, 0.6))
                cv2.fillConvexPoly(
                    wall, np.array([box[:2], (box[2], box[1]), (box[2], cut - edge), (box[0], cut)]), sky
                )
            if scale > 14:
                middle = (box[0] + box[2]) // 2
                cv2.line(wall, (middle, box[1]), (middle, box[3]), frame, max(1, edge // 2))
                cv2.line(
                    wall, (box[0], (box[1] + box[3]) // 2), (box[2], (box[1] + box[3]) // 2), frame, max(1, edge // 2)
                )
                bottom = (box[2] + 2 * edge, box[3] + 2 * edge)
                cv2.rectangle(wall, (box[0] - 2 * edge, box[3] + edge), bottom, (190, 194, 196), -1)


def _shop(canvas: Canvas, house: House, wall: Array, scale: float) -> None:
    assert house.shop is not None
    rng = canvas.rng
    h, w = wall.shape[:2]
    cv2.rectangle(wall, (0, int(h - 3.4 * scale)), (w, int(h - 2.75 * scale)), house.shop, -1)
    cv2.rectangle(wall, (0, int(h - 2.75 * scale)), (w, h), [0.6 * c for c in house.shop], -1)
    parts = max(1, int(w / scale / 2.6))
    for part in range(parts):
        left, right = int((part + 0.06) * w / parts), int((part + 0.94) * w / parts)
        glow = rng.uniform(0.5, 1.0) * (0.5 + canvas.light.windows)
        glass = (95 * glow + 25, 125 * glow + 25, 150 * glow + 25)
        low = h - (0 if part == parts // 2 else int(0.5 * scale))
        cv2.rectangle(wall, (left, int(h - 2.6 * scale)), (right, low), glass, -1)
        for _ in range(5):  # goods in the window
            x, y = rng.integers(left, max(left + 1, right)), rng.uniform(0.6, 1.5)
            tone = rng.uniform(40, 190, 3).tolist()
            size = (int(rng.uniform(0.1, 0.35) * scale), int(rng.uniform(0.2, 0.6) * scale))
            cv2.rectangle(
                wall, (int(x), int(h - y * scale)), (int(x) + size[0], int(h - y * scale) + size[1]), tone, -1
            )
    x = w * rng.uniform(0.1, 0.5)
    for letter in range(int(rng.integers(5, 11))):  # a name that nobody can read
        at = int(x + letter * 0.42 * scale)
        box = ((at, int(h - 3.22 * scale)), (at + int(0.28 * scale), int(h - 2.93 * scale)))
        cv2.rectangle(wall, *box, (225, 232, 235), max(1, int(0.06 * scale)))
