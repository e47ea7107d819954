"""The job of isolated.py: run a verifier of another package. No jail, only limits of time and memory.

In: {"prompt", "reference", "completions"}. Out: {"reward", "info"} for each completion, or {"error"}.
In: only {"reference"}. Out: {"valid": true}, or {"valid": false, "error"} if the verifier's `check` refuses it.
"""

from __future__ import annotations

import importlib
from typing import Any

import runner

_verifiers: list[Any] = []


def prepare(setup: dict[str, Any]) -> None:
    """Construct the verifier once, in the zygote: every job is a fork that has it."""
    module, _, attribute = setup["argument"].partition(":")
    make = importlib.import_module(module)
    for name in attribute.split("."):
        make = getattr(make, name)
    _verifiers.append(make())


def main() -> int:
    job = runner.task()
    verifier = _verifiers[0]
    if "completions" not in job:
        try:
            getattr(verifier, "check", lambda reference: None)(job["reference"])
            runner.report({"valid": True})
        except ValueError as error:
            runner.report({"valid": False, "error": str(error)})
        return 0
    try:
        for score in verifier.score(job["prompt"], job["completions"], job["reference"]):
            runner.report({"reward": float(score.reward), "info": dict(score.info)})
    except Exception as error:
        runner.report({"error": f"{type(error).__name__}: {error}"[:300]})
    return 0
