"""Street scenes with all 19 Cityscapes classes in about their natural shares."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data.scenes.canvas import Canvas, Point
from data.scenes.street_things import (
    draw_person,
    draw_pole,
    draw_two_wheeler,
    draw_vehicle,
)

# How many of each stand on the street, relative to each other.
_FREQUENCIES = {
    "car": 3,
    "truck": 1,
    "bus": 1,
    "train": 1,
    "person": 4,
    "bicycle": 1,
    "motorcycle": 1,
    "ridden bicycle": 2,
    "ridden motorcycle": 2,
    "pole": 2,
    "traffic light": 3,
    "traffic sign": 3,
}


@dataclass(frozen=True)
class Ground:
    """The perspective of a street: everything on it shrinks towards the vanishing point.

    Nearness runs from 0 at the horizon to 1 at the lower edge of the image.
    """

    height: int
    horizon: float
    vanishing_x: float
    road: float  # width at the lower edge, as are the next two
    pavement: float
    verge: float

    def y(self, nearness: float) -> float:
        return self.horizon + (self.height - self.horizon) * nearness


def draw_street(canvas: Canvas) -> None:
    """Paint a street from the sky to the things nearest to the camera."""
    height, width = canvas.height, canvas.width
    ground = Ground(
        height=height,
        horizon=int(height * canvas.uniform(0.34, 0.48)),
        vanishing_x=width * canvas.uniform(0.35, 0.65),
        road=width * canvas.uniform(0.5, 0.95),
        pavement=width * canvas.uniform(0.12, 0.3),
        verge=width * 0.2,
    )
    canvas.rectangle(canvas.new("sky"), 0, 0, width, height)
    _draw_skyline(canvas, ground)
    for _ in range(canvas.random.integers(2, 6)):
        _draw_tree(canvas, ground)
    _draw_ground(canvas, ground)
    for side in (-1, 1):
        if canvas.chance(0.6):
            _draw_barrier(canvas, ground, side)
    _draw_things(canvas, ground)
    if canvas.chance(0.5):
        hood_x = width * canvas.uniform(0.2, 0.8)
        canvas.ellipse(canvas.new("void"), hood_x, height * 1.06, width * 0.35, height * 0.12)


def _draw_skyline(canvas: Canvas, ground: Ground) -> None:
    x = -canvas.uniform(0, 0.1) * canvas.width
    while x < canvas.width:
        width = canvas.uniform(0.08, 0.28) * canvas.width
        top = ground.horizon * (1 - canvas.uniform(0.08, 0.95))
        if canvas.chance(0.72):
            bottom = ground.horizon + 0.05 * canvas.height
            canvas.rectangle(canvas.new("building"), x, top, x + width, bottom)
        x += width * canvas.uniform(0.6, 1.25)


def _draw_tree(canvas: Canvas, ground: Ground) -> None:
    crown = canvas.new("vegetation")
    radius = canvas.uniform(0.05, 0.14) * canvas.width
    x, y = canvas.uniform(0, canvas.width), ground.horizon - radius * canvas.uniform(0.1, 0.8)
    for _ in range(7):
        canvas.ellipse(
            crown,
            x + canvas.uniform(-0.7, 0.7) * radius,
            y + canvas.uniform(-0.5, 0.6) * radius,
            radius * canvas.uniform(0.35, 0.7),
            radius * canvas.uniform(0.3, 0.6),
        )
    trunk = canvas.new("vegetation", color=(74, 58, 44), texture="asphalt")
    foot = ground.horizon + 0.03 * canvas.height
    canvas.line(trunk, (x, y), (x, foot), max(2, 0.02 * canvas.width))


def _draw_ground(canvas: Canvas, ground: Ground) -> None:
    width, height = canvas.width, canvas.height
    beside = canvas.new("terrain" if canvas.chance(0.55) else "sidewalk")
    canvas.rectangle(beside, 0, ground.horizon, width, height)

    def strip(thing: str, half_far: float, half_near: float) -> None:
        x = ground.vanishing_x
        far, near = ground.horizon, height
        corners = [(x - half_far, far), (x + half_far, far)]
        corners += [(x + half_near, near), (x - half_near, near)]
        canvas.polygon(canvas.new(thing), corners)

    half_road = ground.road / 2
    strip("sidewalk", 0.035 * width, half_road + ground.pavement + ground.verge)
    strip("road", 0.015 * width, half_road + 0.18 * width)
    dash = canvas.new("road", color=(196, 194, 188), texture="flat", contrast=2)
    for k in range(5):
        start, end = ground.y((k / 5) ** 1.5), ground.y(((k + 0.5) / 5) ** 1.5)
        canvas.line(dash, (ground.vanishing_x, start), (ground.vanishing_x, end), 1 + 0.8 * k)


def _draw_barrier(canvas: Canvas, ground: Ground, side: int) -> None:
    """A wall or a fence along the outer edge of the pavement."""
    far, near = sorted(canvas.random.uniform(0.05, 0.9, 2) * 0.7)
    near += 0.05
    reach = ground.road / 2 + ground.pavement + ground.verge

    def foot_and_top(nearness: float) -> tuple[Point, Point]:
        x = ground.vanishing_x + side * (reach * nearness + 0.03 * canvas.width)
        y = ground.y(nearness)
        return (x, y), (x, y - 0.18 * canvas.height * (nearness + 0.12))

    (far_foot, far_top), (near_foot, near_top) = foot_and_top(far), foot_and_top(near)
    thing = "wall" if canvas.chance(0.5) else "fence"
    canvas.polygon(canvas.new(thing), [far_foot, far_top, near_top, near_foot])


def _draw_things(canvas: Canvas, ground: Ground) -> None:
    shares = np.array(list(_FREQUENCIES.values()), dtype=float)
    count = canvas.random.integers(8, 17)
    kinds = canvas.random.choice(list(_FREQUENCIES), size=count, p=shares / shares.sum())
    # Distant things are more frequent than near ones, and are painted first.
    distances = np.sort(canvas.random.uniform(0.04, 1, count) ** 1.3)
    for nearness, kind in zip(distances.tolist(), kinds.tolist(), strict=True):
        _draw_thing(canvas, ground, kind, nearness)


def _draw_thing(canvas: Canvas, ground: Ground, kind: str, nearness: float) -> None:
    y = ground.y(0.06 + 0.9 * nearness)
    size = canvas.height * (0.055 + 0.2 * nearness)
    half_street = ground.road / 2 + ground.pavement
    if kind in ("car", "truck", "bus", "train"):
        offset = canvas.uniform(-0.62, 0.62) * ground.road * (0.1 + nearness)
        draw_vehicle(canvas, kind, ground.vanishing_x + offset, y, size * canvas.uniform(0.7, 1.05))
    elif kind == "person":
        offset = canvas.uniform(-1, 1) * half_street * (0.25 + nearness)
        draw_person(canvas, "person", ground.vanishing_x + offset, y, size * canvas.uniform(1, 1.5))
    elif kind in ("pole", "traffic light", "traffic sign"):
        side = canvas.random.choice([-1, 1])
        reach = ground.road / 2 + ground.pavement * canvas.uniform(0.1, 0.9)
        draw_pole(canvas, kind, ground.vanishing_x + side * reach * (0.18 + nearness), y, size)
    else:
        offset = canvas.uniform(-0.9, 0.9) * half_street * (0.25 + nearness)
        vehicle = kind.removeprefix("ridden ")
        ridden = vehicle != kind
        draw_two_wheeler(canvas, vehicle, ground.vanishing_x + offset, y, 0.85 * size, ridden)
