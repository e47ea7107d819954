"""Say in one line why a config did not compose: the key, what is wrong with it, and what is allowed.

Hydra's own errors name a token of its grammar, or take ten lines. `explain` reads their fields and rewrites them.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError

_NO_NUMBER = re.compile(r"could not be converted to (Integer|Float)")
_BRACKETS = {")": "(", "]": "[", "}": "{"}


def explain(error: Exception, conf: Path) -> str:
    """Return the line for an error of `hydra.compose` or `hydra.main`.

    Args:
        conf: the folder of the YAML files, for the options of a group.
    """
    if isinstance(error, OverrideParseException):
        return _explain_syntax(error.override)
    if isinstance(error, MissingConfigException):
        return _explain_option(error, conf)
    cause, message = error.__cause__, " ".join(str(error).split())
    _, merges, override = str(error).partition("Error merging override ")
    if "Ambiguous value for argument" in message and (ambiguous := re.search(r"argument '(.*?)=(.*?)' 1\. ", message)):
        key, value = ambiguous.groups()
        return f"{key}={value} has a comma: write '{key}=[{value}]' for a list, {_quoted(key, value)} for a text"
    if isinstance(cause, ConfigAttributeError | ConfigKeyError):
        key, known = cause.full_key or message, _keys_of(cause.parent_node)
        if _is_open(cause.parent_node):
            entries = f" it has {', '.join(known)};" if known else ""
            return f"{key.rpartition('.')[0]} has no {cause.key};{entries} a new one begins with +: '+{key}=...'"
        return _unknown_key(key, str(cause.key), known)
    if isinstance(cause, ValidationError) and merges:
        key, _, value = override.lstrip("+").partition("=")
        return _explain_value(cause.full_key or key, value, str(cause).splitlines()[0])
    if isinstance(cause, OmegaConfBaseException):
        return f"{override.strip() or message}: {str(cause).splitlines()[0]}"
    return message


def require_known_keys(config: Any, path: str = "") -> None:
    """Refuse keys that the schema does not have: `+key=value` adds any.

    Args:
        config: a dataclass of the schema, or what one of its fields holds.
        path: its YAML key and a dot.

    Raises:
        ValueError: names the first unknown key, and those that are allowed.
    """
    if is_dataclass(config):
        known = [field.name for field in fields(config)]
        for key in vars(config):
            if key not in known:
                raise ValueError(_unknown_key(f"{path}{key}", key, known))
    children = vars(config) if is_dataclass(config) else config if isinstance(config, dict) else {}
    for key, child in children.items():
        require_known_keys(child, f"{path}{key}.")


def _explain_syntax(override: str) -> str:
    """Say why Hydra's grammar does not take an override, and how it is written."""
    key, equals, value = override.partition("=")
    if not equals or not key.strip("+~"):
        return f"{override!r} is no override: write key=value"
    return f"{override}: {_fault(value)}; quote it: {_quoted(key, value)}"


def _fault(value: str) -> str:
    """Name what is wrong with a value that is not quoted."""
    opened: list[str] = []
    quote = ""
    for before, char in zip(f" {value}", value):
        if quote:
            quote = "" if char == quote and before != "\\" else quote
        elif char in "'\"":
            quote = char
        elif char in _BRACKETS.values():
            opened.append(char)
        elif char in _BRACKETS and (not opened or opened.pop() != _BRACKETS[char]):
            return f"the value closes a {char} that was not opened"
    if quote:
        return f"the value opens a {quote} and does not close it"
    if opened:
        return f"the value opens a {opened[-1]} and does not close it"
    if "=" in value:
        return "the value holds a ="
    return "the value holds a character that has a meaning in Hydra's grammar"


def _quoted(key: str, value: str) -> str:
    """Write an override with its value as a text, as a shell takes it."""
    escaped = re.sub(r'(\\*)"', r'\1\1\\"', value)  # backslashes are doubled only before a quote
    trailing = len(escaped) - len(escaped.rstrip("\\"))
    return shlex.quote(f'{key}="{escaped}{chr(92) * trailing}"')


def _explain_option(error: MissingConfigException, conf: Path) -> str:
    """Name a group's options where one is asked for that does not exist."""
    group, _, option = (error.missing_cfg_file or "").rpartition("/")
    options = sorted(error.options or (path.stem for path in (conf / group).glob("*.yaml")))
    options = [name for name in options if name != "schema"]
    if not (conf / "train.yaml").is_file():
        return f"{conf} has no train.yaml: train.py must lie in its checkout, beside conf/"
    if not options:
        return f"{group}={option}: there is no such config; conf/{group}/ has none"
    return f"{group}={option}: there is no such config; allowed: {', '.join(options)}"


def _keys_of(parent: Any) -> list[str]:
    """List the keys that a node of the config may have."""
    schema = OmegaConf.get_type(parent) if isinstance(parent, DictConfig) else None
    if is_dataclass(schema):
        return [field.name for field in fields(schema)]
    return [str(key) for key in parent] if isinstance(parent, DictConfig) else []


def _is_open(parent: Any) -> bool:
    """Whether a node of the config takes keys of any name, as `data.sources` does."""
    return isinstance(parent, DictConfig) and OmegaConf.get_type(parent) is dict


def _unknown_key(full_key: str, key: str, known: Sequence[str]) -> str:
    """Name the closest of the known keys, or all of them."""
    close = get_close_matches(key, known, 1)
    if close:
        return f"{full_key} is not a key; did you mean {full_key.removesuffix(key)}{close[0]}?"
    return f"{full_key} is not a key; allowed: {', '.join(known) or 'none'}"


def _explain_value(key: str, value: str, reason: str) -> str:
    """Say what a value must be."""
    if number := _NO_NUMBER.search(reason):
        if number[1] == "Float":
            return f"{key} is {value}; it must be a number"
        try:
            exact = float(value)
        except ValueError:
            exact = 0.5
        hint = f": write {int(exact)}" if exact.is_integer() else ""
        return f"{key} is {value}; it must be an integer{hint}"
    if "is not a valid bool" in reason:
        return f"{key} is {value}; it must be true or false"
    if "is not Optional" in reason:
        return f"{key} is {value}; it needs a value"
    return f"{key} is {value}: {reason}"
