"""Imports point one way, and a library user needs nothing of the application."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

#: Package or module -> prefixes that nothing in it may import.
FORBIDDEN = {
    "segtrain": [
        *("data", "callbacks", "configs", "tuning", "train", "sweep", "pages", "gate"),
        *("command_line", "evaluate", "predict", "prediction", "export", "report"),
        *("albumentations", "wandb", "plotly", "optuna"),
    ],
    "segtrain/reduction": ["segtrain.networks", "segtrain.training", "lightning"],
    "segtrain/networks": ["segtrain.training", "segtrain.weights", "segtrain.cost", "lightning"],
    "segtrain/config": ["torch", "lightning", "segtrain.networks", "segtrain.training"],
    "segtrain/training": ["segtrain.weights", "segtrain.cost"],
    "segtrain/metrics.py": ["segtrain.training", "segtrain.networks"],
    "segtrain/inference.py": ["segtrain.training", "lightning"],
    "data": ["segtrain.networks", "segtrain.training", "callbacks", "prediction", "train"],
    "tuning": ["data", "callbacks", "train", "sweep", "torch", "lightning"],
    "callbacks": [
        *("data", "train", "run_folder"),
        *(f"segtrain.networks.{module.stem}" for module in Path("segtrain/networks").glob("*.py")),
    ],
    "run_folder.py": ["data", "torch", "lightning", "train"],
}


def imported(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("place", FORBIDDEN)
def test_imports_point_one_way(place):
    path = Path(place)
    files = [path] if path.is_file() else sorted(path.rglob("*.py"))
    assert files
    for file in files:
        for name in imported(file):
            for prefix in FORBIDDEN[place]:
                assert not f"{name}.".startswith(f"{prefix}."), f"{file}: {name}"


def test_a_network_needs_no_lightning():
    code = "import sys, segtrain; segtrain.create_network('edaformer_nano', num_classes=3); "
    code += "assert 'lightning' not in sys.modules and 'albumentations' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
