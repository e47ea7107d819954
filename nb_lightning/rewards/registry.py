"""Find a verifier by its name: a built-in one, or one of another package (entry points)."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points

from nb_lightning.rewards.tasks import Task
from nb_lightning.rewards.verifier import Guarded, Verifier

GROUP = "nb_lightning.rewards"  # entry points of other packages: name -> a callable that returns a Verifier
BUILT_IN = {
    "exact": "nb_lightning.rewards.exact:Exact",
    "code": "nb_lightning.rewards.code:Code",
    "math": "nb_lightning.rewards.math:Math",
    "reasoning_gym": "nb_lightning.rewards.reasoning_gym:ReasoningGym",
    "tool_call": "nb_lightning.rewards.tool_call:ToolCall",
    "ifeval": "nb_lightning.rewards.ifeval:IFEval",
    "preference": "nb_lightning.rewards.preference:refuse_without_model",
}


def get_verifier(name: str) -> Guarded:
    """Return the verifier of that name: built in, or from an installed package's entry points (`GROUP`).

    Raises:
        ValueError: no verifier has this name (the message lists the names), or its package cannot be imported. Also
            for "preference", which needs a reward model: `Guarded("preference", Preference(model))`.
    """
    if name in BUILT_IN:
        module, _, attribute = BUILT_IN[name].partition(":")
        return Guarded(name, getattr(importlib.import_module(module), attribute)())
    installed = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name not in installed:
        raise ValueError(f"no verifier is called {name!r}; there are: {', '.join(sorted({*BUILT_IN, *installed}))}")
    return Guarded(name, _load(installed[name]))


def get_verifiers(tasks: Iterable[Task], ready: Mapping[str, Guarded] = {}) -> dict[str, Guarded]:
    """Return the verifiers that tasks name, and check the reference of every task.

    Args:
        ready: verifiers that are not to be looked up, by name.

    Raises:
        ValueError: an unknown verifier, or a reference that its verifier cannot read; the latter names the task.
    """
    verifiers = dict(ready)
    for task in tasks:
        if task.verifier not in verifiers:
            verifiers[task.verifier] = get_verifier(task.verifier)
        try:
            verifiers[task.verifier].check(task.reference)
        except ValueError as error:
            raise ValueError(f"task {task.id!r}: {error}") from error
    return verifiers


def _load(entry: EntryPoint) -> Verifier:
    try:
        make = entry.load()
        if getattr(make, "in_process", False):
            return make()
        return importlib.import_module("nb_lightning.rewards.isolated").Isolated(entry, getattr(make, "limits", None))
    except Exception as error:
        raise ValueError(f"verifier {entry.name!r} ({entry.value}) cannot be loaded: {error}") from error
