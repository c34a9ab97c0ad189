"""What a configuration may hold: types by example, and the few values that are certain."""

from __future__ import annotations

import json
from types import NoneType
from typing import Any, get_args, get_origin

from segtrain.errors import UserError, did_you_mean

# The value in the YAML file states the type of a key: an integer takes integers, a float also
# takes integers, null takes anything. These keys take more, or less, than their example says.
UNIONS: dict[str, object] = {
    "name": str | None,
    "resume": str | None,
    "setting": str | dict | list | None,
    "ckpt": str | None,
    "weights": str | None,
    "encoder_weights": str | None,
    "policy_weights": str | None,
    "criterion.class_weights": list[float] | str | None,
    "criterion.hard_examples": dict | None,
    "data.eval_scale": list[int] | None,
    "data.limit_eval": int | None,
    "data.limit_train": int | None,
    "data.photometric": bool | str,
    "data.scale_step": float | None,
    "data.size_divisor": int | None,
    "data.superpatches": str | None,
    "data.train_scale": list[int] | None,
    "data.workers": int | str,
    "model.exits": list[int] | None,
    "model.ln_eps": float | str,
    "model.recalibration": str | None,
    "model.training_setting": str | dict,
    "callbacks.cost_curve.limit_batches": int | None,
    "callbacks.cost_curve.settings": list | None,
    "callbacks.ema": dict | None,
    "callbacks.pictures.settings": list | None,
    "gate.data": str | None,
    "tracking.entity": str | None,
    "tracking.group": str | None,
    "tracking.notes": str | None,
    "trainer.devices": int | str | list[int],
    "trainer.gradient_clip_val": float | None,
}

# The words that a key takes where it holds text.
WORDS = {
    "task": ("fit", "gate", "validate"),
    "criterion.class_weights": ("balanced",),
    "criterion.reduction": ("all", "valid"),
    "data.layout": ("ade20k", "cityscapes", "cocostuff"),
    "data.loader": ("shared_memory", "stock"),
    "data.on_error": ("raise", "skip"),
    "data.photometric": ("pil",),
    "data.photometric_on": ("auto", "device", "workers"),
    "data.superpatches": ("all", "ignore_void_borders"),
    "data.variant": ("10k", "164k"),
    "data.workers": ("auto",),
    "inference.mode": ("slide", "whole"),
    "optimizer.name": ("adamw", "sgd"),
    "nonfinite": ("skip", "stop"),
    "matmul_precision": ("high", "highest", "medium"),
    "tracking.mode": ("auto", "disabled", "offline", "online"),
}
POSITIVE = (
    "callbacks.checkpoints.every",
    "callbacks.cost_curve.every",
    "data.batch_size",
    "data.eval_batch_size",
    "data.scale_step",
    "inference.scales",
    "optimizer.learning_rate",
    "schedule.log_every",
    "schedule.steps",
    "schedule.validate_every",
    "trainer.accumulate_grad_batches",
    "trainer.num_nodes",
)
_TYPE_NAMES: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a section of keys",
    NoneType: "null",
}


def takes_text_only(key: str, example: object) -> bool:
    """Whether a value of this key is text whatever it looks like (a run may be called 007)."""
    return set(_kinds(key, example)) <= {str, NoneType}


def is_one_value(key: str) -> bool:
    """Whether a mapping at this key is a value, replaced as a whole, and not a section of keys."""
    return dict in get_args(UNIONS.get(key))


def conform(key: str, value: Any, example: object, source: str = "") -> Any:
    """The value, if it has a type that the key takes; an integer becomes a float where one is due.

    Raises:
        UserError: it has another type. `source` starts the message.
    """
    # What an interpolation stands for is checked when it is resolved.
    if (key not in UNIONS and example is None) or (isinstance(value, str) and "${" in value):
        return value
    return _conform(key, value, _kinds(key, example), source)


def _kinds(key: str, example: object) -> tuple[Any, ...]:
    if key in UNIONS:
        return get_args(UNIONS[key])
    if isinstance(example, list) and len({type(item) for item in example}) == 1:
        return (list[type(example[0])],)  # type: ignore[misc]
    return (type(example),)


def _conform(key: str, value: Any, kinds: tuple[Any, ...], source: str) -> Any:
    by_type = {get_origin(kind) or kind: kind for kind in kinds}
    if type(value) is int and int not in by_type and float in by_type:
        return float(value)
    if type(value) is float and value.is_integer() and int in by_type and float not in by_type:
        return int(value)
    if type(value) not in by_type:
        expected = " or ".join(_TYPE_NAMES[kind] for kind in by_type)
        got = repr(value) if isinstance(value, str) else json.dumps(value)
        raise UserError(f"{source}'{key}' expects {expected}, got {got}")
    items = get_args(by_type[type(value)])
    if items:
        return [_conform(f"{key}[{i}]", item, items, source) for i, item in enumerate(value)]
    return value


def check_values(values: dict[str, Any]) -> None:
    """The checks on values, by dotted key, that need no look at files, data or networks.

    Raises:
        UserError: a value is not one of the possible ones.
    """
    for key, words in WORDS.items():
        value = values.get(key)
        if isinstance(value, str) and value not in words:
            raise UserError(f"'{key}' cannot be '{value}': {did_you_mean(value, words)}")
    for key in POSITIVE:
        value = values.get(key)
        if isinstance(value, list) and not value:
            raise UserError(f"'{key}' needs at least one number")
        for number in value if isinstance(value, list) else [value]:
            if number is not None and number <= 0:
                raise UserError(f"'{key}' must be greater than 0, got {number}")
