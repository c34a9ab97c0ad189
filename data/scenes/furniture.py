"""The things in a room. `x` is the middle of a thing, `y` the floor under it, in pixels."""

from __future__ import annotations

from data.scenes.canvas import Canvas


def draw_bed(canvas: Canvas, x: float, y: float, size: float) -> None:
    bed, pillow = canvas.new("bed"), canvas.new("bed", (228, 224, 218))
    top = y - 0.6 * size
    corners = [(x - 1.2 * size, y), (x - 0.9 * size, top), (x + 0.9 * size, top)]
    canvas.polygon(bed, [*corners, (x + 1.2 * size, y)])
    canvas.rectangle(bed, x - 1.2 * size, y, x + 1.2 * size, y + 0.35 * size)
    for u in (-0.8, 0.1):
        canvas.rectangle(
            pillow, x + u * size, y - 0.62 * size, x + (u + 0.7) * size, y - 0.4 * size
        )


def draw_sofa(canvas: Canvas, x: float, y: float, size: float) -> None:
    sofa, seat = canvas.new("sofa"), canvas.new("sofa")
    canvas.rectangle(sofa, x - 1.1 * size, y - 0.75 * size, x + 1.1 * size, y)
    canvas.rectangle(seat, x - 0.9 * size, y - 0.35 * size, x + 0.9 * size, y - 0.08 * size)
    for u in (-1.25, 0.95):
        canvas.rectangle(sofa, x + u * size, y - 0.5 * size, x + (u + 0.3) * size, y + 0.05 * size)


def draw_table(canvas: Canvas, x: float, y: float, size: float) -> None:
    table = canvas.new("table")
    front, back = y - 0.5 * size, y - 0.7 * size
    corners = [(x - 0.9 * size, front), (x - 0.7 * size, back), (x + 0.7 * size, back)]
    canvas.polygon(table, [*corners, (x + 0.9 * size, front)])
    for u in (-0.82, -0.6, 0.6, 0.82):
        canvas.line(table, (x + u * size, front), (x + u * size, y), 2)
    for _ in range(canvas.random.integers(3)):
        left = x + canvas.uniform(-0.6, 0.6) * size
        canvas.rectangle(
            canvas.new("bottle"), left, y - 0.9 * size, left + 0.09 * size, y - 0.6 * size
        )


def draw_chair(canvas: Canvas, x: float, y: float, size: float) -> None:
    chair = canvas.new("chair")
    canvas.rectangle(chair, x - 0.28 * size, y - 0.95 * size, x + 0.28 * size, y - 0.55 * size)
    seat = [(-0.32, 0.4), (-0.26, 0.52), (0.26, 0.52), (0.32, 0.4)]
    canvas.polygon(chair, [(x + u * size, y - v * size) for u, v in seat])
    for u in (-0.28, 0.28):
        canvas.line(chair, (x + u * size, y - 0.5 * size), (x + u * size, y), 1)


def draw_lamp(canvas: Canvas, x: float, y: float, size: float) -> None:
    stand = canvas.new("lamp", (90, 84, 76), texture="flat")
    canvas.line(stand, (x, y), (x, y - 1.3 * size), 1)
    shade = [(-0.22, 1.2), (-0.12, 1.5), (0.12, 1.5), (0.22, 1.2)]
    canvas.polygon(canvas.new("lamp"), [(x + u * size, y - v * size) for u, v in shade])


def draw_plant(canvas: Canvas, x: float, y: float, size: float) -> None:
    plant = canvas.new("plant")
    for _ in range(9):
        canvas.ellipse(
            plant,
            x + canvas.uniform(-0.3, 0.3) * size,
            y - canvas.uniform(0.5, 1.1) * size,
            canvas.uniform(0.06, 0.2) * size,
            canvas.uniform(0.06, 0.2) * size,
        )
    pot = canvas.new("plant", (150, 90, 66), texture="flat")
    canvas.rectangle(pot, x - 0.13 * size, y - 0.35 * size, x + 0.13 * size, y)


def draw_bottle(canvas: Canvas, x: float, y: float, size: float) -> None:
    canvas.rectangle(canvas.new("bottle"), x, y - 0.25 * size, x + 0.1 * size, y)
