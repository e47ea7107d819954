"""Conversations become samples: every form of record, every bad one by name, every knob; through `data.prepare`."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import data.prepare.parts
from data.prepare.__main__ import main
from data.prepare.chats import Chats, chat_of
from data.prepare.make import prepare
from data.prepare.settings import ChatSettings, SourceSettings
from data.prepare.workers import BadRecord
from nb_lightning.checkpoints.tokenizer_files import load_tokenizer
from nb_lightning.text.chat_template import ChatTemplate
from nb_lightning.text.messages import ChatError
from nb_lightning.token_source import TRAINED, Source, SourceManifest
from tests.data.prepare.harness import content, s3_server
from tests.harness import ROOT

ASK, ANSWER = {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2", "reasoning_content": "Add."}
PAIR = [ASK, ANSWER]
TWO = [*PAIR, {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4", "reasoning_content": "Sum."}]
BYTES = SourceSettings("bytes", val_fraction=0.2, chat=ChatSettings())


def qwen3() -> str:
    return (ROOT / "tests/templates/qwen3_style.jinja").read_text()


def trained(marked: list[int] | np.ndarray) -> str:
    """What is trained on, with each stretch in brackets."""
    tokenizer, text, inside = load_tokenizer("bytes"), "", False
    for token in [*map(int, marked), 0]:
        if inside != bool(token & TRAINED):
            text, inside = text + ("]" if inside else "["), not inside
        text += tokenizer.decode([token & (TRAINED - 1)]) if inside else ""
    return text


def everything(marked: list[int]) -> str:
    return load_tokenizer("bytes").decode([token & (TRAINED - 1) for token in marked])


def samples_of(record: dict[str, Any], **chat: Any) -> list[list[int]]:
    (found,) = Chats(SourceSettings("bytes", chat=ChatSettings(**chat))).parse_many([record])
    if isinstance(found, ChatError):
        raise found
    return found[1]


def samples(record: dict[str, Any], **chat: Any) -> list[str]:
    return [trained(marked) for marked in samples_of(record, **chat)]


def stored(folder: Path, split: str = "train") -> list[np.ndarray]:
    source = Source(f"{folder}/{split}")
    ends = np.cumsum(source.samples()[:, 0])
    return [source.read_on(int(end - n), int(n)) for end, n in zip(ends, source.samples()[:, 0])]


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8")
    return path


def test_only_what_the_assistant_wrote_is_trained_and_nothing_follows_it() -> None:
    (marked,) = samples_of({"messages": TWO})
    assert trained(marked) == "[<think>\nAdd.\n</think>\n\n2<|im_end|>][<think>\nSum.\n</think>\n\n4<|im_end|>]"
    assert everything(marked) == ChatTemplate.chatml().render(TWO).removesuffix("\n")


@pytest.mark.parametrize(
    "record",
    [
        {"messages": PAIR},
        {"messages": PAIR, "tools": None, "id": 7},
        {"messages": PAIR, "tools": "", "system": ""},
        {"conversations": [{"from": "human", "value": "1+1?"}, {**ANSWER, "from": "gpt", "value": "2"}]},
        {"conversations": PAIR, "messages": None},
        {"prompt": "1+1?", "completion": "<think>\nAdd.\n</think>\n\n2"},
        {"prompt": [ASK], "completion": [ANSWER]},
        {"instruction": "1+1?", "output": "<think>\nAdd.\n</think>\n\n2"},
        {"instruction": "1+1?", "input": "", "output": "<think>\nAdd.\n</think>\n\n2", "history": [], "system": ""},
    ],
)  # fmt: skip
def test_forms_of_records(record: dict) -> None:
    assert samples(record) == ["[<think>\nAdd.\n</think>\n\n2<|im_end|>]"]


def test_alpaca_records() -> None:
    record = {"instruction": "Add.", "input": "1 and 1", "output": "2", "system": "Be exact.",
              "history": [["Hi", "Hello"], ["Ready?", "Yes"]]}  # fmt: skip
    (marked,) = samples_of(record)
    messages = [("system", "Be exact."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Ready?"),
                ("assistant", "Yes"), ("user", "Add.\n1 and 1"), ("assistant", "2")]  # fmt: skip
    as_messages = {"messages": [{"role": role, "content": content} for role, content in messages]}
    assert marked == samples_of(as_messages)[0]
    assert trained(marked) == "[Hello<|im_end|>][Yes<|im_end|>][2<|im_end|>]"


def test_system_and_tools_are_written() -> None:
    tool = {"type": "function", "function": {"name": "add"}}
    for tools in ([tool], json.dumps([tool])):
        (marked,) = samples_of({"messages": PAIR, "tools": tools, "system": "Be exact."})
        text = everything(marked)
        assert text.startswith("<|im_start|>system\nBe exact.\n\n# Tools") and '"add"' in text


@pytest.mark.parametrize(
    "record, reason",
    [
        ({}, "no messages: it has nothing"),
        ({"text": "x", "prompt": "y"}, "no messages: it has text, prompt"),
        ({"messages": None, "id": 1}, "no messages: it has id"),
        ({"instruction": "x"}, "no messages: it has instruction"),
        ({"instruction": "x", "output": ""}, "message 1: an empty assistant turn"),
        ({"instruction": ["x"], "output": "y"}, "instruction is not a text"),
        ({"instruction": "x", "input": 3, "output": "y"}, "input is not a text"),
        ({"instruction": "x", "output": {"a": 1}}, "message 1: content is not a string"),
        ({"instruction": "x", "output": "y", "history": "z"}, "history is not a list of pairs of texts"),
        ({"instruction": "x", "output": "y", "history": [["z"]]}, "history is not a list of pairs of texts"),
        ({"messages": "x"}, "messages are not a list"),
        ({"messages": []}, "no messages"),
        ({"messages": [ASK]}, "no assistant turn"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "message 0: unknown role 'bot'"),
        ({"messages": [ASK, {**ANSWER, "train": False}]}, "every assistant turn is marked train: false"),
        ({"messages": [ASK, {"role": "assistant", "content": ""}]}, "message 1: an empty assistant turn"),
        ({"conversations": "x"}, "messages are not a list"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "message 0: unknown role 'alien'"),
        ({"conversations": [{"from": "human"}]}, "message 0: no content"),
        ({"conversations": [{"from": ["human"], "value": "x"}]}, "unknown role"),
        ({"prompt": 1, "completion": "x"}, "prompt is neither a text nor a list of messages"),
        ({"prompt": "x", "completion": {}}, "completion is neither a text nor a list of messages"),
        ({"messages": PAIR, "tools": "{"}, "tools are not JSON"),
        ({"messages": PAIR, "tools": [1]}, "tools are not a list of objects"),
        ({"messages": PAIR, "system": 3}, "message 0: content is not a string"),
        ({"messages": [{"role": "system", "content": "x"}, *PAIR], "system": "y"}, "two system prompts"),
    ],
)  # fmt: skip
def test_bad_records(record: dict, reason: str) -> None:
    with pytest.raises(ChatError, match=reason):
        chat_of(record)


def test_train_false() -> None:
    first, second = "[<think>\nAdd.\n</think>\n\n2<|im_end|>]", "[<think>\nSum.\n</think>\n\n4<|im_end|>]"
    assert samples({"messages": [*TWO[:3], {**TWO[3], "train": False}]}) == [first]
    assert samples({"messages": [ASK, {**ANSWER, "train": False}, *TWO[2:]]}) == [second]
    assert samples({"messages": [ASK, {**ANSWER, "train": None}, *TWO[2:]]}) == [first + second]


def test_think_by_knob() -> None:
    assert samples({"messages": TWO}, think=False) == ["[2<|im_end|>][4<|im_end|>]"]
    inline = {"prompt": "<think>", "completion": " <think>a\nb</think>\n c</think>"}
    assert samples(inline, think=False) == ["[c</think><|im_end|>]"]
    assert samples(inline) == ["[ <think>a\nb</think>\n c</think><|im_end|>]"]


def test_history_whose_reasoning_the_template_leaves_out() -> None:
    first, last = "[<think>\nAdd.\n</think>\n\n2<|im_end|>]", "[<think>\nSum.\n</think>\n\n4<|im_end|>]"
    assert samples({"messages": TWO}, template=qwen3()) == [first, last]  # two samples
    assert samples({"messages": TWO}, template=qwen3(), history="mask") == [last]
    assert samples({"messages": TWO}, template=qwen3(), history="keep") == ["[2<|im_end|>]" + last]
    assert samples({"messages": [*TWO[:3], {**TWO[3], "train": False}]}, template=qwen3()) == [first]
    plain = [ASK, {"role": "assistant", "content": "2"}, *TWO[2:]]  # without reasoning there is nothing to lose
    assert samples({"messages": plain}, template=qwen3()) == ["[2<|im_end|>]" + last]
    silent = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    silent += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    with pytest.raises(ChatError, match="message 1: the template leaves out the reasoning"):
        samples({"messages": PAIR}, template=silent)
    with pytest.raises(ChatError, match="the reasoning of every turn to train on"):
        samples({"messages": PAIR}, template=silent, history="mask")
    assert samples({"messages": PAIR}, template=silent, think=False) == ["[2<|im_end|>]"]


DROPS_THOUGHTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content.split('</think>')[-1].strip() if m.role == 'assistant' else m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ONLY_CONTENT = DROPS_THOUGHTS.replace(".split('</think>')[-1].strip()", "")
INLINE = "<think>\nAdd.\n</think>\n\n2"
USER2 = {"role": "user", "content": "2+2?"}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}


def assistant(content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_in_any_field_is_trained_on(key: str) -> None:
    assert samples({"messages": [ASK, assistant("2", **{key: "Add."})]}) == [f"[{INLINE}<|im_end|>]"]


def test_a_thought_in_the_content_that_the_template_drops_is_no_silent_loss() -> None:
    for written in (INLINE, "Add.\n</think>\n\n2"):
        with pytest.raises(ChatError, match="message 1: the template leaves out the reasoning"):
            samples({"messages": [ASK, assistant(written)]}, template=DROPS_THOUGHTS)
    assert samples({"messages": [ASK, assistant(INLINE)]}, template=DROPS_THOUGHTS, think=False) == ["[2<|im_end|>]"]
    only_last = DROPS_THOUGHTS.replace("m.role == 'assistant'", "m.role == 'assistant' and not loop.last")
    both = [ASK, assistant(INLINE), USER2, assistant("4")]  # knows no reasoning_content
    assert samples({"messages": both}, template=only_last) == [f"[{INLINE}<|im_end|>]", "[4<|im_end|>]"]


@pytest.mark.parametrize("style", ["qwen3", "nanbeige"])
def test_a_thought_in_the_content_is_written_as_in_its_own_field(style: str) -> None:
    template = (ROOT / f"tests/templates/{style}_style.jinja").read_text()
    for first in (assistant("2"), assistant(INLINE)):
        records = [
            {"messages": [ASK, first, USER2, last]}
            for last in (assistant("<think>Sum.</think>4"), assistant("4", reasoning_content="Sum."))
        ]
        if first["content"] == INLINE:
            records[1]["messages"][1] = ANSWER
        inline, field = (samples_of(record, template=template) for record in records)
        assert inline == field


def test_templates_that_leave_out_calls_or_tools_are_named() -> None:
    tool = {"type": "function", "function": {"name": "get_weather"}}
    messages = [ASK, assistant(None, tool_calls=[CALL]), {"role": "tool", "content": "4"}, assistant("4")]
    with pytest.raises(ChatError, match="message 1: the template leaves out a tool call: 'get_weather'"):
        samples({"messages": messages}, template=ONLY_CONTENT)
    with pytest.raises(ChatError, match="the template leaves out the tools: 'get_weather'"):
        samples({"messages": [ASK, assistant("2")], "tools": [tool]}, template=ONLY_CONTENT)
    first_call = ONLY_CONTENT.replace("{{ m.content", "{{ m.tool_calls[0] | tojson if m.tool_calls else m.content")
    for calls, beside in (([CALL, CALL], ""), ([CALL], "Let me look.")):
        with pytest.raises(ChatError, match=r"message 1: the template leaves out (a tool call|the content beside)"):
            samples({"messages": [ASK, assistant(beside, tool_calls=calls)]}, template=first_call)
    assert len(samples({"messages": messages, "tools": [tool]}, template=None)) == 1


def test_calls_in_every_spelling_are_trained_on() -> None:
    written = '[<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>]'
    inner = CALL["function"]
    for value in (inner, [inner], json.dumps(inner), json.dumps([inner])):
        turns = [{"from": "human", "value": "?"}, {"from": "function_call", "value": value}]
        assert samples({"conversations": [*turns, {"from": "observation", "value": "4"}]}) == [written]
    assert samples({"messages": [ASK, assistant(None, function_call=inner)]}) == [written]
    assert samples({"messages": [ASK, assistant("Look.", function_call=inner)]}) == ["[Look.\n" + written[1:]]
    for value, problem in (("look", "is not JSON"), ([], "is empty"), ("[" * 100_000, "is not JSON")):
        with pytest.raises(ChatError, match=f"a function_call {problem}"):
            chat_of({"conversations": [{"from": "function_call", "value": value}]})


def test_without_thoughts_nothing_of_a_thought_is_trained_on() -> None:
    assert samples({"messages": [ASK, assistant("Add.\n</think>\n\n2")]}, think=False) == ["[2<|im_end|>]"]
    for turn in (assistant("<think>only</think>"), assistant("only</think>"), assistant("", reasoning_content="only")):
        with pytest.raises(ChatError, match="message 1: an empty assistant turn"):
            samples({"messages": [ASK, turn]}, think=False)
        assert "only" in samples({"messages": [ASK, turn]})[0]


@pytest.mark.parametrize("mark", [{"weight": 0}, {"loss": False}, {"train": False}])
def test_marked_turns_are_not_trained_on(mark: dict[str, Any]) -> None:
    assert samples({"messages": [ASK, assistant("5", **mark), USER2, assistant("4")]}) == ["[4<|im_end|>]"]
    shared = {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y", **mark}]}
    with pytest.raises(ChatError, match="every assistant turn is marked train: false"):
        samples(shared)


def test_examples_in_a_prompt_are_not_trained_on() -> None:
    prompt = [ASK, assistant("2"), USER2]
    for extra in ({}, {"system": "Be brief."}):
        assert samples({"prompt": prompt, "completion": "4", **extra}) == ["[4<|im_end|>]"]
        assert samples({"prompt": prompt, "completion": [assistant("4")], **extra}) == ["[4<|im_end|>]"]
    with pytest.raises(ChatError, match="no assistant turn"):
        samples({"prompt": prompt, "completion": [USER2]})


@pytest.mark.parametrize(
    "tools, problem",
    [
        ([{"name": "f", "description": "\ud83d"}], "not UTF-8"),
        ([{"name": "f", "limit": float("nan")}], "tools are not JSON"),
        ('[{"name": "f", "limit": Infinity}]', "tools are not JSON"),
        ("[" * 100_000, "tools are not JSON"),
    ],
)  # fmt: skip
def test_tools_are_checked_as_messages_are(tools: Any, problem: str) -> None:
    with pytest.raises(ChatError, match=problem):
        samples({"messages": PAIR, "tools": tools})


def test_conversations_that_begin_with_a_greeting_are_held_out_by_their_question() -> None:
    greeting = assistant("Hi!")
    chats = [chat_of({"messages": [greeting, {"role": "user", "content": q}, assistant(a)]}) for q, a in ("xy", "xz")]
    assert [chat.question for chat in chats] == [2, 2] and chats[0].messages[:2] == chats[1].messages[:2]
    assert chat_of({"messages": [{"role": "system", "content": "s"}, *PAIR]}).question == 2
    assert chat_of({"messages": [greeting]}).question == 0
    assert chat_of({"prompt": [ASK, assistant("2"), USER2], "completion": "4"}).question == 3


def dialogue(i: int) -> dict[str, Any]:
    answer = {"role": "assistant", "content": f"{2 * i} " * (i % 9 + 1)}
    return {"messages": [{"role": "user", "content": f"{i}+{i}?"}, answer]}


EXPECTED = ["[" + f"{2 * i} " * (i % 9 + 1) + "<|im_end|>]" for i in range(60)]


@pytest.mark.runs
def test_prepared_samples_come_back_whatever_holds_them(tmp_path: Path) -> None:
    records = [dialogue(i) for i in range(60)]
    write(tmp_path / "a.jsonl", records)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "c.parquet", row_group_size=17)
    datasets.Dataset.from_list([{**r, "n": 1} for r in records]).save_to_disk(tmp_path / "d")
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet", "d"):
        made = prepare([tmp_path / name], str(tmp_path / "out"), BYTES, overwrite=True, progress=False)
        found = [[trained(marked) for marked in stored(tmp_path / "out", split)] for split in ("train", "val")]
        assert sorted(found[0] + found[1]) == sorted(EXPECTED) and 3 < len(found[1]) < 25, name
        assert [m.documents for m in made.manifests.values()] == [len(found[0]), len(found[1])]
        train = made.manifests["train"]
        written = stored(tmp_path / "out")
        assert train.is_chat and train.trained == sum((marked & TRAINED > 0).sum() for marked in written)
        assert "samples" in str(made) and "trained of" in str(made)


@pytest.mark.runs
@pytest.mark.parametrize("workers", [1, 2])
def test_parts_and_workers_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    write(tmp_path / "a.jsonl", [dialogue(i) for i in range(60)])
    prepare([tmp_path / "a.jsonl"], str(tmp_path / "one"), BYTES, progress=False)
    monkeypatch.setattr(data.prepare.parts, "PART_BYTES", 1500)
    settings = SourceSettings("bytes", val_fraction=0.2, chunk_tokens=1024, chat=ChatSettings())
    prepare([tmp_path / "a.jsonl"], str(tmp_path / "many"), settings, workers=workers, progress=False)
    assert len(SourceManifest.read(f"{tmp_path}/many/train").chunks) > 3
    for split in ("train", "val"):
        one, many = stored(tmp_path / "one", split), stored(tmp_path / "many", split)
        assert all(map(np.array_equal, one, many)) and len(one) == len(many)


BAD = {
    3: ("broken", "invalid JSON"),
    7: ('{"messages": [{"role": "bot", "content": "x"}]}', "unknown role"),
    8: ("[]", "not a JSON object"),
    15: ('{"messages": [{"role": "user", "content": "x"}]}', "no assistant turn"),
    16: ("", "empty line"),
    30: ('{"prompt": "boom", "completion": "x"}', "the template raised"),
    44: ('{"messages": 5}', "messages are not a list"),
    45: ('{"prompt": "\\ud800", "completion": "x"}', "not UTF-8"),
}  # fmt: skip


@pytest.fixture
def mixed(tmp_path: Path) -> tuple[Path, SourceSettings]:
    """52 good records, and a bad one on each line that `BAD` names."""
    good = iter(dialogue(i) for i in range(60))
    write(tmp_path / "mixed.jsonl", [BAD[n][0] if n in BAD else next(good) for n in range(1, 61)])
    raising = "{% if messages[0].content == 'boom' %}{{ raise_exception('bang') }}{% endif %}"
    template = raising + (ROOT / "nb_lightning/text/chatml.jinja").read_text()
    return tmp_path / "mixed.jsonl", SourceSettings("bytes", val_fraction=0.2, chat=ChatSettings(template))


@pytest.mark.runs
@pytest.mark.parametrize("part_bytes", [2**26, 900])
def test_every_bad_record_is_named(
    tmp_path: Path, mixed: tuple[Path, SourceSettings], monkeypatch: pytest.MonkeyPatch, part_bytes: int
) -> None:
    path, settings = mixed
    monkeypatch.setattr(data.prepare.parts, "PART_BYTES", part_bytes)
    made = prepare([path], str(tmp_path / "out"), settings, progress=False)
    log = [json.loads(line) for line in (tmp_path / "out/dropped.jsonl").read_text().splitlines()]
    assert [(entry["file"], entry["line"], entry["reason"]) for entry in log] == [
        (str(path), line, reason) for line, (_, reason) in BAD.items()
    ]
    details = {entry["line"]: entry.get("detail", "") for entry in log}
    assert "unknown role 'bot'; allowed: system, user" in details[7] and "the template raised: bang" in details[30]
    assert made.manifests["train"].dropped == {reason: 1 for _, reason in BAD.values()}
    assert f"1 the template raised: {path}:30" in str(made)
    assert sum(m.documents for m in made.manifests.values()) == 52
    found = [trained(marked) for split in ("train", "val") for marked in stored(tmp_path / "out", split)]
    assert sorted(found) == sorted(EXPECTED[:52])


def test_the_first_bad_record_can_end_it(tmp_path: Path, mixed: tuple[Path, SourceSettings]) -> None:
    path, settings = mixed
    with pytest.raises(BadRecord, match=r"mixed.jsonl:3: invalid JSON"):
        prepare([path], str(tmp_path / "out"), settings, on_bad="fail", progress=False)
    lines = path.read_text().splitlines()
    lines[2] = json.dumps(dialogue(99))
    path.write_text("\n".join(lines))
    with pytest.raises(BadRecord, match=r"mixed.jsonl:7: message 0: unknown role 'bot'; allowed"):
        prepare([path], str(tmp_path / "out"), settings, on_bad="fail", overwrite=True, progress=False)


def test_rows_that_are_not_utf8(tmp_path: Path) -> None:
    raw = [b'"Hi"', b'"\xff"', b'"Ho"']
    cells = pyarrow.array(raw, pyarrow.binary()).cast(pyarrow.large_binary())
    text = pyarrow.LargeStringArray.from_buffers(3, cells.buffers()[1], cells.buffers()[2])
    table = pyarrow.table({"prompt": text, "completion": ["a", "b", "c"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    prepare([tmp_path / "a.parquet"], str(tmp_path / "out"), BYTES, progress=False)
    (entry,) = map(json.loads, (tmp_path / "out/dropped.jsonl").read_text().splitlines())
    assert (entry["line"], entry["reason"]) == (2, "not UTF-8")


def test_nothing_usable_says_why(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [dialogue(1)] * 3)
    broken = SourceSettings("bytes", chat=ChatSettings("{% for %}"))
    with pytest.raises(ValueError, match=r"none of the 3 .*: the template raised; the first: .*a.jsonl:1: the temp"):
        prepare([tmp_path / "a.jsonl"], str(tmp_path / "out"), broken, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_all_answers_to_a_question_are_held_out_together(tmp_path: Path) -> None:
    def record(question: int, answer: int) -> dict[str, Any]:
        return {"prompt": f"question {question}", "completion": f"{question}:{answer}"}

    write(tmp_path / "a.jsonl", [record(q, a) for a in range(4) for q in range(40)])
    prepare([tmp_path / "a.jsonl"], str(tmp_path / "out"), BYTES, progress=False)
    sides = [{trained(w).split(":")[0] for w in stored(tmp_path / "out", split)} for split in ("train", "val")]
    assert sides[0].isdisjoint(sides[1]) and len(sides[0] | sides[1]) == 40 and len(sides[1]) > 2


def test_held_out_input(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", [dialogue(i) for i in range(30)])
    val = write(tmp_path / "b.jsonl", [dialogue(i) for i in range(30, 40)])
    prepare([train], str(tmp_path / "out"), BYTES, val_inputs=[val], progress=False)
    assert [trained(marked) for marked in stored(tmp_path / "out", "train")] == EXPECTED[:30]
    assert [trained(marked) for marked in stored(tmp_path / "out", "val")] == EXPECTED[30:40]
    with pytest.raises(ValueError, match=r"b.jsonl is in both --input and --val-input"):
        prepare([train, val], str(tmp_path / "two"), BYTES, val_inputs=[val], progress=False)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a.jsonl", [{"messages": TWO, "n": i} for i in range(3)])
    (tmp_path / "qwen3.jinja").write_text(qwen3())
    (tmp_path / "README.md").write_text("not a conversation")
    base = ["--chat", "--input", str(tmp_path), "--output", str(tmp_path.with_name("out")), "--workers", "1"]
    main([*base, "--overwrite"])
    out = capsys.readouterr().out
    assert "files of other kinds: .jinja 1, .md 1" in out and "nothing was held out" in out
    first = content(tmp_path.with_name("out"))
    main([*base, "--overwrite", "--template", str(tmp_path / "qwen3.jinja"), "--history", "mask", "--no-think"])
    expected = "[2<|im_end|>][<think>\n\n</think>\n\n4<|im_end|>]"
    assert [trained(marked) for marked in stored(tmp_path.with_name("out"))] == [expected] * 3
    assert content(tmp_path.with_name("out")) != first
    for words, error in (
        (["--template", "nowhere.jinja"], "--template nowhere.jinja cannot be read"),
        (["--date", "today"], "--date is 'today'; give it as 2025-01-31"),
    ):
        with pytest.raises(SystemExit):
            main([*base, "--overwrite", *words])
        assert f"error: {error}" in capsys.readouterr().err


def test_a_damaged_index_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [dialogue(i) for i in range(30)])
    prepare([tmp_path / "a.jsonl"], str(tmp_path / "out"), BYTES, progress=False)
    path = tmp_path / "out/train/samples.npy"
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"train/samples.npy is missing or damaged .*SHA-256 differs"):
        Source(f"{tmp_path}/out/train").samples()
    path.unlink()
    with pytest.raises(ValueError, match=r"train/samples.npy is missing or damaged"):
        Source(f"{tmp_path}/out/train").samples()


@pytest.mark.slow
def test_streamed_from_s3(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [dialogue(i) for i in range(60)])
    prepare([tmp_path / "a.jsonl"], str(tmp_path / "here"), BYTES, progress=False)
    with s3_server(tmp_path / "cache") as client:
        client.create_bucket(Bucket="chats")
        prepare([tmp_path / "a.jsonl"], "s3://chats/maths", BYTES, staging=tmp_path / "staging", progress=False)
        there = Source("s3://chats/maths/train")
        assert there.manifest == SourceManifest.read(f"{tmp_path}/here/train")
        assert np.array_equal(there.samples(), Source(f"{tmp_path}/here/train").samples())
        assert np.array_equal(there.read_on(0, there.tokens), np.concatenate(stored(tmp_path / "here")))
