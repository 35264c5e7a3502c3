"""Dictionaries given as strings on a command line."""

from __future__ import annotations

import json
from typing import Any

from fts.errors import ArgumentError

TRUE_VALUES = ("1", "true", "yes", "on", "y", "t")
"""Values of an environment variable that mean true, in lower case."""


def parse_json_dict(name: str, text: str) -> dict[str, Any]:
    """The dictionary in a JSON string; numbers and booleans in quotes are converted.

    >>> parse_json_dict("lr_scheduler_kwargs", '{"num_cycles": "2", "nested": {"on": "true"}}')
    {'num_cycles': 2, 'nested': {'on': True}}
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ArgumentError(f"{name}={text!r} is not JSON ({error}). Write it like '{{\"key\": 1}}'.") from error
    return {key: _convert(item) for key, item in value.items()}


def format_key_values(name: str, values: dict[str, Any]) -> str:
    """A dictionary as a string like "a=1,b=2".

    >>> format_key_values("optim_args", {"rank": 64, "scale": 0.1})
    'rank=64,scale=0.1'
    """
    pairs = [f"{key}={value}" for key, value in values.items()]
    if any("," in pair or isinstance(value, (dict, list)) for pair, value in zip(pairs, values.values(), strict=True)):
        raise ArgumentError(f"{name}={values!r} must contain only numbers, booleans and words, such as {{'rank': 64}}.")
    return ",".join(pairs)


def parse_key_values(name: str, text: str) -> dict[str, str]:
    """The pairs of a string like "a=1, b=2".

    >>> parse_key_values("optim_args", "rank=64, scale=0.1")
    {'rank': '64', 'scale': '0.1'}
    """
    pairs = [item.partition("=") for item in text.replace(" ", "").split(",") if item]
    if not all(key and sign and value for key, sign, value in pairs):
        raise ArgumentError(f"{name}={text!r} must be pairs like 'rank=64,scale=0.1'.")
    return {key: value for key, _, value in pairs}


def _convert(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _convert(item) for key, item in value.items()}
    if not isinstance(value, str):
        return value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    if value.isdigit():
        return int(value)
    return float(value) if value.replace(".", "", 1).isdigit() else value
