"""The benchmark of all networks, at a size where it takes a second."""

import json

import pytest
import torch

from benchmarks import networks
from segtrain import create_network, list_networks, measure_cost

ON_GPU = torch.cuda.is_available()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The benchmark's command line -> what it wrote."""
    monkeypatch.setattr(networks, "TURN", 0.001)

    def run(*arguments):
        file = tmp_path / "new" / "networks.json"
        networks.main([*arguments, "--rounds", "2", "--output", str(file)])
        return json.loads(file.read_text())

    return run


def test_table_and_file(run, capsys):
    names = ["edaformer_nano", "segformer_b0"]
    arguments = ("--sizes", "32x64", "--precisions", "fp32", "bf16", "--modes", "eager")
    result = run("--networks", "*_nano", "segformer_b0", *arguments)
    cells = result["cells"]
    assert [(c["precision"], c["network"]) for c in cells] == [
        (precision, name) for precision in ("fp32", "bf16") for name in names
    ]
    assert {c["setting"] for c in cells} == {"full"}
    for cell in cells[:2]:
        cost = measure_cost(create_network(cell["network"], 19), (32, 64), latency=False)
        assert (cell["parameters"], cell["gmacs"]) == (cost.parameters, cost.macs / 1e9)
        assert ON_GPU or cell["peak_memory_mib"] == cost.peak_memory_mib
    for cell in cells:
        lower, upper = cell["speed_ratio_quartiles"]
        assert 0 < lower <= cell["speed_ratio"] <= upper
        assert (cell["image_size"], cell["mode"], cell["error"]) == ([32, 64], "eager", None)
        assert (cell["frames_per_second"] is not None) == ON_GPU  # no times of a CPU
    assert (result["reference"], result["rounds"]) == ("segformer_b0", 2)
    assert result["torch"] == torch.__version__
    assert result["threads"] == torch.get_num_threads()
    printed = capsys.readouterr().out
    assert "1x3x32x64, bf16, eager" in printed
    for cell in cells:
        assert f"x{cell['speed_ratio']:.2f} (" in printed
    assert ON_GPU or "No GPU" in printed


def test_what_fails_says_why_and_the_run_goes_on(run, capsys):
    arguments = ("--precisions", "fp32", "--modes", "eager", "--settings", "all")
    cells = run("--networks", "segformer_b0", *arguments, "--sizes", "16x16", "32x32")["cells"]
    settings = list(create_network("segformer_b0", 19).settings)
    assert [cell["setting"] for cell in cells] == settings * 2
    small, large = cells[: len(settings)], cells[len(settings) :]
    for cell in small:
        assert "at least 29" in cell["error"]
        assert (cell["speed_ratio"], cell["gmacs"], cell["frames_per_second"]) == (None,) * 3
    failed = {cell["setting"]: cell["error"] for cell in large if cell["error"]}
    assert list(failed) == ["downsample"]
    assert f"failed: {failed['downsample']}" in capsys.readouterr().out


def test_all_networks_are_measured_by_default():
    options = networks.parse([], on_gpu=True)
    assert options.networks == list_networks()
    assert options.sizes == [(512, 512), (1024, 2048)]
    assert (options.precisions, options.modes) == (["fp32", "bf16"], ["eager", "compiled"])


@pytest.mark.parametrize("slip", [["--networks", "segfrmer*"], ["--sizes", "512"]])
def test_slips_end_with_status_2(run, slip):
    with pytest.raises(SystemExit, match="2"):
        run(*slip)


@pytest.mark.slow
def test_compiled(run):
    arguments = ("--sizes", "32x32", "--precisions", "fp32", "--modes", "compiled")
    (cell,) = run("--networks", "edaformer_nano", *arguments)["cells"]
    assert cell["error"] is None
    assert cell["speed_ratio"] > 0
    assert (cell["peak_memory_mib"] is not None) == ON_GPU
