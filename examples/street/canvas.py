"""Camera, light and a canvas that draws image, labels and depth together.

World: metres; x to the right, y up, z forwards along the street; the camera stands at (0, height, 0). Everything is
drawn at `SCALE` times the wanted size. The picture is the mean over each SCALE×SCALE cell and the label is the one at
the cell's centre, so a label is exactly the class of what is seen there.
"""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np
import numpy.typing as npt

SCALE = 3
NEAR = 0.6
"""Metres; whatever is nearer to the camera than this is cut off."""

SKY, BUILDING, POLE, ROAD, PAVEMENT, TREE, SIGN, FENCE, CAR, PEDESTRIAN, BICYCLIST = range(11)
IGNORE = 255

Array = npt.NDArray[np.float32]
Colour = tuple[float, float, float]
"""BGR, 0..255."""
Point = tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class Light:
    """One lighting of a scene; colours BGR, factors around 1."""

    name: str
    zenith: Colour
    horizon: Colour
    sun: Point  # towards the sun
    direct: float
    ambient: float
    tint: Colour
    haze: float  # visibility, metres
    clouds: float  # 0..1
    windows: float  # share of lit windows


LIGHTS = (
    Light("noon", (205, 140, 75), (240, 220, 195), (0.45, 0.8, -0.35), 0.60, 0.55, (1.0, 1.0, 1.0), 380, 0.45, 0.0),
    Light(
        "morning", (215, 165, 115), (205, 225, 248), (-0.8, 0.38, -0.2), 0.62, 0.48, (0.86, 0.97, 1.07), 200, 0.3, 0.05
    ),
    Light("overcast", (205, 200, 195), (228, 226, 224), (0.1, 1.0, -0.1), 0.10, 0.86, (1.02, 1.0, 0.97), 190, 1.0, 0.1),
    Light(
        "evening", (150, 105, 80), (120, 175, 245), (0.85, 0.25, -0.1), 0.42, 0.44, (0.78, 0.92, 1.12), 170, 0.5, 0.35
    ),
    Light("fog", (215, 214, 212), (220, 219, 218), (0.2, 1.0, -0.3), 0.05, 0.86, (1.0, 1.0, 1.0), 48, 1.0, 0.2),
    Light("dusk", (92, 58, 40), (120, 100, 98), (-0.3, 0.5, -0.7), 0.06, 0.46, (1.18, 0.98, 0.86), 160, 0.5, 0.55),
)


@dataclasses.dataclass(frozen=True)
class Camera:
    """Pinhole camera over a street whose centre line is ``x = bend·z²``."""

    height: float
    pitch: float  # radians, downwards positive
    yaw: float
    focal: float  # in image widths
    bend: float


def noise(rng: np.random.Generator, size: int = 256, octaves: int = 5) -> Array:
    """Tileable fractal noise, size×size, mean 0, about -1..1."""
    total = np.zeros((size, size), np.float32)
    for octave in range(octaves):
        cells = 4 << octave
        coarse = np.pad(rng.standard_normal((cells, cells)).astype(np.float32), 2, mode="wrap")
        step = size // cells
        fine = cv2.resize(coarse, None, fx=step, fy=step, interpolation=cv2.INTER_CUBIC)
        total += fine[2 * step : 2 * step + size, 2 * step : 2 * step + size] * 0.6**octave
    return (total / (2.2 * total.std())).astype(np.float32)


def tile(texture: Array, rows: Array, columns: Array) -> Array:
    """Looks a tileable texture up at coordinates in its pixels, bilinearly, repeating."""
    size = np.float32(texture.shape[0])
    padded = np.pad(texture, ((0, 1), (0, 1)), mode="wrap")
    return cv2.remap(padded, np.mod(columns, size), np.mod(rows, size), cv2.INTER_LINEAR).astype(np.float32)


