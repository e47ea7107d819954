"""HumanEval's problems as tasks of the verifier "code".

    python -m nb_lightning.rewards.human_eval HumanEval.jsonl.gz > tasks.jsonl

A problem has `task_id`, `prompt` (the beginning of a Python file, up to a function without its body), `entry_point`
(its name) and `test` (source of `check(candidate)`, which asserts). The assertions are read, never run: those that
compare `candidate(...)` of literals with a literal become tests. A problem with any other statement in `check` is left
out, because its tests could not run apart from the solution; stderr names it with its line.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import json
import math
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nb_lightning.errors import one_line_errors
from nb_lightning.rewards.tasks import Task, task_line

FIELDS = ("task_id", "prompt", "entry_point", "test")
ASK = "Complete this function. Answer with the whole function, in a Python block.\n\n```python\n{prompt}\n```"
TOLERANCE = 1e-9  # Python's == takes 1 and 1.0 for equal


def read_problems(path: str | Path) -> Iterator[tuple[int, Task | ValueError]]:
    """Yield line number and task of each problem of a .jsonl or .jsonl.gz file, or why it is none.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        raw = Path(path).read_bytes()
        text = (gzip.decompress(raw) if str(path).endswith(".gz") else raw).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, task_of(json.loads(line))
            except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
                yield number, ValueError(str(error))


def task_of(problem: Any) -> Task:
    """Make a task of a problem.

    Raises:
        ValueError: a field is missing, or a statement of the test is no comparison with a literal.
        SyntaxError: `prompt` or `test` is not Python.
    """
    if not isinstance(problem, dict) or not all(isinstance(problem.get(name), str) for name in FIELDS):
        raise ValueError(f"not an object with texts {', '.join(FIELDS)}")
    entry, prompt = problem["entry_point"], problem["prompt"]
    function = next((node for node in ast.parse(prompt).body if _is_function(node, entry)), None)
    if function is None:
        raise ValueError(f"the prompt has no function {entry!r}")
    check = next((node for node in ast.parse(problem["test"]).body if _is_function(node, "check")), None)
    if check is None:
        raise ValueError("the test has no function check")
    tests, tolerance = [], TOLERANCE
    for statement in check.body:
        if (test := _test_of(statement)) is not None:
            arguments, expected, allowed = test
            tests.append({"args": _as_json(arguments), "expect": _as_json(expected)})
            tolerance = max(tolerance, allowed)
    if not tests:
        raise ValueError("the test has no assertion about candidate")
    reference = {"entry": entry, "private": tests, "tolerance": tolerance}
    prelude = "".join(prompt.splitlines(keepends=True)[: function.lineno - 1])
    if prelude.strip():
        reference["prelude"] = prelude
    message = {"role": "user", "content": ASK.format(prompt=prompt.rstrip())}
    return Task(problem["task_id"], "human_eval", [message], "code", reference)


def _is_function(node: ast.stmt, name: str) -> bool:
    return isinstance(node, ast.FunctionDef) and node.name == name


def _test_of(statement: ast.stmt) -> tuple[list[Any], Any, float] | None:
    """Read a statement of `check`: arguments, result and tolerance; None if it tests nothing.

    Raises:
        ValueError: it is none of the known forms.
    """
    if isinstance(statement, ast.Pass):
        return None
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):  # a docstring
        return None
    if isinstance(statement, ast.Assert):
        match statement.test:
            case ast.Constant(value=True):  # "This prints if this assert fails"
                return None
            case ast.Compare(left=left, ops=[ast.Eq() | ast.Is()], comparators=[right]):
                call, value = (left, right) if _is_call(left) else (right, left)
                if _is_call(call) and _is_literal(value):
                    return _arguments(call), ast.literal_eval(value), 0.0
            case ast.UnaryOp(op=ast.Not(), operand=call) if _is_call(call):
                return _arguments(call), False, 0.0
            case ast.Compare(
                left=ast.Call(func=ast.Name(id="abs"), args=[ast.BinOp(left=call, op=ast.Sub(), right=value)]),
                ops=[ast.Lt() | ast.LtE()],
                comparators=[ast.Constant(value=float(allowed))],
            ) if _is_call(call) and _is_literal(value):
                return _arguments(call), ast.literal_eval(value), allowed
            case call if _is_call(call):
                return _arguments(call), True, 0.0
    raise ValueError(f"the test does more than compare candidate with literals: {ast.unparse(statement)[:60]}")


def _is_call(node: ast.expr) -> bool:
    """Whether an expression is `candidate(...)` of literals."""
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "candidate"
        and not node.keywords
        and all(map(_is_literal, node.args))
    )


def _arguments(call: ast.expr) -> list[Any]:
    assert isinstance(call, ast.Call)
    return [ast.literal_eval(argument) for argument in call.args]


def _is_literal(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return False
    return True


def _as_json(value: Any) -> Any:
    """Write a value as references of the verifier "code" do (docs/rewards.md)."""
    if isinstance(value, list):
        return [_as_json(item) for item in value]
    if isinstance(value, tuple | set):
        return {"$tuple" if isinstance(value, tuple) else "$set": [_as_json(item) for item in value]}
    if isinstance(value, dict):
        return {"$dict": [[_as_json(key), _as_json(item)] for key, item in value.items()]}
    if isinstance(value, bytes):
        return {"$bytes": value.hex()}
    if isinstance(value, complex):
        return {"$complex": [value.real, value.imag]}
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": str(value)}
    if not isinstance(value, str | int | float | None):
        raise ValueError(f"the test has a value that no reference can hold: {value!r:.40}")
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description="Write HumanEval's problems as tasks, one JSON object a line.")
    parser.add_argument("file", help="HumanEval.jsonl or .jsonl.gz")
    file = parser.parse_args().file
    with one_line_errors():
        for number, task in read_problems(file):
            if isinstance(task, Task):
                print(task_line(task))
            else:
                print(f"left out: {file}:{number}: {task}", file=sys.stderr)


if __name__ == "__main__":
    main()
