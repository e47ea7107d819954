from __future__ import annotations

import json
from pathlib import Path

import pytest

from nb_lightning.checkpoints.tokenizer_files import load_tokenizer
from nb_lightning.rewards.tasks import Task, read_tasks, write_tasks
from nb_lightning.text.chat_tokens import ChatTokenizer

GOOD = {"id": "a", "source": "s", "messages": [{"role": "user", "content": "é?"}], "verifier": "exact", "reference": 1}


def line(**changes: object) -> str:
    value = {key: item for key, item in {**GOOD, **changes}.items() if item is not ...}
    return json.dumps(value)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    tasks = [
        Task("a", "s", [{"role": "user", "content": "é\n\u2028?"}], "code", {"x": [1, None]}),
        Task(**GOOD | {"id": "b"}),
    ]
    write_tasks(tmp_path / "t.jsonl", tasks)
    assert read_tasks(tmp_path / "t.jsonl") == tasks
    assert "tools" not in (tmp_path / "t.jsonl").read_text()


def test_tools_are_read_and_written(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    (tmp_path / "t.jsonl").write_text(f"{line(tools=tools)}\n{line(id='b', tools=None)}\n{line(id='c', tools=[])}\n")
    tasks = read_tasks(tmp_path / "t.jsonl")
    assert [task.tools for task in tasks] == [tools, None, None]
    write_tasks(tmp_path / "again.jsonl", tasks)
    assert read_tasks(tmp_path / "again.jsonl") == tasks


def test_the_prompt_of_a_task_has_its_tools() -> None:
    task = Task(**GOOD | {"tools": [{"type": "function", "function": {"name": "add"}}]})
    chat = ChatTokenizer.of(load_tokenizer("bytes"))
    ids = chat.prompt(task.messages, task.tools, require_tools=True)
    assert ids == chat.prompt(task.messages, task.tools) != chat.prompt(task.messages)
    deaf = ChatTokenizer.of(load_tokenizer("bytes"), "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    with pytest.raises(ValueError, match="the template leaves out the tools: 'add' is not in its text"):
        deaf.prompt(task.messages, task.tools, require_tools=True)


def test_blank_lines_and_a_byte_order_mark_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{line()}\r\n\n{line(id='b')}".encode())
    assert [task.id for task in read_tasks(tmp_path / "t.jsonl")] == ["a", "b"]


@pytest.mark.parametrize(
    "bad, reason",
    [
        ("{", "Expecting property name"),
        ("3", "found int"),
        (line(reference=...), "exactly id, source, messages, verifier, reference, and perhaps tools; found id, sour"),
        (line(tools={}), "tools must be a list"),
        (line(tools=["add"]), 'tool 0 is not {"type": "function", "function": {"name": ...}}'),
        (line(tools=[{"name": "add"}, {"function": {}}]), "tool 1 is not"),
        (line(more=1), "found id, source, messages, verifier, reference, more"),
        (line(id=""), "id must be a string"),
        (line(verifier=3), "verifier must be a string"),
        (line(messages=[]), "messages must be a list"),
        (line(messages=["hello"]), "messages must be a list"),
        (line(messages=[{"role": "assistant", "content": "x"}]), "last message is the assistant's"),
        (line(), "id 'a' is there already"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named(tmp_path: Path, bad: str, reason: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(f"{line()}\n\n{bad}\n")
    with pytest.raises(ValueError) as error:
        read_tasks(path)
    assert str(error.value).startswith(f"{path}:3: not a task: ") and reason in str(error.value)


def test_no_file_no_task_and_no_utf8_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_tasks(tmp_path / "none.jsonl")
    (tmp_path / "t.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no task"):
        read_tasks(tmp_path / "t.jsonl")
    (tmp_path / "t.jsonl").write_bytes(b'{"id": "\xff"}')
    with pytest.raises(ValueError, match=r"t.jsonl:1: not a task: .*utf-8"):
        read_tasks(tmp_path / "t.jsonl")
