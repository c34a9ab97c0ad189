"""Rooms with furniture, for the layouts of ADE20K and COCO-Stuff."""

from __future__ import annotations

from dataclasses import dataclass

from data.scenes.canvas import Canvas
from data.scenes.furniture import (
    draw_bed,
    draw_bottle,
    draw_chair,
    draw_lamp,
    draw_plant,
    draw_sofa,
    draw_table,
)
from data.scenes.street_things import draw_person

_FURNITURE = [
    *("bed", "sofa", "table", "table", "chair", "chair", "chair"),
    *("lamp", "lamp", "plant", "person", "bottle"),
]


@dataclass(frozen=True)
class Room:
    """The far wall of a room, in pixels: the rectangle that floor, ceiling and walls lead to."""

    left: float
    right: float
    ceiling: float
    floor: float


def draw_room(canvas: Canvas) -> None:
    """Paint a room from the far wall to the things nearest to the camera."""
    height, width = canvas.height, canvas.width
    room = Room(
        left=width * canvas.uniform(0.08, 0.24),
        right=width * canvas.uniform(0.76, 0.92),
        ceiling=height * canvas.uniform(0.06, 0.2),
        floor=height * canvas.uniform(0.58, 0.74),
    )
    _draw_shell(canvas, room)
    for _ in range(canvas.random.integers(1, 4)):
        _draw_on_wall(canvas, room)
    if canvas.chance(0.6):
        _draw_door(canvas, room)
    if canvas.chance(0.6):
        _draw_cabinet(canvas, room)
    depth = height - room.floor
    if canvas.chance(0.6):
        x, y = canvas.uniform(0.3, 0.7) * width, room.floor + depth * canvas.uniform(0.4, 0.7)
        radii = canvas.uniform(0.15, 0.3) * width, canvas.uniform(0.15, 0.28) * depth
        canvas.ellipse(canvas.new("rug"), x, y, *radii)
    for nearness in sorted(canvas.random.uniform(0.1, 1, canvas.random.integers(3, 8)).tolist()):
        y = room.floor + depth * (0.05 + 0.8 * nearness)
        _draw_furniture(canvas, y, height * (0.14 + 0.16 * nearness))


def _draw_shell(canvas: Canvas, room: Room) -> None:
    height, width = canvas.height, canvas.width
    upper_left, upper_right = (room.left, room.ceiling), (room.right, room.ceiling)
    lower_left, lower_right = (room.left, room.floor), (room.right, room.floor)
    canvas.rectangle(canvas.new("room wall"), 0, 0, width, height)
    canvas.polygon(canvas.new("floor"), [(0, height), lower_left, lower_right, (width, height)])
    canvas.polygon(canvas.new("ceiling"), [(0, 0), upper_left, upper_right, (width, 0)])
    canvas.polygon(canvas.new("room wall"), [(0, 0), upper_left, lower_left, (0, height)])
    canvas.polygon(canvas.new("room wall"), [(width, 0), upper_right, lower_right, (width, height)])


def _draw_on_wall(canvas: Canvas, room: Room) -> None:
    """A window, a painting or a clock."""
    width = canvas.uniform(0.08, 0.2) * canvas.width
    height = canvas.uniform(0.12, 0.21) * canvas.height
    left = canvas.uniform(room.left, room.right - 0.15 * canvas.width)
    lowest = room.floor - height - 0.1 * canvas.height
    top = canvas.uniform(room.ceiling + 0.06 * canvas.height, lowest)
    kind = canvas.random.choice(["window", "painting", "painting", "clock"])
    if kind == "window":
        _draw_window(canvas, left, top, width, height)
    elif kind == "painting":
        right, bottom = left + 0.8 * width, top + 0.7 * height
        frame = canvas.new("painting", (70, 52, 36), texture="flat", contrast=3)
        canvas.rectangle(frame, left, top, right, bottom)
        canvas.rectangle(canvas.new("painting"), left + 3, top + 3, right - 3, bottom - 3)
    else:
        radius = 0.03 * canvas.width
        canvas.ellipse(canvas.new("clock"), left, top, radius, radius)
        hand = canvas.new("clock", (30, 30, 30), texture="flat")
        canvas.line(hand, (left, top), (left, top - 0.7 * radius), 1)
        canvas.line(hand, (left, top), (left + 0.6 * radius, top), 1)


def _draw_window(canvas: Canvas, left: float, top: float, width: float, height: float) -> None:
    right, bottom = left + width, top + height
    canvas.rectangle(canvas.new("window"), left, top, right, bottom)
    bars = canvas.new("window", (214, 208, 200), texture="flat")
    canvas.line(bars, (left + width / 2, top), (left + width / 2, bottom), 2)
    canvas.line(bars, (left, top + height / 2), (right, top + height / 2), 2)
    if canvas.chance(0.7):
        curtain = canvas.new("curtain")
        for edge in (left - 0.22 * width, right - 0.06 * width):
            canvas.rectangle(
                curtain, edge, top - 0.1 * height, edge + 0.28 * width, bottom + 0.25 * height
            )


def _draw_door(canvas: Canvas, room: Room) -> None:
    height, width = canvas.height, canvas.width
    left = canvas.uniform(room.left, room.right - 0.12 * width)
    top = room.floor - 0.44 * height
    canvas.rectangle(canvas.new("door"), left, top, left + 0.13 * width, room.floor)
    knob = canvas.new("door", (216, 190, 90))
    canvas.ellipse(knob, left + 0.11 * width, room.floor - 0.2 * height, 2, 2)


def _draw_cabinet(canvas: Canvas, room: Room) -> None:
    """A chest of drawers, sometimes with books and bottles on it."""
    left = canvas.uniform(room.left, room.right - 0.2 * canvas.width)
    right = left + canvas.uniform(0.12, 0.22) * canvas.width
    height = canvas.uniform(0.2, 0.44) * canvas.height
    top = room.floor - height
    canvas.rectangle(canvas.new("cabinet"), left, top, right, room.floor + 2)
    gap = canvas.new("cabinet", (70, 50, 34), texture="flat")
    for k in range(1, 4):
        y = room.floor - 0.25 * k * height
        canvas.line(gap, (left, y), (right, y), 1)
    for _ in range(canvas.random.integers(5)):
        x = canvas.uniform(left, right - 0.03 * canvas.width)
        thing = canvas.new(str(canvas.random.choice(["book", "bottle"])))
        width = canvas.uniform(0.012, 0.05) * canvas.width
        canvas.rectangle(thing, x, top - 0.06 * canvas.height, x + width, top)


def _draw_furniture(canvas: Canvas, y: float, size: float) -> None:
    x = canvas.uniform(0.12, 0.88) * canvas.width
    kind = str(canvas.random.choice(_FURNITURE))
    if kind == "person":
        draw_person(canvas, "person", x, y, 1.5 * size)
    else:
        draw = {
            "bed": draw_bed,
            "sofa": draw_sofa,
            "table": draw_table,
            "chair": draw_chair,
            "lamp": draw_lamp,
            "plant": draw_plant,
            "bottle": draw_bottle,
        }[kind]
        draw(canvas, x, y, size)
