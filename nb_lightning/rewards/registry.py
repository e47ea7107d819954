"""Find a verifier by its name: a built-in one, or one of another package (entry points)."""

from __future__ import annotations

import importlib
from importlib.metadata import EntryPoint, entry_points

from nb_lightning.rewards.verifier import Guarded, Verifier

GROUP = "nb_lightning.rewards"  # entry points of other packages: name -> a callable that returns a Verifier
BUILT_IN = {
    "exact": "nb_lightning.rewards.exact:Exact",
    "code": "nb_lightning.rewards.code:Code",
    "math": "nb_lightning.rewards.math:Math",
    "reasoning_gym": "nb_lightning.rewards.reasoning_gym:ReasoningGym",
    "tool_call": "nb_lightning.rewards.tool_call:ToolCall",
    "ifeval": "nb_lightning.rewards.ifeval:IFEval",
    "preference": "nb_lightning.rewards.preference:unnamed",
}


def get_verifier(name: str) -> Guarded:
    """The verifier of that name: built in, or from an installed package's entry points (`GROUP`).

    Raises:
        ValueError: no verifier of this name, or its package cannot be imported. The message lists the names. Or
            "preference", which needs a reward model: `Guarded("preference", Preference(model))`.
    """
    if name in BUILT_IN:
        module, _, attribute = BUILT_IN[name].partition(":")
        return Guarded(name, getattr(importlib.import_module(module), attribute)())
    outside = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name not in outside:
        raise ValueError(f"no verifier is called {name!r}; there are: {', '.join(sorted({*BUILT_IN, *outside}))}")
    return Guarded(name, _load(outside[name]))


def _load(entry: EntryPoint) -> Verifier:
    try:
        make = entry.load()
        if getattr(make, "in_process", False):
            return make()
        return importlib.import_module("nb_lightning.rewards.isolated").Isolated(entry, getattr(make, "limits", None))
    except Exception as error:
        raise ValueError(f"verifier {entry.name!r} ({entry.value}) cannot be loaded: {error}") from error
