from pathlib import Path

import pytest

from segtrain.config import compose, help_text, to_yaml


def values(folder: Path, *arguments: str) -> dict:
    return compose(list(arguments), folder).values


def test_defaults(folder):
    composed = values(folder)
    assert composed["model"] == {"name": "small", "width": 8, "ratio": 0.5}
    assert composed["data"]["name"] == "toys"
    assert composed["callbacks"] == {"checkpoints": {"every": 10}, "report": {}}
    assert "defaults" not in composed


def test_group_choice_and_merge(folder):
    assert values(folder, "model=large")["model"]["width"] == 64
    assert list(values(folder, "callbacks=[default,pictures]")["callbacks"]) == [
        "checkpoints",
        "report",
        "pictures",
    ]
    assert values(folder, "callbacks=[]")["callbacks"] == {}


def test_override_add_remove(folder):
    composed = values(
        folder,
        "schedule.steps=7",
        "+model.heads=[1, 2]",
        "~callbacks.report",
        "+callbacks.early.stop.patience=3",
        "callbacks.early.stop.patience=4",
        "~model.ratio",
    )
    assert composed["schedule"]["steps"] == 7
    assert composed["model"] == {"name": "small", "width": 8, "heads": [1, 2]}
    assert composed["callbacks"] == {
        "checkpoints": {"every": 10},
        "early": {"stop": {"patience": 4}},
    }


def test_leading_dashes_mean_nothing(folder):
    assert values(folder, "--schedule.steps=7", "--model=large") == values(
        folder, "schedule.steps=7", "model=large"
    )


def test_precedence(folder):
    recipe = values(folder, "experiment=long")
    assert recipe["model"] == {"name": "large", "width": 64, "ratio": 2.0}
    assert recipe["data"]["name"] == "tools"
    assert recipe["schedule"]["steps"] == 1000
    # Wherever it stands, the experiment comes before what is explicit.
    changed = values(folder, "schedule.steps=5", "data=toys", "experiment=long")
    assert changed["schedule"]["steps"] == 5
    assert changed["data"]["name"] == "toys"
    assert changed["model"]["name"] == "large"
    assert values(folder, "schedule.steps=5", "schedule.steps=6")["schedule"]["steps"] == 6
    assert values(folder, "experiment=null") == values(folder)


def test_interpolation_follows_an_override_of_what_it_refers_to(folder):
    assert values(folder, "seed=3")["data"]["seed"] == 3
    assert values(folder, "schedule.validate_every=25")["callbacks"]["checkpoints"]["every"] == 25
    composed = values(folder, "name=${model.name}-${seed}", "seed=${schedule.steps}")
    assert composed["name"] == "small-100"
    assert composed["data"]["seed"] == 100


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("optimizer.learning_rate=10e-5", 1e-4),
        ("optimizer.learning_rate=1e-05", 1e-5),
        ("optimizer.learning_rate=1", 1.0),
        ("schedule.steps=16e4", 160000),
        ("trainer.sync_batchnorm=True", True),
        ("trainer.gradient_clip_val=None", None),
        ("trainer.gradient_clip_val=null", None),
        ("trainer.gradient_clip_val=1", 1.0),
        ("trainer.devices=4", 4),
        ("trainer.devices=[0, 2]", [0, 2]),
        ("trainer.devices=auto", "auto"),
        ("data.crop_size=[64,64]", [64, 64]),
        ("name=epoch=1-step=8.ckpt", "epoch=1-step=8.ckpt"),
        ("name=007", "007"),
        ("name=3:20", "3:20"),
        ("name=a: [b", "a: [b"),
        ("name='quoted'", "quoted"),
        ("name=None", None),
        ("name=", None),
        ("data.root=/data/fix #3", "/data/fix #3"),
        ("tracking.tags=[None, a]", [None, "a"]),
    ],
)
def test_values(folder, argument, expected):
    value = values(folder, argument)
    for part in argument.partition("=")[0].split("."):
        value = value[part]
    assert value == expected
    assert type(value) is type(expected)


def test_python_dict_text_changes_the_keys_that_it_names(folder):
    composed = values(
        folder,
        "optimizer={'learning_rate': 1, 'groups': {'norm': {'weight_decay_scale': 2}}}",
        "trainer={'gradient_clip_val': None, 'sync_batchnorm': True}",
        "model={'width': 3}",
    )
    assert composed["optimizer"] == {
        "learning_rate": 1.0,
        "groups": {"norm": {"weight_decay_scale": 2.0}},
    }
    assert composed["trainer"]["sync_batchnorm"] is True
    assert composed["model"] == {"name": "small", "width": 3, "ratio": 0.5}


