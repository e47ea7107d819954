"""Verifiable tasks: a question, the verifier that judges the answer, and the reference it compares with.

A set of tasks is a .jsonl file with one task a line:

    {"id": "sums-17", "source": "sums", "messages": [{"role": "user", "content": "2 + 3 = ?"}],
     "verifier": "exact", "reference": "5"}

A task may have `tools`, which the chat template writes into the prompt.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Task:
    """One question with a checkable answer.

    Attributes:
        id: unique in its file.
        source: the set that the task belongs to; results are shown by source.
        messages: the question as a chat; the last message is not the assistant's.
        verifier: a name that `nb_lightning.rewards.get_verifier` knows.
        reference: what the verifier compares with, as plain JSON.
        tools: functions that the model may call, as in OpenAI's API; None without any.
    """

    id: str
    source: str
    messages: list[dict[str, Any]]
    verifier: str
    reference: Any
    tools: list[dict[str, Any]] | None = None

    @property
    def key(self) -> str:
        """The task's name among the tasks of several files."""
        return f"{self.source}\n{self.id}"

    @property
    def question(self) -> str:
        """The text of the last message."""
        return str(self.messages[-1].get("content", ""))


_FIELDS = tuple(field.name for field in fields(Task) if field.name != "tools")


def read_tasks(path: str | Path) -> list[Task]:
    """Read the tasks of a .jsonl file; blank lines are skipped.

    Raises:
        ValueError: no such file, no task in it, or a line that is not a task; names file and line.
    """
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"tasks file {path} cannot be read: {error.strerror}") from error
    tasks: dict[str, Task] = {}
    for number, line in enumerate(raw.split(b"\n"), start=1):
        if line.strip():
            try:
                task = _task(line)
                if task.id in tasks:
                    raise ValueError(f"id {task.id!r} is there already")
            except ValueError as error:
                raise ValueError(f"{path}:{number}: not a task: {error}") from error
            tasks[task.id] = task
    if not tasks:
        raise ValueError(f"tasks file {path} holds no task")
    return list(tasks.values())


def read_task_files(paths: Iterable[str | Path], limit: int | None = None) -> list[Task]:
    """Read the tasks of several files, of each the first `limit`.

    Raises:
        ValueError: see `read_tasks`; or a task of one file is in another too.
    """
    tasks: dict[str, Task] = {}
    for path in paths:
        for task in read_tasks(path)[:limit]:
            if task.key in tasks:
                raise ValueError(f"{path}: task {task.id!r} of {task.source!r} is in another of the files too")
            tasks[task.key] = task
    return list(tasks.values())


def write_tasks(path: str | Path, tasks: Iterable[Task]) -> None:
    """Write tasks as a .jsonl file."""
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(f"{task_line(task)}\n" for task in tasks)


def task_line(task: Task) -> str:
    """Return the line of a .jsonl file for a task."""
    values = {name: value for name, value in asdict(task).items() if name != "tools" or value is not None}
    return json.dumps(values, ensure_ascii=False)


def _task(line: bytes) -> Task:
    value = json.loads(line.decode("utf-8-sig"))  # both errors are ValueErrors
    if not isinstance(value, dict) or value.keys() - {"tools"} != set(_FIELDS):
        content = ", ".join(value) if isinstance(value, dict) else type(value).__name__
        raise ValueError(
            f"it must be an object with exactly {', '.join(_FIELDS)}, and perhaps tools; found {content or 'nothing'}"
        )
    for name in ("id", "source", "verifier"):
        if not isinstance(value[name], str) or not value[name]:
            raise ValueError(f"{name} must be a string that is not empty")
    messages = value["messages"]
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) and "role" in m for m in messages):
        raise ValueError("messages must be a list of {role, content}")
    if messages[-1]["role"] == "assistant":
        raise ValueError("the last message is the assistant's; it is the model that is to answer")
    return Task(**{**value, "tools": _check_tools(value.get("tools"))})


def _check_tools(tools: Any) -> list[dict[str, Any]] | None:
    if tools is not None and not isinstance(tools, list):
        raise ValueError("tools must be a list")
    for number, tool in enumerate(tools or []):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f'tool {number} is not {{"type": "function", "function": {{"name": ...}}}}')
    return tools or None
