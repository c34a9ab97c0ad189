"""The things on a street. `x` is the middle of a thing, `y` the ground under it, in pixels."""

from __future__ import annotations

from data.scenes.appearance import Color
from data.scenes.canvas import Canvas

# Width and height of each kind as multiples of the size.
_VEHICLES = {"car": (1.9, 0.8), "truck": (2.6, 1.5), "bus": (2.8, 1.5), "train": (3.6, 1.5)}
_PLATES: dict[str, Color] = {
    "car": (220, 220, 220),
    "truck": (230, 190, 40),
    "bus": (60, 170, 70),
    "train": (60, 90, 210),
}
_SIGNALS: list[Color] = [(235, 60, 50), (235, 190, 60), (70, 220, 110)]


def draw_vehicle(canvas: Canvas, kind: str, x: float, y: float, size: float) -> None:
    """A car, truck, bus or train: body, windows, wheels and a small plate in the kind's colour.

    Truck, bus and train share their body colours; windows, wheels and plate tell them apart.
    """
    width, height = (factor * size for factor in _VEHICLES[kind])
    left, right, top = x - width / 2, x + width / 2, y - height
    body = canvas.new(kind)
    glass = canvas.new(kind, canvas.vary((50, 60, 74), 12), texture="flat", contrast=2)

    if kind == "car":
        outline = [(0, 0), (0, 0.5), (0.2, 0.55), (0.32, 1), (0.72, 1), (0.88, 0.55), (1, 0.45)]
        outline.append((1, 0))
        canvas.polygon(body, [(left + u * width, y - v * height) for u, v in outline])
        window = [(0.25, 0.58), (0.35, 0.9), (0.68, 0.9), (0.8, 0.58)]
        canvas.polygon(glass, [(left + u * width, y - v * height) for u, v in window])
    else:
        canvas.rectangle(body, left, top, right, y - 0.08 * height)

    def panel(number: int, u0: float, v0: float, u1: float, v1: float) -> None:
        """A rectangle in fractions of the body, from its upper left corner."""
        canvas.rectangle(
            number, left + u0 * width, top + v0 * height, left + u1 * width, top + v1 * height
        )

    if kind == "truck":
        panel(glass, 0.84, 0.15, 0.97, 0.5)
        panel(canvas.new(kind), 0, 0.02, 0.76, 0.8)
    elif kind == "bus":
        for k in range(6):
            panel(glass, 0.05 + 0.155 * k, 0.14, 0.16 + 0.155 * k, 0.48)
    elif kind == "train":
        panel(glass, 0.02, 0.18, 0.98, 0.45)
        panel(canvas.new(kind, (190, 60, 50)), 0, 0.6, 1, 0.68)

    if kind != "train":
        wheel = canvas.new(kind, (26, 26, 28), texture="flat", contrast=1)
        radius = 0.16 * size + 1
        for u in (0.2, 0.8):
            canvas.ellipse(wheel, left + u * width, y - 0.06 * height, radius, radius)
    plate = canvas.new(kind, _PLATES[kind], texture="flat", contrast=1)
    plate_top = y - 0.32 * height
    canvas.rectangle(plate, right - 0.16 * size, plate_top, right, plate_top + 0.16 * size)


def draw_person(canvas: Canvas, thing: str, x: float, y: float, height: float) -> None:
    """A person or a rider: trunk, two legs, head."""
    clothes = canvas.new(thing)
    width = 0.24 * height
    canvas.rectangle(clothes, x - width, y - 0.84 * height, x + width, y - 0.4 * height)
    canvas.rectangle(clothes, x - 0.9 * width, y - 0.42 * height, x - 0.15 * width, y)
    canvas.rectangle(clothes, x + 0.15 * width, y - 0.42 * height, x + 0.9 * width, y)
    head = canvas.new(thing, canvas.vary((181, 143, 117), 25))
    canvas.ellipse(head, x, y - 0.92 * height, 0.085 * height + 0.5, 0.1 * height + 0.5)


def draw_two_wheeler(
    canvas: Canvas, thing: str, x: float, y: float, size: float, ridden: bool
) -> None:
    """A bicycle (thin rings and a frame) or a motorcycle (thick rings and a body)."""
    number = canvas.new(thing)
    radius = 0.3 * size
    axle = y - radius
    for u in (-0.55, 0.55):
        thickness = radius * (0.34 if thing == "bicycle" else 0.6)
        canvas.ring(number, x + u * size, axle, radius, thickness)
    if thing == "bicycle":
        tube = max(2, 0.1 * size)
        saddle, handlebar = (x, y - 0.75 * size), (x + 0.5 * size, y - 0.8 * size)
        canvas.line(number, (x - 0.55 * size, axle), saddle, tube)
        canvas.line(number, saddle, handlebar, tube)
        canvas.line(number, handlebar, (x + 0.55 * size, axle), tube)
        canvas.line(number, (x - 0.2 * size, axle), handlebar, tube)
    else:
        body = [(-0.6, -0.5), (0.4, -0.75), (0.6, -0.35), (-0.3, -0.15)]
        canvas.polygon(number, [(x + u * size, y + v * size) for u, v in body])
    if ridden:
        draw_person(canvas, "rider", x - 0.05 * size, y - 0.35 * size, 1.25 * size)


def draw_pole(canvas: Canvas, carried: str, x: float, y: float, size: float) -> None:
    """A pole, alone or carrying a traffic light or a traffic sign."""
    top = y - size * canvas.uniform(1.5, 2.6)
    canvas.line(canvas.new("pole"), (x, y), (x, top), max(2, 0.09 * size))
    if carried == "traffic light":
        _draw_traffic_light(canvas, x, top, size)
    elif carried == "traffic sign":
        _draw_traffic_sign(canvas, x, top, size)


def _draw_traffic_light(canvas: Canvas, x: float, top: float, size: float) -> None:
    half_width, height = 0.2 * size, 0.5 * size
    case = canvas.new("traffic light")
    canvas.rectangle(case, x - half_width, top - 0.3 * height, x + half_width, top + height)
    lit = int(canvas.random.integers(3))
    signal = canvas.new("traffic light", _SIGNALS[lit], texture="flat")
    y, radius = top + height * (0.35 * lit - 0.05), 0.75 * half_width
    canvas.ellipse(signal, x, y, radius, radius)


def _draw_traffic_sign(canvas: Canvas, x: float, top: float, size: float) -> None:
    sign, radius = canvas.new("traffic sign"), 0.32 * size
    shape = canvas.random.choice(["disc", "triangle", "board"])
    if shape == "disc":
        canvas.ellipse(sign, x, top, radius, radius)
    elif shape == "triangle":
        corners = [(x - radius, top + radius), (x + radius, top + radius), (x, top - radius)]
        canvas.polygon(sign, corners)
    else:
        canvas.rectangle(sign, x - radius, top - radius, x + radius, top + 0.7 * radius)