class Canvas:
    """Image (BGR float32, 0..255), labels and depth of one frame, drawn from far to near."""

    def __init__(self, height: int, width: int, camera: Camera, light: Light, rng: np.random.Generator) -> None:
        self.size = (height * SCALE, width * SCALE)
        self.camera, self.light, self.rng = camera, light, rng
        self.image = np.zeros((*self.size, 3), np.float32)
        self.labels = np.full(self.size, IGNORE, np.uint8)
        self.depth = np.full(self.size, 1e4, np.float32)
        self.shadow = np.zeros(self.size, np.uint8)
        self.focal = camera.focal * self.size[1]
        cp, sp, cy, sy = np.cos(camera.pitch), np.sin(camera.pitch), np.cos(camera.yaw), np.sin(camera.yaw)
        yaw = np.array([[cy, 0, -sy], [0, 1, 0], [sy, 0, cy]])
        self.rotation = np.array([[1, 0, 0], [0, cp, sp], [0, -sp, cp]]) @ yaw  # world -> right, up, forwards
        sun = np.array(light.sun)
        self.sun = sun / np.linalg.norm(sun)

    # ---- geometry

    def view(self, points: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """World points M×3 -> camera coordinates M×3 (right, up, forwards)."""
        points = np.array(points, np.float64).reshape(-1, 3)
        points[:, 0] += self.camera.bend * points[:, 2] ** 2
        points[:, 1] -= self.camera.height
        return points @ self.rotation.T

    def screen(self, view: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Camera coordinates -> pixels (x, y) of the large canvas."""
        scale = self.focal / view[:, 2]
        return np.stack([self.size[1] / 2 + view[:, 0] * scale, self.size[0] / 2 - view[:, 1] * scale], 1)

    def ground(self) -> tuple[Array, Array, npt.NDArray[np.bool_]]:
        """For every pixel: x (bend taken out) and z of the ground there, and whether it sees ground at all."""
        rows, columns = np.mgrid[: self.size[0], : self.size[1]]
        rays = np.stack([columns + 0.5 - self.size[1] / 2, self.size[0] / 2 - rows - 0.5], -1) / self.focal
        rays = np.concatenate([rays, np.ones((*self.size, 1))], -1) @ self.rotation
        below = rays[..., 1] < -0.004
        reach = np.where(below, -self.camera.height / np.where(below, rays[..., 1], -1), 0)
        z = rays[..., 2] * reach
        x = rays[..., 0] * reach - self.camera.bend * z**2
        return x.astype(np.float32), z.astype(np.float32), below

    def lit(self, colour: npt.ArrayLike, normal: Point | None = None) -> Colour:
        """A surface's colour under the scene's light; without a normal it is lit from everywhere."""
        facing = 0.6 if normal is None else max(0.0, float(np.dot(normal, self.sun)))
        b, g, r = np.asarray(colour, np.float64) * (self.light.ambient + self.light.direct * facing)
        return float(b), float(g), float(r)

    # ---- drawing

    def polygon(self, points: npt.ArrayLike, colour: Colour, label: int) -> None:
        """A flat convex polygon in world coordinates."""
        view = _clip(self.view(points))
        if len(view) >= 3:
            pixels, z = _fixed(self.screen(view)), float(view[:, 2].mean())
            for target, value in ((self.image, colour), (self.labels, label), (self.depth, z)):
                cv2.fillConvexPoly(target, pixels, value, cv2.LINE_8, 4)

    def faces(self, points: npt.ArrayLike) -> bool:
        """Whether a polygon, counter-clockwise seen from its outside, shows us that side."""
        view = _clip(self.view(points))
        return len(view) >= 3 and cv2.contourArea(self.screen(view).astype(np.float32), oriented=True) < 0

    def darken(self, points: npt.ArrayLike, factor: float) -> None:
        """Multiplies the picture inside a polygon; label and depth stay."""
        view = _clip(self.view(points))
        if len(view) >= 3:
            pixels = self.screen(view)
            low, extent = self._window(pixels)
            area = np.zeros(extent[::-1], np.uint8)
            cv2.fillConvexPoly(area, _fixed(pixels - low), 1, cv2.LINE_8, 4)
            self.image[low[1] : low[1] + extent[1], low[0] : low[0] + extent[0]][area.astype(bool)] *= factor

    def disc(self, centre: Point, radius: float, colour: Colour, label: int) -> None:
        """A disc of `radius` metres that faces the camera."""
        self.discs(np.array([centre]), np.array([radius]), np.array([colour]), label)

    def discs(self, centres: npt.ArrayLike, radii: npt.ArrayLike, colours: npt.ArrayLike, label: int) -> None:
        """Discs that face the camera, drawn in the given order: M×3, M, M×3."""
        view = self.view(centres)
        depths = np.maximum(view[:, 2], NEAR)
        where = (self.screen(np.column_stack([view[:, :2], depths])) * 16).round().clip(-6e5, 6e5).astype(int).tolist()
        sizes = np.maximum(8, np.asarray(radii) * self.focal / depths * 16).round().astype(int).tolist()
        tones = np.asarray(colours, np.float64).tolist()
        for at, size, tone, z, seen in zip(where, sizes, tones, depths.tolist(), view[:, 2] > NEAR, strict=True):
            if seen:
                cv2.circle(self.image, at, size, tone, -1, cv2.LINE_8, 4)
                cv2.circle(self.labels, at, size, label, -1, cv2.LINE_8, 4)
                cv2.circle(self.depth, at, size, z, -1, cv2.LINE_8, 4)

    def limb(self, start: Point, end: Point, radius: float, colour: Colour, label: int) -> None:
        """A capsule of `radius` metres from one world point to another."""
        view = self.view([start, end])
        if view[:, 2].min() > NEAR:
            pixels = max(1, round(2 * radius * self.focal / view[:, 2].mean()))
            a, b = (tuple(int(v) for v in p) for p in np.clip(self.screen(view), -3e4, 3e4).round())
            for target, value in ((self.image, colour), (self.labels, label), (self.depth, float(view[:, 2].mean()))):
                cv2.line(target, a, b, value, pixels)

    def picture(self, corners: npt.ArrayLike, texture: Array, label: int) -> None:
        """A texture h×w×3 on a quad; corners: top left, top right, bottom right, bottom left, all before the camera."""
        view = self.view(corners)
        if view[:, 2].min() < NEAR:
            return
        target = self.screen(view)
        h, w = texture.shape[:2]
        source = np.array([[0, 0], [w, 0], [w, h], [0, h]], np.float32)
        low, extent = self._window(target)
        if min(extent) < 1:
            return
        matrix = cv2.getPerspectiveTransform(source, (target - low).astype(np.float32))
        area = np.zeros(extent[::-1], np.uint8)
        cv2.fillConvexPoly(area, _fixed(target - low), 1, cv2.LINE_8, 4)
        inside = area.astype(bool)
        warped = cv2.warpPerspective(texture, matrix, extent, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        window = np.s_[low[1] : low[1] + extent[1], low[0] : low[0] + extent[0]]
        self.image[window][inside] = warped[inside]
        self.labels[window][inside] = label
        self.depth[window][inside] = _depth_on(target - low, view[:, 2], extent)[inside]

    def cast(self, points: npt.ArrayLike) -> None:
        """Adds the ground shadow of a convex body, given by its corners."""
        points = np.array(points, np.float64).reshape(-1, 3)
        slope = self.sun[[0, 2]] / max(self.sun[1], 0.15)
        flat = points.copy()
        flat[:, [0, 2]] -= points[:, 1:2] * slope
        flat[:, 1] = 0
        hull = cv2.convexHull(flat[:, [0, 2]].astype(np.float32))[:, 0]
        view = _clip(self.view(np.stack([hull[:, 0], np.zeros(len(hull)), hull[:, 1]], 1)))
        if len(view) >= 3:
            cv2.fillPoly(self.shadow, [_fixed(self.screen(view))], 255, cv2.LINE_8, 4)

    def _window(self, pixels: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.int64], tuple[int, int]]:
        """The part of the canvas round some pixels: its upper left corner, and its width and height."""
        low = np.clip(np.floor(pixels.min(0)), 0, self.size[::-1]).astype(np.int64)
        high = np.clip(np.ceil(pixels.max(0)), 0, self.size[::-1]).astype(np.int64)
        return low, (int(high[0] - low[0]), int(high[1] - low[1]))

    # ---- the finished frame

    def finish(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        """Haze, camera response and noise; returns image uint8 H×W×3 (BGR) and labels uint8 H×W."""
        light, rng = self.light, self.rng
        haze = np.exp(-self.depth / light.haze)[..., None]
        haze[self.labels == SKY] = 1
        image = self.image * haze + np.array(light.horizon, np.float32) * (1 - haze)
        height, width = (n // SCALE for n in self.size)
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA) * np.array(light.tint, np.float32)
        glow = cv2.GaussianBlur(np.maximum(image - 215, 0), (0, 0), width / 60)
        y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
        vignette = (1 - 0.13 * (x**2 + y**2))[..., None]
        image = np.clip((image + 0.6 * glow) * vignette * rng.uniform(0.95, 1.05), 0, 300)
        image = 255 * np.tanh(image / 255 * 1.15) / np.tanh(1.15)  # a camera's soft shoulder
        image = cv2.GaussianBlur(image, (0, 0), 0.45)
        grain = rng.standard_normal((height, width, 1)) * 2.2 + rng.standard_normal((height, width, 3)) * 1.4
        centre = self.labels[SCALE // 2 :: SCALE, SCALE // 2 :: SCALE]
        return np.clip(image + grain, 0, 255).round().astype(np.uint8), centre[:height, :width].copy()


def _fixed(pixels: npt.NDArray[np.float64]) -> npt.NDArray[np.int32]:
    """Pixels in the fixed-point form (4 fractional bits) of OpenCV's fills; pixel centres are whole numbers there."""
    return np.clip((pixels - 0.5) * 16, -(2**27), 2**27).round().astype(np.int32)


def _clip(view: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Cuts a polygon in camera coordinates at the near plane (Sutherland and Hodgman 1974)."""
    if view[:, 2].min() >= NEAR:
        return view
    kept = []
    for a, b in zip(view, np.roll(view, -1, 0), strict=True):
        if a[2] >= NEAR:
            kept.append(a)
        if (a[2] >= NEAR) != (b[2] >= NEAR):
            kept.append(a + (b - a) * (NEAR - a[2]) / (b[2] - a[2]))
    return np.array(kept).reshape(-1, 3)


def _depth_on(corners: npt.NDArray[np.float64], depths: npt.NDArray[np.float64], extent: tuple[int, int]) -> Array:
    """Depth over a planar quad: 1/z is linear on the screen, so a plane through three corners gives it."""
    plane = np.linalg.lstsq(np.column_stack([corners, np.ones(4)]), 1 / depths, rcond=None)[0]
    rows, columns = np.mgrid[: extent[1], : extent[0]]
    inverse = plane[0] * columns + plane[1] * rows + plane[2]
    return (1 / np.maximum(inverse, 1e-4)).astype(np.float32)
