"""What the README promises of its first command."""

import itertools
import json

import pytest


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_first_command_draws_a_curve_that_says_something(start, in_folder):
    start(timeout=1400, OMP_NUM_THREADS="2")
    (run,) = (in_folder / "runs").iterdir()
    assert (run / "report.html").exists()
    rows = [json.loads(line) for line in (run / "curve.jsonl").read_text().splitlines()]
    steps = sorted({row["step"] for row in rows})
    full = [row["mIoU"] for row in rows if row["training_setting"]]
    assert full[-1] > 0.55
    assert full[-1] > full[0]
    newest = [row for row in rows if row["step"] == steps[-1]]
    costs = [row["cost"]["macs"] for row in newest]
    assert len(costs) >= 5
    assert all(later < earlier for earlier, later in itertools.pairwise(costs))
    assert newest[-1]["mIoU"] < full[-1] - 0.01
