"""The job of code.py: run a solution on inputs. It knows no expected answer.

In: {"code", "prelude", "entry" (a function, or Class.method), "calls": [encoded argument list, ...], "cpu", "wall"} or
{"code"}. The prelude is the task's own code, run before the solution in the same module.
Out, one JSON value a line: {"call": i, "value": encoded} or {"call": i, "error"}; {"error"} if the code itself fails;
{"done": exit code} for a program.
"""

from __future__ import annotations

import atexit
import builtins
import sys
import threading
import traceback
import types
from collections.abc import Callable
from typing import Any

import plain
import runner

FILE = "<solution>"


def main() -> int:
    job = runner.task()
    # Also as __stdout__: else, when a program replaces sys.stdout, the old object closes the descriptor.
    sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", errors="surrogateescape")
    sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8", errors="surrogateescape")
    builtins.exit = builtins.quit = _exit  # `python solution.py` has them from the module site, which is not loaded
    return _calls(job) if "entry" in job else _program(job)


def _exit(code: Any = None) -> None:
    raise SystemExit(code)


def _calls(job: dict[str, Any]) -> int:
    runner.arm(job)
    try:
        function = _find(_run(job["code"], "solution", job.get("prelude", "")), job["entry"])
    except BaseException as error:
        runner.report({"error": _describe(error)})
        return 1
    for i, arguments in enumerate(job["calls"]):
        runner.arm(job)
        try:
            runner.report({"call": i, "value": plain.encode(function(*plain.decode(arguments)))})
        except BaseException as error:
            runner.report({"call": i, "error": _describe(error)})
    return 0


def _program(job: dict[str, Any]) -> int:
    code: Any = 0
    try:
        try:
            _run(job["code"], "__main__")
        except SystemExit as error:
            code = error.code
        threading._shutdown()  # what an interpreter does at its end
        atexit._run_exitfuncs()
        sys.stdout.flush()
    except BaseException as error:
        runner.report({"error": _describe(error)})
        return 1
    code = 0 if code is None else code if isinstance(code, int) else 1
    runner.report({"done": code})
    return code & 0xFF


def _run(code: str, name: str, prelude: str = "") -> dict[str, Any]:
    module = types.ModuleType(name)
    sys.modules[name] = module  # dataclasses look the module up there
    exec(compile(prelude, "<prelude>", "exec", dont_inherit=True), module.__dict__)
    exec(compile(code, FILE, "exec", dont_inherit=True), module.__dict__)
    return module.__dict__


def _find(names: dict[str, Any], entry: str) -> Callable[..., Any]:
    first, _, method = entry.partition(".")
    if first not in names:
        raise NameError(f"the code defines no {first}")
    return getattr(names[first](), method) if method else names[first]


def _describe(error: BaseException) -> str:
    try:
        lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == FILE]
        where = f" (line {lines[-1]})" if lines else ""
        return f"{type(error).__name__}: {error}"[:300] + where
    except BaseException:
        return "an error that cannot be described"
