"""Each mistake gets one line that names the key, the file if it is in one, and what to do."""

import pytest

from segtrain.config import compose, to_yaml
from segtrain.errors import UserError

TOP = (
    "callbacks, config, data, experiment, model, name, optimizer, schedule, seed, task, tracking, "
    "trainer"
)
OPEN = "model, data, callbacks, trainer, optimizer"


def message(folder, *arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        compose(list(arguments), folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        # Groups and choices.
        ("modl=small", f"unknown key 'modl': did you mean 'model'? Have: {TOP}"),
        ("experimnt=long", f"unknown key 'experimnt': did you mean 'experiment'? Have: {TOP}"),
        ("model=smal", "no model called 'smal': did you mean 'small'? Have: large, small"),
        ("model=[small,larg]", "no model called 'larg': did you mean 'large'? Have: large, small"),
        ("experiment=lng", "no experiment called 'lng': did you mean 'long'? Have: long"),
        ("model=", "no model called '': Have: large, small"),
        ("+model=large", "'model' exists already: write model=value, without '+'"),
        ("+experiment=long", "write experiment=value, without '+'"),
        # Keys.
        (
            "schedule.stps=1",
            "unknown key 'schedule.stps': did you mean 'steps'? Have: power, steps, validate_every",
        ),
        (
            "trainer.device=1",
            "unknown key 'trainer.device': did you mean 'devices'? Have: devices, "
            "gradient_clip_val, sync_batchnorm (+trainer.device=value adds it)",
        ),
        ("learning_rate=1", "unknown key 'learning_rate': did you mean 'optimizer.learning_rate'?"),
        (
            "optimizer={'learning_rat': 1}",
            "unknown key 'optimizer.learning_rat': did you mean 'learning_rate'? "
            "Have: groups, learning_rate (+optimizer.learning_rat=value adds it)",
        ),
        ("shedule.steps=1", f"unknown key 'shedule.steps': did you mean 'schedule'? Have: {TOP}"),
        (
            "schedule.steps.count=1",
            "unknown key 'schedule.steps.count': 'schedule.steps' is a value, not a section",
        ),
        ("+data.seed=1", "'data.seed' exists already: write data.seed=value, without '+'"),
        ("+data.seed.a=1", "'data.seed.a' cannot be added: 'data.seed' is a value, not a section"),
        (
            "+schedule.cycles=1",
            "unknown key 'schedule.cycles': Have: power, steps, validate_every "
            f"('+' adds only below {OPEN})",
        ),
        (
            "~callbacks.reprt",
            "unknown key 'callbacks.reprt': did you mean 'report'? Have: checkpoints, report "
            "(+callbacks.reprt=value adds it)",
        ),
        (
            "~schedule.steps",
            "'schedule.steps' is needed and cannot be removed: '~' removes only keys below " + OPEN,
        ),
        (
            "~model.name",
            "'model.name' is needed and cannot be removed: '~' removes only keys below " + OPEN,
        ),
        # Types.
        ("schedule.steps=many", "'schedule.steps' expects a whole number, got 'many'"),
        ("schedule.steps=1.5", "'schedule.steps' expects a whole number, got 1.5"),
        ("schedule.steps=null", "'schedule.steps' expects a whole number, got null"),
        ("schedule.steps=true", "'schedule.steps' expects a whole number, got true"),
        ("schedule.power=[1]", "'schedule.power' expects a number, got [1]"),
        ("schedule=3", "'schedule' expects a section of keys, got 3"),
        ("trainer.sync_batchnorm=1", "'trainer.sync_batchnorm' expects true or false, got 1"),
        (
            "trainer.gradient_clip_val=abc",
            "'trainer.gradient_clip_val' expects a number or null, got 'abc'",
        ),
        (
            "trainer.devices=1.5",
            "'trainer.devices' expects a whole number or text or a list, got 1.5",
        ),
        ("data.crop_size=512", "'data.crop_size' expects a list, got 512"),
        ("data.crop_size=[512,a]", "'data.crop_size[1]' expects a whole number, got 'a'"),
        ("data.root=null", "'data.root' expects text, got null"),
        ("callbacks.checkpoints=5", "'callbacks.checkpoints' expects a section of keys, got 5"),
        ("schedule.steps=${name}", "${name}: 'schedule.steps' expects a whole number, got null"),
        # Values.
        ("task=trian", "'task' cannot be 'trian': Have: fit, gate, validate"),
        (
            "tracking.mode=of",
            "'tracking.mode' cannot be 'of': Have: auto, disabled, offline, online",
        ),
        (
            "tracking.mode=ofline",
            "'tracking.mode' cannot be 'ofline': did you mean 'offline'? "
            "Have: auto, disabled, offline, online",
        ),
        ("schedule.steps=0", "'schedule.steps' must be greater than 0, got 0"),
        ("data.batch_size=-1", "'data.batch_size' must be greater than 0, got -1"),
        # Forms.
        ("seed", "the argument 'seed' has no value: write seed=value"),
        ("--seed", "unknown flag '--seed': Have: --cfg, --help, -h"),
        ("--hlp", "unknown flag '--hlp': did you mean '--help'? Have: --cfg, --help, -h"),
        ("~seed=1", "cannot read the argument '~seed=1': write ~seed, without a value"),
        ("=1", "cannot read the argument '=1': write key=value, with a dotted key"),
        ("a..b=1", "cannot read the argument 'a..b=1': write key=value, with a dotted key"),
        (
            "data.crop_size=[1,",
            "cannot read data.crop_size='[1,': not valid YAML: did not find expected node content",
        ),
        ("seed=${name", "cannot read seed='${name': not a valid interpolation"),
        ("name=${nme}", "cannot resolve the value of 'name': Interpolation key 'nme' not found"),
        (
            "config=runs/a/config.yaml",
            "cannot read runs/a/config.yaml: No such file or directory",
        ),
    ],
)
def test_on_the_command_line(folder, argument, expected):
    assert message(folder, argument) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "schedule: {steps: 1, stps: 2}",
            "unknown key 'schedule.stps': did you mean 'steps'? Have: power, steps, validate_every",
        ),
        ("shedule: {steps: 1}", f"unknown key 'shedule': did you mean 'schedule'? Have: {TOP}"),
        (
            "model: {heads: 3}",
            "unknown key 'model.heads': Have: name, ratio, width",
        ),
        ("schedule: {steps: many}", "'schedule.steps' expects a whole number, got 'many'"),
        ("schedule: 5", "'schedule' expects a section of keys, got 5"),
        (
            "defaults: {modl: small}",
            "no group 'modl': did you mean 'model'? Have: callbacks, data, model",
        ),
        (
            "defaults: {model: smal}",
            "no model called 'smal': did you mean 'small'? Have: large, small",
        ),
        ("seed: 1\nmodel: {width: 3", "not valid YAML in line 3: did not find expected ',' or '}'"),
        ("seed: 1\nseed: 2", "not valid YAML in line 2: found duplicate key seed"),
        ("defaults: [model]", "'defaults' expects lines of 'group: name'"),
        ("- seed", "expected 'key: value' lines, found a list"),
        ("name: ${a", "not a valid interpolation: no viable alternative at input '${a'"),
    ],
)
def test_in_an_experiment_file(folder, text, expected):
    (folder / "experiment/mine.yaml").write_text(text)
    assert message(folder, "experiment=mine") == f"configs/experiment/mine.yaml: {expected}"


