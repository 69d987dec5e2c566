"""What a street stands on and under: sky, road, pavement, shadows."""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np

from street.canvas import PAVEMENT, ROAD, SKY, Array, Canvas, noise, tile


@dataclasses.dataclass(frozen=True)
class Street:
    """Widths in metres, and what is painted on the road."""

    road: float  # half the carriageway
    pavement: float
    centre_line: str  # "dashed", "double" or "none"
    side_line: bool
    crossing: float | None  # distance of a zebra crossing


def draw_sky(canvas: Canvas) -> None:
    """A gradient from horizon to zenith, and clouds."""
    height, width = canvas.size
    light = canvas.light
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    rise = np.clip(1.2 - rows / (0.5 * height) * 1.2, 0, 1)[..., None] ** 0.8
    sky = np.array(light.horizon, np.float32) * (1 - rise) + np.array(light.zenith, np.float32) * rise
    above = np.maximum(0.55 * height - rows, 1) / height + 0.12
    cloud = noise(canvas.rng)
    shape = tile(cloud, 22 / above, (columns / width - 0.5) * 30 / above) - 0.9 + 1.5 * light.clouds
    cover = np.clip(shape * 1.3, 0, 1)[..., None] * min(1.0, 0.4 + light.clouds)
    white = np.array(light.horizon, np.float32) * 0.35 + 160 * min(1.0, light.ambient + light.direct)
    shade = 1 - 0.16 * np.clip(tile(cloud, 14 / above + 40, (columns / width - 0.5) * 18 / above), 0, 1)[..., None]
    canvas.image[:] = sky * (1 - cover) + np.minimum(white, 250) * shade * cover
    canvas.labels[:] = SKY


def draw_ground(canvas: Canvas, street: Street) -> None:
    """Asphalt with markings, kerbs and paving stones, then the shadows cast so far."""
    x, z, below = canvas.ground()
    texture = noise(canvas.rng)
    # detail finer than a pixel would alias far away, so it fades with distance
    fine = tile(texture, z * 90, x * 90) * np.exp(-z / 9)
    coarse = tile(texture, z * 6, x * 9) * np.exp(-z / 60)
    side = np.abs(x)
    on_road = side < street.road

    asphalt = 106 + 9 * fine + 9 * coarse
    for track in (-0.62, -0.2, 0.2, 0.62):  # wheels polish the same four lines
        asphalt -= 7 * np.exp(-(((x - track * street.road) / 0.35) ** 2))
    colour = np.stack([asphalt * 1.02, asphalt, asphalt * 0.99], -1)
    _patch(canvas, colour, x, z, street)

    stone = 146 + 8 * fine + 8 * coarse
    joints = ((np.mod(x, 0.7) < 0.035) | (np.mod(z, 0.9) < 0.045)) & (z < 24)
    stone = stone - 30 * joints
    paving = np.stack([stone * 0.93, stone * 0.98, stone * 1.02], -1)
    kerb = (side >= street.road) & (side < street.road + 0.16)
    paving[kerb] = (168, 174, 176)
    gutter = on_road & (side > street.road - 0.22)
    colour[gutter] *= 0.86
    colour[~on_road] = paving[~on_road]

    painted, paint = _markings(x, z, street)
    worn = np.clip(0.88 + 0.25 * coarse + 0.2 * fine, 0.35, 1)[..., None]
    colour = np.where(painted[..., None], colour * (1 - worn) + paint * worn, colour)

    shade = 1 - np.float32(canvas.light.direct / (canvas.light.ambient + 0.75 * canvas.light.direct)) * _soft(canvas)
    level = canvas.light.ambient + canvas.light.direct * 0.75
    canvas.image[below] = (colour * (shade * level)[..., None])[below]
    canvas.labels[below] = np.where(on_road, ROAD, PAVEMENT)[below]
    canvas.depth[below] = np.minimum(z, 1e4)[below]


def contact(canvas: Canvas, x: float, z: float, width: float, length: float) -> None:
    """The dark under a thing that stands on the ground: an ellipse with soft borders, width×length metres."""
    steps = 5
    angle = np.linspace(0, 2 * np.pi, 25)[:-1]
    for step in range(steps):
        grow = 1.12 - 0.12 * step
        ring = [(x + np.cos(a) * width / 2 * grow, 0.0, z + np.sin(a) * length / 2 * grow) for a in angle]
        canvas.darken(ring, 0.84)


def _soft(canvas: Canvas) -> Array:
    return cv2.GaussianBlur(canvas.shadow, (0, 0), canvas.size[1] / 420).astype(np.float32) / 255


def _patch(canvas: Canvas, colour: Array, x: Array, z: Array, street: Street) -> None:
    """Repairs: rectangles of other asphalt, and iron covers."""
    for _ in range(int(canvas.rng.integers(1, 5))):
        at = canvas.rng.uniform(-0.8, 0.8) * street.road
        near, length = canvas.rng.uniform(4, 30), canvas.rng.uniform(1.5, 8)
        wide = canvas.rng.uniform(0.5, 1.4)
        inside = (np.abs(x - at) < wide / 2) & (z > near) & (z < near + length)
        colour[inside] *= canvas.rng.uniform(0.8, 0.93)
    for _ in range(int(canvas.rng.integers(0, 3))):
        at, near = canvas.rng.uniform(-0.7, 0.7) * street.road, canvas.rng.uniform(5, 18)
        colour[np.hypot(x - at, z - near) < 0.33] = (62, 64, 68)


def _markings(x: Array, z: Array, street: Street) -> tuple[np.ndarray, Array]:
    side = np.abs(x)
    white, yellow = np.array([222, 226, 226], np.float32), np.array([92, 190, 222], np.float32)
    painted = np.zeros(x.shape, bool)
    if street.centre_line == "dashed":
        painted |= (side < 0.07) & (np.mod(z, 6) < 3)
    elif street.centre_line == "double":
        painted |= (side > 0.06) & (side < 0.18)
    edge = np.zeros(x.shape, bool)
    if street.side_line:
        edge = ((side > street.road - 0.45) & (side < street.road - 0.37)) | (
            (side > street.road - 0.65) & (side < street.road - 0.57)
        )
    if street.crossing is not None:
        zone = (z > street.crossing - 0.8) & (z < street.crossing + 3.6)
        painted &= ~zone
        edge &= ~zone
        stripes = (z > street.crossing) & (z < street.crossing + 2.8) & (side < street.road - 0.3)
        painted |= stripes & (np.mod(x, 1.1) < 0.55)
        painted |= (z > street.crossing - 1.6) & (z < street.crossing - 1.3) & (x < 0) & (x > -street.road + 0.3)
    return painted | edge, np.where(edge[..., None], yellow, white)
