from __future__ import annotations

import contextlib
import csv
import json
import os
import signal
from pathlib import Path

import cv2
import pytest
import torch
import wandb

from callbacks.checkpoints import Checkpoints
from callbacks.cost_curve import CHART_ROWS, CostCurve
from callbacks.jsonl import ForgetLostSteps, read_rows
from callbacks.pictures import Pictures
from callbacks.tracking import check_tracking, create_loggers, wandb_mode, write_run_record
from segtrain import UserError
from tests.callbacks.tiny import (
    SETTINGS,
    TinyData,
    create_module,
    create_trainer,
    wandb_config,
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
    "loggers": [],
}
RECORD = {"name": "a name", "wandb_id": "abc12345"}
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
    loggers = create_loggers(TRACKING, folder, RECORD, config)
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
        (image,) = {*logged["predictions.filenames"][:1]}
        # W&B takes a mask of any size without a word, and draws it wrong.
        sizes = {
            cv2.imread(str(folder_of(folder) / "files" / path)).shape[:2]
            for path in (image, *(mask["path"] for mask in masks.values()))
        }
        assert len(sizes) == 1

    configs = [r.config for r in wandb_records(folder) if r.WhichOneof("record_type") == "config"]
    panels = {"/".join(item.nested_key[2:]) for config in configs for item in config.update}
    assert {"curve/mIoU_vs_gmacs", "curve/mIoU_vs_latency"} <= panels
    (run,) = (r.run for r in wandb_records(folder) if r.WhichOneof("record_type") == "run")
    assert (run.run_id, run.display_name, run.run_group) == ("abc12345", "a name", "a group")
    assert wandb_config(folder)["cfg"] == config
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


@pytest.mark.parametrize("key", [KEY, "not a key"])
def test_training_goes_on_offline_without_a_server(tmp_path, monkeypatch, capsys, key):
    monkeypatch.setattr("callbacks.tracking.INIT_TIMEOUT", 1)
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens
    try:
        _, logger = create_loggers(TRACKING, tmp_path, RECORD, {})
        logger.log_metrics({"train/loss": 1.0}, step=1)
    finally:
        wandb.teardown()
    (line,) = capsys.readouterr().out.splitlines()
    assert "kept offline (" in line
    assert "wandb sync" in line
    assert [row["train/loss"] for row in wandb_history(tmp_path)] == [1.0]


def test_in_a_sweep_the_id_is_the_agents_and_swept_keys_lock_nothing(tmp_path, monkeypatch):
    swept = tmp_path / "parameters.yaml"
    swept.write_text("wandb_version: 1\nmodel:\n  value: tiny\n")
    monkeypatch.setenv("WANDB_SWEEP_ID", "asweep")
    monkeypatch.setenv("WANDB_RUN_ID", "fromagent")
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", str(swept))
    folder = tmp_path / "run"
    folder.mkdir()
    record = write_run_record(folder, "a run", ["train.py"])
    config = {"model": {"name": "edaformer_nano"}}
    try:
        create_loggers(TRACKING, folder, record, config)
    finally:
        wandb.teardown()
    assert record["wandb_id"] == "fromagent"
    (run,) = (r.run for r in wandb_records(folder) if r.WhichOneof("record_type") == "run")
    assert (run.run_id, run.sweep_id) == ("fromagent", "asweep")
    logged = wandb_config(folder)
    assert (logged["cfg"], logged["model"]) == (config, "tiny")


def test_where_wandb_cannot_start_the_run_does(tmp_path, capsys):
    (tmp_path / "wandb").write_text("in the way")  # W&B alone would go to another folder
    (logger,) = create_loggers(TRACKING, tmp_path, RECORD, {})
    logger.log_metrics({"train/loss": 1.0}, step=1)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("Weights & Biases: left out (")
    assert "File exists" in line


def test_a_service_that_dies_is_a_line(tmp_path):
    _, logger = create_loggers(TRACKING, tmp_path, RECORD, {})
    try:
        os.kill(child("wandb-core"), signal.SIGKILL)
        module, curve = create_module(), CostCurve(tmp_path, ["full"], latency=False)
        data, callbacks = TinyData(), [curve, Pictures(tmp_path, 1)]
        with pytest.warns(UserWarning, match="Weights & Biases: metrics not logged"):
            create_trainer(callbacks, [logger], steps=4).fit(module, data)
    finally:
        with contextlib.suppress(Exception):
            wandb.teardown()


