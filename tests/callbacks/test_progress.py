from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from callbacks.cost_curve import CostCurve
from callbacks.progress import Progress, curve_table
from tests.callbacks.tiny import SETTINGS, TinyData, create_module, create_trainer


def run(tmp_path, terminal, **more):
    progress = Progress(every=2)
    progress.console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
    curve = CostCurve(tmp_path, latency=False)
    create_trainer([curve, progress], **more).fit(create_module(), TinyData())
    return progress.console.file.getvalue(), curve


def test_plain_lines_without_a_terminal(tmp_path):
    printed, curve = run(tmp_path, terminal=False, accumulate=2, num_sanity_val_steps=1)
    lines = [line for line in printed.splitlines() if line.startswith("step ")]
    status = r"loss \d+\.\d{4}  \d+\.\d images/s  \d+:\d\d:\d\d left"
    assert re.fullmatch(rf"step 2/4  {status}", lines[0])
    assert lines[1].strip() == "step 2: accuracy against cost"
    assert re.fullmatch(r"step 4/4  .*  0:00:00 left", lines[2])
    assert "\x1b" not in printed
    reduced = curve.rows[-1]
    change = 100 * (reduced["mIoU"] - curve.rows[-len(SETTINGS)]["mIoU"])
    row = next(line for line in reversed(printed.splitlines()) if SETTINGS[-1] in line)
    assert f"{change:+.2f}" in row
    assert f"{reduced['cost']['gmacs']:.3f}" in row


def test_a_cost_that_depends_on_the_image_stands_with_its_spread():
    costs = [{"gmacs": 4.0, "latency_ms": None}, {"gmacs": 2.0, "latency_ms": 7.0}]
    costs[1] |= {"gmacs_std": 0.25, "gmacs_worst": 2.5}
    rows = [
        {"step": 1, "setting": name, "mIoU": 0.5, "on_front": True, "cost": cost}
        for name, cost in zip(("full", "half"), costs, strict=True)
    ]
    console = Console(file=io.StringIO(), width=120)
    console.print(curve_table(rows))
    full, half = (line for line in console.file.getvalue().splitlines() if "*" in line[:12])
    assert "4.000" in full
    assert "±" not in full
    assert "2.000 ± 0.250, at most 2.500" in half


def test_bar_on_a_terminal(tmp_path):
    printed, _ = run(tmp_path, terminal=True)
    assert "4/4" in printed
    assert "images/s" in printed
    assert "validation" in printed
    assert "accuracy against cost" in printed


def test_bar_is_taken_down_when_training_fails(tmp_path):
    progress = Progress()
    progress.console = Console(file=io.StringIO(), force_terminal=True)
    trainer = create_trainer([progress])
    module = create_module()

    def fail(*args):
        raise RuntimeError("lost")

    module.training_step = fail
    with pytest.raises(RuntimeError, match="lost"):
        trainer.fit(module, TinyData())
    assert progress.console.file.getvalue().endswith("\x1b[?25h")  # the cursor is back