def test_in_a_group_file(folder):
    (folder / "model/mine.yaml").write_text("name: mine\nwidth: [1")
    assert message(folder, "model=mine").startswith(
        "configs/model/mine.yaml: not valid YAML in line"
    )
    (folder / "model/mine.yaml").write_text("name: mine\nwidth: ${with}")
    assert message(folder, "model=mine") == (
        "cannot resolve the value of 'model.width': Interpolation key 'with' not found"
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["model.training_setting=3"],
            "'model.training_setting' expects text or a section of keys, got 3",
        ),
        (
            ["model.training_setting.isr=[2]"],
            "unknown key 'model.training_setting.isr': 'model.training_setting' is a value, "
            "not a section",
        ),
        (
            ["model.training_setting={isr: [1]}", "+model.training_setting.isr=[2]"],
            "'model.training_setting.isr' cannot be added: 'model.training_setting' is a value, "
            "not a section",
        ),
        (["model.ln_eps=null"], "'model.ln_eps' expects a number or text, got null"),
    ],
)
def test_in_a_value_of_two_types(folder, arguments, expected):
    (folder / "model/mine.yaml").write_text("name: mine\ntraining_setting: full\nln_eps: 1.0")
    assert message(folder, "model=mine", *arguments) == expected


def test_in_a_saved_configuration(folder, tmp_path):
    saved = tmp_path / "saved.yaml"
    text = to_yaml(compose([], folder).values)
    saved.write_text(text.replace("steps:", "stepz:"))
    assert message(folder, "config=saved.yaml") == (
        "saved.yaml: unknown key 'schedule.stepz': did you mean 'steps'? "
        "Have: power, steps, validate_every"
    )
    saved.write_text("seed: 3\ntask: fit\n")
    assert message(folder, "config=saved.yaml") == (
        "saved.yaml has no 'callbacks', which every saved configuration has"
    )
    saved.write_text(text.replace("  power: 1.0\n", ""))
    assert message(folder, "config=saved.yaml") == (
        "saved.yaml has no 'schedule.power', which every saved configuration has"
    )
    saved.write_text(text)
    assert message(folder, "config=saved.yaml", "experiment=long") == (
        "experiment= does not go with config= or resume=, which have their own"
    )


def test_resuming_what_is_not_there(folder, tmp_path):
    (tmp_path / "runs/street").mkdir(parents=True)
    (tmp_path / "runs/street/config.yaml").write_text("seed: 1")
    assert message(folder, "resume=runs/stret") == (
        "resume=runs/stret: no run there (no runs/stret/config.yaml): "
        "did you mean 'street'? Have: street"
    )
