from __future__ import annotations

import json

import pytest
import wandb

from callbacks.cost_curve import CostCurve
from callbacks.pictures import Pictures
from callbacks.tracking import create_loggers, wandb_mode, write_run_record
from segtrain import UserError
from tests.callbacks.tiny import (
    SETTINGS,
    TinyData,
    create_module,
    create_trainer,
    wandb_history,
    wandb_records,
)

TRACKING = {
    "mode": "auto",
    "project": "tests",
    "entity": None,
    "group": "a group",
    "tags": ["small"],
    "notes": None,
}
KEY = "0123456789abcdef" * 3


def test_offline_run_holds_scalars_table_charts_and_masks(tmp_path, monkeypatch, capsys):
    def prompt(*args):
        raise AssertionError("asked for something")

    monkeypatch.setattr("builtins.input", prompt)
    monkeypatch.delenv("WANDB_DATA_DIR")
    monkeypatch.delenv("WANDB_CACHE_DIR")
    folder = tmp_path / "run"
    folder.mkdir()
    config = {"model": {"name": "edaformer_nano"}, "seed": 0}
    loggers = create_loggers(TRACKING, folder, "a name", "abc12345", config)
    (line,) = capsys.readouterr().out.splitlines()
    assert "kept offline (no account configured)" in line
    try:
        module, curve = create_module(), CostCurve(folder, ["isr_2211_222", "isr_4444_444"])
        create_trainer([curve, Pictures(folder, 2)], loggers).fit(module, TinyData())
    finally:
        wandb.teardown()  # the file is whole only then

    history = wandb_history(folder)
    assert all("trainer/global_step" in row for row in history)
    for step in (2, 4):
        logged = {}
        for row in history:
            if row["trainer/global_step"] == step:
                logged |= row
        rows = [row for row in curve.rows if row["step"] == step]
        assert logged["val/mIoU"] == pytest.approx(rows[0]["mIoU"])
        for row in rows:
            assert logged[f"val/mIoU/{row['setting']}"] == row["mIoU"]
            assert logged[f"cost/gmacs/{row['setting']}"] == row["cost"]["gmacs"]
            assert logged[f"cost/latency_ms/{row['setting']}"] == row["cost"]["latency_ms"]
        # The whole history, in the table and in both charts.
        seen = [row for row in curve.rows if row["step"] <= step]
        table = wandb_table(folder, logged, "curve/table")
        named = [dict(zip(table["columns"], cells, strict=True)) for cells in table["data"]]
        assert [(cells["step"], cells["setting"]) for cells in named] == [
            (row["step"], row["setting"]) for row in seen
        ]
        assert [cells["mIoU"] for cells in named] == [row["mIoU"] for row in seen]
        for chart, cost in (("gmacs", "gmacs"), ("latency", "latency_ms")):
            points = wandb_table(folder, logged, f"curve/mIoU_vs_{chart}_table")["data"]
            expected = {(f"step {r['step']}", r["cost"][cost], r["mIoU"]) for r in seen}
            assert {(line, x, y) for x, line, y in points} == expected
        assert logged["predictions.count"] == 2
        masks = logged["predictions.all_masks"][0]
        assert masks.keys() == {"label", "full", SETTINGS[-1]}
        assert (folder_of(folder) / "files" / masks["label"]["path"]).exists()

    configs = [r.config for r in wandb_records(folder) if r.WhichOneof("record_type") == "config"]
    panels = {"/".join(item.nested_key[2:]) for config in configs for item in config.update}
    assert {"curve/mIoU_vs_gmacs", "curve/mIoU_vs_latency"} <= panels
    (run,) = (r.run for r in wandb_records(folder) if r.WhichOneof("record_type") == "run")
    assert (run.run_id, run.display_name, run.run_group) == ("abc12345", "a name", "a group")
    logged_config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert logged_config["cfg"] == config
    assert not list(tmp_path.glob(".*"))  # nothing outside of the run's folder
    assert not (tmp_path / "wandb-data").exists()


def folder_of(run_folder):
    (folder,) = run_folder.glob("wandb/offline-run-*")
    return folder


def wandb_table(run_folder, logged, key):
    return json.loads((folder_of(run_folder) / "files" / logged[f"{key}.path"]).read_text())


