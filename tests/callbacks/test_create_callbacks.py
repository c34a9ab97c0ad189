from __future__ import annotations

import pytest

from callbacks import Checkpoints, CostCurve, create_callbacks
from segtrain import UserError


def test_named_callbacks_are_built_in_the_order_of_their_work(tmp_path):
    section = {
        "report": {},
        "checkpoints": {"every": 7, "keep": 2},
        "cost_curve": {"settings": None, "every": 1, "limit_batches": 3, "latency": False},
        "progress": {},
        "pictures": None,
    }
    created = create_callbacks(section, tmp_path)
    names = [type(callback).__name__ for callback in created]
    assert names == [
        "ForgetLostSteps",
        "Provenance",
        "Unreadable",
        "CostCurve",
        "Checkpoints",
        "Report",
        "Progress",
        "StopOnSignal",
    ]
    curve, checkpoints = created[3], created[4]
    assert isinstance(curve, CostCurve)
    assert isinstance(checkpoints, Checkpoints)
    assert (curve.limit_batches, curve.latency) == (3, False)
    assert checkpoints.folder == tmp_path / "checkpoints"
    assert (checkpoints.every, checkpoints.keep) == (7, 2)


def test_slips_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no callback 'cost_curv': did you mean 'cost_curve'"):
        create_callbacks({"cost_curv": {}}, tmp_path)
    with pytest.raises(UserError, match=r"checkpoints has no argument 'kep': did you mean 'keep'"):
        create_callbacks({"checkpoints": {"kep": 1}}, tmp_path)
    with pytest.raises(UserError, match="no argument 'run_folder'"):
        create_callbacks({"report": {"run_folder": "elsewhere"}}, tmp_path)
