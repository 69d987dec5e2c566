"""A whole scene: where everything stands, drawn from far to near."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from street.canvas import BUILDING, LIGHTS, TREE, Camera, Canvas
from street.ground import Street, draw_ground, draw_sky
from street.houses import cast_house, draw_house, random_house
from street.things import (
    draw_bicyclist,
    draw_bin,
    draw_car,
    draw_fence,
    draw_lamp,
    draw_person,
    draw_sign,
    draw_tree,
)

END = 130.0
"""Metres; the street's far end."""

Thing = tuple[float, Callable[[], None]]
"""How far away a thing is, and what draws it."""


def render(seed: int, index: int, height: int, width: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """One frame: image uint8 H×W×3 (BGR) and labels uint8 H×W (CamVid's 11 ids, 255 to be ignored).

    The same arguments give the same frame; `index` also chooses the lighting, in turn.
    """
    rng = np.random.default_rng([seed, index])
    aspect = width / height
    camera = Camera(
        height=float(rng.uniform(1.25, 1.6)),
        pitch=float(rng.uniform(-0.02, 0.05)),
        yaw=float(rng.uniform(-0.08, 0.08)),
        focal=float(rng.uniform(0.85, 1.05)) * min(1.0, 4 / 3 / aspect),
        bend=float(rng.uniform(-1.0, 1.0)) * 1.3e-3,
    )
    canvas = Canvas(height, width, camera, LIGHTS[index % len(LIGHTS)], rng)
    street = Street(
        road=float(rng.uniform(3.6, 5.2)),
        pavement=float(rng.uniform(2.2, 3.6)),
        centre_line=("dashed", "dashed", "double", "none")[int(rng.integers(4))],
        side_line=bool(rng.random() < 0.5),
        crossing=float(rng.uniform(9, 22)) if rng.random() < 0.4 else None,
    )
    draw_sky(canvas)
    backdrop = [*_backdrop(canvas, street), *_sides(canvas, street)]  # also casts their shadows
    things = [*_traffic(canvas, street), *_furniture(canvas, street), *_people(canvas, street)]
    draw_ground(canvas, street)
    for group in (backdrop, things):
        for _, draw in sorted(group, key=lambda thing: -thing[0]):
            draw()
    return canvas.finish()


def _backdrop(canvas: Canvas, street: Street) -> Iterator[Thing]:
    """The street's end: houses across it and treetops behind."""
    rng = canvas.rng
    for x in np.arange(-90, 90, 7.0):
        tall, z = float(rng.uniform(6, 13)), END + float(rng.uniform(8, 40))
        if rng.random() < 0.5:
            colour = canvas.lit(rng.uniform(90, 170, 3) * np.array([0.9, 0.96, 1.0]), (0, 0, -1))
            corners = [(x - 5, 0, z), (x + 5, 0, z), (x + 5, tall, z), (x - 5, tall, z)]
            yield z, lambda c=corners, k=colour: canvas.polygon(c, k, BUILDING)
        else:
            blobs = rng.uniform((-5, 0, 0.8), (5, 0.75 * tall, 1.6), (40, 3))
            tones = rng.uniform(0.7, 1.0, 40)
            yield z, lambda x=x, z=z, b=blobs, t=tones: _grove(canvas, x, z, b, t)


def _grove(canvas: Canvas, x: float, z: float, blobs: npt.NDArray[np.float64], tones: npt.NDArray[np.float64]) -> None:
    centres = np.column_stack([x + blobs[:, 0], blobs[:, 1], np.full(len(blobs), z)])
    canvas.discs(centres, blobs[:, 2], tones[:, None] * np.array(canvas.lit((48, 84, 66))), TREE)


def _sides(canvas: Canvas, street: Street) -> Iterator[Thing]:
    """Both sides of the street: houses, and gaps with a fence and trees behind it."""
    rng = canvas.rng
    for side in (-1, 1):
        front = street.road + street.pavement
        near = float(rng.uniform(-14, -4))
        while near < END:
            if rng.random() < 0.28:
                length = float(rng.uniform(8, 20))
                yield from _gap(canvas, side * front, near, near + length)
            else:
                house = random_house(rng, side=side, front=front + float(rng.choice([0, 0, 1.5])), near=near)
                cast_house(canvas, house)
                length = house.far - house.near
                yield near, lambda h=house: draw_house(canvas, h)
            near += length


def _gap(canvas: Canvas, x: float, near: float, far: float) -> Iterator[Thing]:
    rng = canvas.rng
    side = np.sign(x)
    for z in np.arange(near + 1, far, 3.5):
        tall = float(rng.uniform(5, 9))
        tree_x = float(x + side * rng.uniform(2.5, 6))
        if z > 4:
            canvas.cast([(tree_x + dx, y, z + dz) for dx in (-1.5, 1.5) for y in (2, tall) for dz in (-1.5, 1.5)])
            yield z + 1.0, lambda a=tree_x, b=z, h=tall: draw_tree(canvas, a, b, height=h, spread=2.4)
    low, wooden = float(rng.uniform(1.0, 2.0)), bool(rng.random() < 0.6)
    start = max(near, 1.0)
    if far > start + 1:
        yield near, lambda: draw_fence(canvas, float(x), start, far, height=low, wooden=wooden)


def _traffic(canvas: Canvas, street: Street) -> Iterator[Thing]:
    """Cars in both lanes (traffic keeps left or right, by chance), parked cars, and bicycles."""
    rng = canvas.rng
    keep = 1.0 if rng.random() < 0.5 else -1.0
    lane = street.road * 0.42
    spots = [
        (keep * lane, False, float(rng.uniform(11, 26)), 14.0),
        (-keep * lane, True, float(rng.uniform(8, 30)), 16.0),
    ]
    for x, towards, z, step in spots:
        while z < 95:
            if rng.random() < 0.75:
                yield _car(canvas, x + float(rng.normal(0, 0.15)), z, towards=towards)
            z += step * float(rng.uniform(0.7, 1.9))
    for side in (-1.0, 1.0):
        if rng.random() < 0.65:
            for z in np.arange(float(rng.uniform(5.5, 16)), float(rng.uniform(20, 60)), 5.8):
                if rng.random() < 0.8:
                    yield _car(canvas, side * (street.road - 0.95), float(z), towards=side != keep)
    for _ in range(int(rng.integers(1, 3))):
        x, z = keep * street.road * float(rng.uniform(0.55, 0.8)), float(rng.uniform(7, 19))
        canvas.cast([(x + a, y, z + b) for a in (-0.2, 0.2) for y in (0, 1.7) for b in (-0.6, 0.6)])
        yield z, lambda a=x, b=z: draw_bicyclist(canvas, a, b)


def _car(canvas: Canvas, x: float, z: float, *, towards: bool) -> Thing:
    van = bool(canvas.rng.random() < 0.15)
    tall = 2.0 if van else 1.3
    canvas.cast([(x + a, y, z + b) for a in (-0.8, 0.8) for y in (0, tall) for b in (-2, 1.8)])
    return z, lambda: draw_car(canvas, x, z, towards=towards, van=van)


def _furniture(canvas: Canvas, street: Street) -> Iterator[Thing]:
    """Lamps, signs, traffic lights, street trees, railings and bins, along the kerbs."""
    rng = canvas.rng
    for side in (-1, 1):
        kerb = side * (street.road + 0.45)
        first = float(rng.uniform(6, 20))
        for z in np.arange(first, 100, float(rng.uniform(18, 28))):
            canvas.cast([(kerb + a, y, z) for a in (-0.06, 0.06) for y in (0, 7)])
            yield float(z), lambda x=kerb, z=float(z): draw_lamp(canvas, x, z)
        for z in rng.uniform(7, 45, int(rng.integers(1, 4))):
            kind = ("round", "triangle", "board", "signal")[int(rng.integers(4))]
            yield float(z), lambda x=kerb, z=float(z), k=kind: draw_sign(canvas, x, z, kind=k)
        if rng.random() < 0.5:
            for z in np.arange(float(rng.uniform(9, 16)), 80, float(rng.uniform(9, 14))):
                tall = float(rng.uniform(5, 8))
                canvas.cast([(kerb + dx, y, z + dz) for dx in (-1.3, 1.3) for y in (2, tall) for dz in (-1.3, 1.3)])
                yield float(z), lambda x=kerb, z=float(z), h=tall: draw_tree(canvas, x, z, height=h, spread=h * 0.27)
        if rng.random() < 0.4:
            near = float(rng.uniform(4, 14))
            far = near + float(rng.uniform(5, 12))
            rail = side * (street.road + 0.3)
            yield far, lambda x=rail, a=near, b=far: draw_fence(canvas, x, a, b, height=1.05, wooden=False)
        if rng.random() < 0.5:
            z = float(rng.uniform(6, 25))
            yield z, lambda x=kerb + side * 0.3, z=z: draw_bin(canvas, x, z)
    if street.crossing is not None:
        for side in (-1, 1):
            x, z = side * (street.road + 0.4), street.crossing - 1.4
            yield z, lambda x=x, z=z: draw_sign(canvas, x, z, kind="signal")


def _people(canvas: Canvas, street: Street) -> Iterator[Thing]:
    """People on both pavements, and on the crossing where there is one."""
    rng = canvas.rng
    spots = []
    for side in (-1, 1):
        for z in rng.uniform(6, 40, int(rng.integers(2, 7))):
            spots.append((side * (street.road + float(rng.uniform(0.9, street.pavement - 0.4))), float(z)))
    if street.crossing is not None:
        for x in rng.uniform(-0.9, 0.9, int(rng.integers(1, 4))) * street.road:
            spots.append((float(x), street.crossing + float(rng.uniform(0.6, 2.2))))
    for x, z in spots:
        canvas.cast([(x + dx, y, z) for dx in (-0.2, 0.2) for y in (0, 1.7)])
        yield z, lambda x=x, z=z: draw_person(canvas, x, z)
