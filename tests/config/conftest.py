import textwrap
from pathlib import Path

import pytest

FILES = {
    "config.yaml": """
        defaults: {model: small, data: toys, callbacks: [default]}
        task: fit
        name: null
        seed: 0
        schedule: {steps: 100, validate_every: 10, power: 1.0}
        optimizer: {learning_rate: 0.1, groups: {norm: {weight_decay_scale: 0.0}}}
        tracking: {mode: auto, tags: []}
        trainer: {devices: auto, gradient_clip_val: null, sync_batchnorm: false}
        """,
    "model/small.yaml": "# A small one\nname: small\nwidth: 8\nratio: 0.5",
    "model/large.yaml": "# A large one\nname: large\nwidth: 64\nratio: 0.5",
    "data/toys.yaml": "name: toys\nroot: toys\nbatch_size: 4\nseed: ${seed}\ncrop_size: [32, 64]",
    "data/tools.yaml": "name: tools\nroot: tools\nbatch_size: 2\nseed: 7\ncrop_size: [16, 16]",
    "callbacks/default.yaml": "checkpoints: {every: '${schedule.validate_every}'}\nreport: {}",
    "callbacks/pictures.yaml": "pictures: {count: 4}",
    "experiment/long.yaml": """
        # The large one for long
        defaults: {model: large, data: tools}
        schedule: {steps: 1000}
        model: {ratio: 2}
        """,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small folder of configuration files, below the current folder."""
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        file = tmp_path / "configs" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text).strip() + "\n", encoding="utf-8")
    return tmp_path / "configs"