def child(name):
    """The process of that name that this one started."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            text = path.read_text()
            command, parent = text[text.index("(") + 1 : text.rindex(")")], text.split(")")[-1]
            if command == name and int(parent.split()[1]) == os.getpid():
                return int(path.parent.name)
    raise AssertionError(f"no {name}")


def test_other_ranks_start_no_run(tmp_path, monkeypatch):
    def start(**arguments):
        raise AssertionError("a second run")

    monkeypatch.setattr(wandb, "init", start)
    monkeypatch.setattr("callbacks.tracking.rank_zero_only.rank", 1)
    json_lines, logger = create_loggers(TRACKING, tmp_path, RECORD, {})
    for each in (json_lines, logger):
        each.log_metrics({"train/loss": 1.0}, step=1)
    assert not list(tmp_path.iterdir())


def test_disabled_leaves_the_local_log(tmp_path):
    (logger,) = create_loggers({**TRACKING, "mode": "disabled"}, tmp_path, RECORD, {})
    logger.log_metrics({"train/loss": 1.0}, step=1)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_killed_run_that_goes_on_loses_no_rows(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracking = {**TRACKING, "mode": "disabled", "loggers": ["tensorboard", "csv"]}
    module, last = create_module(), tmp_path / "checkpoints" / "last.ckpt"
    for steps, resumed in ((2, None), (4, last)):
        loggers = create_loggers(tracking, tmp_path, RECORD, {})
        for logger in loggers:
            monkeypatch.setattr(logger, "finalize", lambda status: None)  # it is killed
        callbacks = [ForgetLostSteps(tmp_path), Checkpoints(tmp_path, every=2)]
        trainer = create_trainer(callbacks, loggers, steps=steps)
        trainer.fit(module, TinyData(), ckpt_path=resumed, weights_only=True)
    local = [
        (row["step"], name, value)
        for row in read_rows(tmp_path / "metrics.jsonl")
        for name, value in row.items()
        if name not in ("step", "time")
    ]
    assert {step for step, _, _ in local} == {1, 2, 3, 4}
    files = sorted(tmp_path.glob("csv/version_*/metrics.csv"))
    assert len(files) == 2
    kept = [
        (int(row["step"]), name, float(value))
        for file in files
        for row in csv.DictReader(file.read_text().splitlines())
        for name, value in row.items()
        if name != "step" and value
    ]
    assert sorted(kept) == sorted(local)
    events = EventAccumulator(str(tmp_path / "tensorboard"), {"scalars": 0})
    events.Reload()
    drawn = [(e.step, name) for name in events.Tags()["scalars"] for e in events.Scalars(name)]
    assert sorted(drawn) == sorted((step, name) for step, name, _ in local)


def test_other_loggers_are_checked_before_a_run_starts(monkeypatch):
    check_tracking({**TRACKING, "loggers": ["csv", "tensorboard"]})
    with pytest.raises(UserError, match=r"tracking\.loggers.*did you mean 'csv'"):
        check_tracking({**TRACKING, "loggers": ["cvs"]})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_tracking({**TRACKING, "loggers": ["csv"]})
    with pytest.raises(UserError, match="no tensorboard here: uv sync --group tensorboard"):
        check_tracking({**TRACKING, "loggers": ["tensorboard"]})


def test_a_chart_has_no_more_rows_than_wandb_keeps():
    assert CHART_ROWS == wandb.Table.MAX_ROWS


def test_run_record_keeps_its_id_when_resumed(tmp_path):
    first = write_run_record(tmp_path, "a run", ["train.py", "data.root=/with space"])
    assert json.loads((tmp_path / "run.json").read_text()) == first
    assert first["command"] == "train.py 'data.root=/with space'"
    assert {"python", "torch", "cuda", "lightning", "segtrain"} <= first["versions"].keys()
    assert len(first["devices"]) == torch.cuda.device_count()
    assert first["wandb_id"]
    for times in (1, 2):
        again = write_run_record(tmp_path, "a run", ["train.py", "resume=x"])
        assert len(again["resumed"]) == times
        assert again["resumed"][-1]["command"] == "train.py resume=x"
        assert again["resumed"][-1]["versions"] == first["versions"]
        assert {key: again[key] for key in first} == first
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_run_record_in_a_sweep_has_the_agents_id(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "fromagent")
    assert write_run_record(tmp_path, "a run", ["train.py"])["wandb_id"] == "fromagent"
