"""Conversations in the form of the Nanbeige family: what is trained on is what generation has to write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data import preview
from data.pairs.responses import render_last
from data.prepare.__main__ import main
from data.prepare.chats import Chats
from data.prepare.pairs import Pairs
from data.prepare.settings import ChatSettings, SourceSettings
from nb_lightning.checkpoints.tokenizer_files import load_tokenizer
from nb_lightning.text.chat_tokens import ChatTokenizer
from nb_lightning.text.messages import ChatError
from nb_lightning.token_source import SourceManifest
from tests.data.prepare.chat_harness import ASK, CALL, PAIR, TWO, USER2, assistant, everything, stored, trained, write
from tests.harness import ROOT

FILE = ROOT / "tests/text/templates/nanbeige42.jinja"
FAMILY = FILE.read_text("utf-8")
TOOL = {"type": "function", "function": {"name": "get_weather"}}
XML = "<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n</function>\n</tool_call>"
JSON = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
AGENT = [ASK, assistant("", reasoning_content="Look.", tool_calls=[CALL]), {"role": "tool", "content": "2"}]


def samples_of(record: dict[str, Any], form: type[Chats] = Chats, **settings: Any) -> list[list[int]]:
    chats = form(SourceSettings("bytes", chat=ChatSettings(FAMILY, **settings), pairs=form is Pairs))
    (parsed,) = chats.parse_many([record])
    if isinstance(parsed, ChatError):
        raise parsed
    return parsed[1]


def written(record: dict[str, Any], form: type[Chats] = Chats, **settings: Any) -> list[str]:
    return [trained(marked) for marked in samples_of(record, form, **settings)]


def chat(**variables: Any) -> ChatTokenizer:
    return ChatTokenizer.of(load_tokenizer("bytes"), FAMILY).with_variables(variables)


def test_turns_begin_after_the_opened_thought() -> None:
    assert written({"messages": TWO}) == ["[Add.\n</think>\n\n2<|im_end|>][Sum.\n</think>\n\n4<|im_end|>]"]
    assert written({"messages": [ASK, assistant("2")]}) == ["[\n</think>\n\n2<|im_end|>]"]
    for content in ("<think>\nAdd.\n</think>\n\n2", "Add.</think>2", "Add.\n</think>\n\n2"):
        assert written({"messages": [ASK, assistant(content)]}) == ["[Add.\n</think>\n\n2<|im_end|>]"]
    (marked,) = samples_of({"messages": TWO})
    text = everything(marked)
    assert text.startswith("<|im_start|>system\n你是一个有用的助手。<|im_end|>\n") and text.count("<|im_start|>") == 5


def test_every_trained_turn_follows_the_prompt_that_generation_has() -> None:
    messages = [*AGENT, assistant("2."), USER2, assistant("4", reasoning_content="Sum.")]
    for variables in ({}, {"preserve_thinking": False}, {"tool_call_format": "json"}):
        seen = {}
        for marked in samples_of({"messages": messages, "tools": [TOOL], "chat_template_kwargs": variables}):
            tokens, bits = [token & (2**30 - 1) for token in marked], [token >> 30 for token in marked]
            starts = [i for i in range(1, len(bits)) if bits[i] and not bits[i - 1]]
            for start in starts:
                seen[everything(marked[start:]).partition("<|im_end|>")[0]] = tokens[:start]
        prompts = [chat(**variables).prompt(messages[:n], [TOOL]) for n in (1, 3, 5)]
        assert sorted(seen.values()) == sorted(prompts) and len(seen) == 3, variables


def test_history_without_thoughts_is_expanded_masked_or_kept() -> None:
    messages, last = (
        [*AGENT, assistant("2."), USER2, assistant("4", reasoning_content="Sum.")],
        "[Sum.\n</think>\n\n4<|im_end|>]",
    )
    record = {"messages": messages, "tools": [TOOL], "chat_template_kwargs": {"preserve_thinking": False}}
    first, answer = f"[Look.\n</think>\n\n{XML}<|im_end|>]", "[\n</think>\n\n2.<|im_end|>]"
    assert written(record) == [first, answer, last]
    assert written(record, history="mask") == [last]
    assert written(record, history="keep") == [first.replace("Look.", "") + answer + last]
    assert written({**record, "chat_template_kwargs": None}) == [first + answer + last]


def test_calls_are_written_in_the_form_that_is_asked_for() -> None:
    record = {"messages": AGENT, "tools": [TOOL]}
    assert written(record) == [f"[Look.\n</think>\n\n{XML}<|im_end|>]"]
    json_calls: dict[str, Any] = {"template_kwargs": {"tool_call_format": "json"}}
    assert written(record, **json_calls) == [f"[Look.\n</think>\n\n{JSON}<|im_end|>]"]
    back = {**record, "chat_template_kwargs": json.dumps({"tool_call_format": "xml"})}  # the record's win
    assert written(back, **json_calls) == written(record)
    null = {**record, "chat_template_kwargs": {"tool_call_format": None}}  # as a table fills it in
    assert written(null, **json_calls) == written(record, **json_calls)


def test_where_the_prompt_closes_the_thought_the_answer_alone_is_trained() -> None:
    record = {"messages": [ASK, assistant("2")], "chat_template_kwargs": {"enable_thinking": False}}
    assert written(record) == ["[2<|im_end|>]"]
    (marked,) = samples_of(record)
    assert everything(marked).endswith("<think>\n\n</think>\n\n2<|im_end|>")
    with pytest.raises(ChatError, match="message 1: reasoning where the generation prompt closes the thought"):
        written({**record, "messages": PAIR})
    assert written({**record, "messages": PAIR}, think=False) == ["[2<|im_end|>]"]


@pytest.mark.parametrize("value", [3, "{", {"messages": []}, {"x": float("nan")}])
def test_bad_variables_of_a_record_are_a_bad_record(value: Any) -> None:
    for form, record in ((Chats, {"messages": PAIR}), (Pairs, {"prompt": "x", "chosen": "y", "rejected": "z"})):
        with pytest.raises(ChatError, match="chat_template_kwargs"):
            written({**record, "chat_template_kwargs": value}, form)


def test_pairs() -> None:
    texts = {"prompt": "1+1?", "chosen": "<think>\nAdd.\n</think>\n\n2", "rejected": "3"}
    lists = {"prompt": [ASK], "chosen": [PAIR[1]], "rejected": [assistant("3")]}
    for record in (texts, lists):
        assert written(record, Pairs) == ["[Add.\n</think>\n\n2<|im_end|>]", "[\n</think>\n\n3<|im_end|>]"]
    closed = {"chat_template_kwargs": {"enable_thinking": False}}
    for chosen in ("2", "<think>\n\n</think>\n\n2"):
        assert written({**texts, "chosen": chosen, **closed}, Pairs) == ["[2<|im_end|>]", "[3<|im_end|>]"]
    with pytest.raises(ChatError, match="reasoning where the generation prompt closes the thought"):
        written({**texts, **closed}, Pairs)


def test_a_rendered_answer_is_the_text_that_pairs_take() -> None:
    for message, text, variables in (
        (PAIR[1], "<think>\nAdd.\n</think>\n\n2", {}),
        (assistant("2"), "<think>\n\n</think>\n\n2", {}),
        (assistant("2"), "2", {"enable_thinking": False}),
    ):
        writer = chat(**variables)
        assert render_last([ASK, message], writer) == text
        assert writer.answered([ASK], text).ids == writer.encode([ASK, message]).ids[:-1]  # without the last new line


def test_the_command_records_the_variables_and_names_those_that_nobody_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "a.jsonl", [{"messages": [ASK, assistant("2")]}] * 2)
    base = ["--chat", "--input", str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "out"), "--workers", "1"]
    base += ["--template", str(FILE), "--overwrite", "--val-fraction", "0"]
    main([*base, "--template-kwargs", '{"enable_thinking": false, "colour": "red"}'])
    assert "note: the chat template does not read colour\n" in capsys.readouterr().err
    assert [trained(marked) for marked in stored(tmp_path / "out")] == ["[2<|im_end|>]"] * 2
    manifest = SourceManifest.read(f"{tmp_path}/out/train")
    assert manifest.template_kwargs == {"enable_thinking": False, "colour": "red"}
    preview.main([str(tmp_path / "out"), "--seq-len", "300"])
    out = capsys.readouterr().out
    assert 'variables of the template: {"enable_thinking": false, "colour": "red"}' in out
    assert "<think>\n\n</think>\n\n[2<|im_end|>]" in out
    main(base)
    assert capsys.readouterr().err.count("note") == 0
    plain = json.loads((tmp_path / "out/train/source.json").read_text())
    assert "template_kwargs" not in plain and plain["template"] == manifest.template
    for value, error in (
        ("[1]", "--template-kwargs is not a JSON object"),
        ('{"tools": 1}', "--template-kwargs sets tools"),
    ):
        with pytest.raises(SystemExit):
            main([*base, "--template-kwargs", value])
        assert f"error: {error}" in capsys.readouterr().err