@pytest.fixture
def reduced(folder):
    (folder / "model/reduced.yaml").write_text("name: reduced\ntraining_setting: full\nln_eps: 1.0")
    return folder


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("model.training_setting=bsm_hq", "bsm_hq"),
        ("model.training_setting={isr: [2,2,1,1]}", {"isr": [2, 2, 1, 1]}),
        ("model.training_setting={'merge': 'bsm_hq', 'q': None}", {"merge": "bsm_hq", "q": None}),
        ("model={'training_setting': {'isr': [2]}}", {"isr": [2]}),
        ("model.training_setting={seed: '${seed}'}", {"seed": 0}),
        ("experiment=mine", {"stages": [{"kv": {"mode": "bsm"}}, {}]}),
    ],
)
def test_a_setting_is_one_value_and_replaced_as_a_whole(reduced, tmp_path, argument, expected):
    (reduced / "experiment/mine.yaml").write_text(
        "model: {training_setting: {stages: [{kv: {mode: bsm}}, {}]}}"
    )
    composed = values(reduced, "model=reduced", argument)
    assert composed["model"]["training_setting"] == expected
    saved = tmp_path / "saved.yaml"
    saved.write_text(to_yaml(composed))
    assert values(reduced, "config=saved.yaml") == composed
    for other, stands_for in (("{other: 1}", {"other": 1}), ("full", "full")):
        changed = values(reduced, "config=saved.yaml", f"model.training_setting={other}")
        assert changed["model"]["training_setting"] == stands_for


@pytest.mark.parametrize(
    ("text", "expected"), [("1e-5", 1e-5), ("1", 1.0), ("1.0e-06", 1e-6), ("mixed", "mixed")]
)
def test_a_number_or_text(reduced, text, expected):
    value = values(reduced, "model=reduced", f"model.ln_eps={text}")["model"]["ln_eps"]
    assert value == expected
    assert type(value) is type(expected)


def test_saved_configuration_reproduces_the_run(folder, tmp_path):
    arguments = [
        "experiment=long",
        "name=007",
        "seed=5",
        "+model.heads=[1, 2]",
        "~callbacks.report",
        "+optimizer.groups.head.weight_decay_scale=0",
        "optimizer.learning_rate=6e-5",
        "trainer.devices=2",
        "trainer.gradient_clip_val=1",
        "tracking.tags=[yes, '1e-3', 'None']",
    ]
    first = compose(arguments, folder)
    assert first.overrides == arguments
    run = tmp_path / "runs" / "007"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(first.values), encoding="utf-8")

    # All but the name: the folder of that name is taken.
    repeated = first.values | {"name": None}
    assert values(folder, "config=runs/007/config.yaml") == repeated
    # Nor do the files that composed it matter any more.
    (folder / "model/large.yaml").unlink()
    (folder / "experiment/long.yaml").unlink()
    assert values(folder, "config=runs/007/config.yaml") == repeated

    changed = values(
        folder, "config=runs/007/config.yaml", "trainer.gradient_clip_val=null", "data=toys"
    )
    assert changed["trainer"]["gradient_clip_val"] is None
    assert changed["data"] == values(folder, "seed=5")["data"]
    assert changed["model"] == first.values["model"]


def test_resume_takes_the_configuration_of_the_run(folder, tmp_path):
    main = folder / "config.yaml"
    main.write_text(main.read_text() + "resume: null\n")
    run = tmp_path / "runs" / "a"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(values(folder, "model=large", "name=a")))
    resumed = values(folder, "resume=runs/a", "schedule.steps=500")
    assert resumed["model"]["name"] == "large"
    assert resumed["name"] == "a"
    assert resumed["resume"] == "runs/a"
    assert resumed["schedule"]["steps"] == 500
    assert values(folder, "resume=null") == values(folder)


def test_a_checkpoint_of_a_run_brings_its_configuration(folder, tmp_path):
    main = folder / "config.yaml"
    main.write_text(main.read_text() + "ckpt: null\n")
    run = tmp_path / "runs" / "a"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(values(folder, "model=large", "name=a")))
    checkpoint = "ckpt=runs/a/checkpoints/best.ckpt"
    scored = values(folder, checkpoint)
    assert scored["model"]["name"] == "large"
    assert scored["name"] is None
    assert (
        values(folder, "experiment=long", checkpoint)["model"]
        == values(folder, "experiment=long")["model"]
    )
    assert values(folder, "ckpt=elsewhere/best.ckpt")["model"] == values(folder)["model"]


def test_flags(folder):
    assert compose([], folder).show is None
    assert compose(["--cfg", "seed=1"], folder).show == "cfg"
    assert compose(["-h"], folder).show == "help"
    assert compose(["seed=1", "--help"], folder).show == "help"


def test_help_lists_groups_and_choices_then_the_configuration(folder):
    composed = compose(["--help", "seed=11"], folder)
    text = help_text(composed, folder)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert (
        lines.index("model") < lines.index("large A large one") < lines.index("small A small one")
    )
    assert "long The large one for long" in lines
    assert text.endswith(to_yaml(composed.values))
    assert "seed: 11" in lines


def test_help_of_a_choice_shows_its_file(folder):
    text = help_text(compose(["--help", "model=large"], folder), folder)
    assert text == "model=large\n\n# A large one\nname: large\nwidth: 64\nratio: 0.5\n"