@pytest.mark.parametrize(
    ("configured", "environment", "netrc", "expected"),
    [
        ("auto", {}, None, "offline"),
        ("auto", {"WANDB_API_KEY": KEY}, None, "online"),
        ("auto", {"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, None, "offline"),
        ("auto", {"WANDB_MODE": "disabled"}, None, "disabled"),
        ("auto", {"WANDB_MODE": "dryrun"}, None, "offline"),
        ("auto", {"WANDB_MODE": "online"}, None, "offline"),
        ("auto", {}, "machine api.wandb.ai login user password secret", "online"),
        ("auto", {}, "machine example.org login user password secret", "offline"),
        (
            "auto",
            {"WANDB_BASE_URL": "http://wandb.example.org:8080"},
            "machine wandb.example.org:8080 login user password secret",
            "online",
        ),
        ("auto", {}, "machine ? nonsense", "offline"),
        ("online", {}, None, "offline"),
        ("online", {"WANDB_API_KEY": KEY}, None, "online"),
        ("offline", {"WANDB_API_KEY": KEY, "WANDB_MODE": "online"}, None, "offline"),
        ("disabled", {"WANDB_API_KEY": KEY}, None, "disabled"),
    ],
)
def test_mode(tmp_path, monkeypatch, configured, environment, netrc, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if netrc:
        (tmp_path / "netrc").write_text(netrc)
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wandb_mode(configured) == expected


def test_unknown_mode(monkeypatch):
    with pytest.raises(UserError, match=r"tracking\.mode.*did you mean 'offline'"):
        wandb_mode("ofline")
    monkeypatch.setenv("WANDB_MODE", "onlin")
    with pytest.raises(UserError, match=r"WANDB_MODE.*did you mean 'online'"):
        wandb_mode("auto")


class Started(Exception):
    pass


@pytest.mark.parametrize("key", [KEY, "not a key"])
def test_training_goes_on_offline_without_a_server(tmp_path, monkeypatch, capsys, key):
    monkeypatch.setattr("callbacks.tracking.INIT_TIMEOUT", 1)
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens
    try:
        _, logger = create_loggers(TRACKING, tmp_path, "name", "abc", {})
        logger.log_metrics({"train/loss": 1.0}, step=1)
    finally:
        wandb.teardown()
    (line,) = capsys.readouterr().out.splitlines()
    assert "kept offline (" in line
    assert "wandb sync" in line
    assert [row["train/loss"] for row in wandb_history(tmp_path)] == [1.0]


@pytest.mark.parametrize("sweep", [False, True])
def test_id_is_ours_except_in_a_sweep(tmp_path, monkeypatch, sweep):
    def start(**arguments):
        assert arguments.get("id") == (None if sweep else "abc")
        assert arguments.get("resume") == (None if sweep else "allow")
        assert "anonymous" not in arguments
        raise Started

    if sweep:
        monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    monkeypatch.setattr(wandb, "init", start)
    with pytest.raises(Started):
        create_loggers(TRACKING, tmp_path, "name", "abc", {})


def test_other_ranks_start_no_run(tmp_path, monkeypatch):
    def start(**arguments):
        raise AssertionError("a second run")

    monkeypatch.setattr(wandb, "init", start)
    monkeypatch.setattr("callbacks.tracking.rank_zero_only.rank", 1)
    json_lines, logger = create_loggers(TRACKING, tmp_path, "name", "abc", {})
    for each in (json_lines, logger):
        each.log_metrics({"train/loss": 1.0}, step=1)
    assert not list(tmp_path.iterdir())


def test_disabled_leaves_the_local_log(tmp_path):
    (logger,) = create_loggers({**TRACKING, "mode": "disabled"}, tmp_path, "name", "abc", {})
    logger.log_metrics({"train/loss": 1.0}, step=1)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_run_record_keeps_its_id_when_resumed(tmp_path):
    first = write_run_record(tmp_path, "a run", ["train.py", "data.root=/with space"])
    assert json.loads((tmp_path / "run.json").read_text()) == first
    assert first["command"] == "train.py 'data.root=/with space'"
    assert {"python", "torch", "lightning", "segtrain"} <= first["versions"].keys()
    assert first["wandb_id"]
    for times in (1, 2):
        again = write_run_record(tmp_path, "a run", ["train.py", "resume=x"])
        assert len(again["resumed"]) == times
        assert again["resumed"][-1]["command"] == "train.py resume=x"
        assert {key: again[key] for key in first} == first
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_run_record_in_a_sweep_has_the_agents_id(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "fromagent")
    assert write_run_record(tmp_path, "a run", ["train.py"])["wandb_id"] == "fromagent"
