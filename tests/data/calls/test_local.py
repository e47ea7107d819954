"""Models on this machine as engines, and the flags that name engines."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from data.calls.budget import Budget, BudgetSpent
from data.calls.call import Call, Reply
from data.calls.caller import Caller
from data.calls.endpoint import Endpoint
from data.calls.engine import TOO_LONG
from data.calls.flags import add_call_flags, budget_of, check_call_flags, make_engine
from data.calls.local import REFUSED, LocalModel
from nb_lightning.checkpoints.pretrained import find_origin, load_pretrained
from nb_lightning.generation.decoder import generate
from nb_lightning.generation.sampling import Sampling
from nb_lightning.text.chat_tokens import ChatTokenizer
from tests.data.calls.harness import make_call, save_random_model

THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("model") / "tiny")


def drawn(texts: str = "abcdef", **more: Any) -> list[Call]:
    return [make_call(text, seed=5, number=n, sampling=Sampling(12), **more) for text in texts for n in range(2)]


@pytest.mark.runs
@pytest.mark.parametrize("template, opening", [(None, ""), (THINKS, "<think>\n")])
def test_replies_are_what_the_model_writes(folder: Path, tmp_path: Path, template: str | None, opening: str) -> None:
    calls = drawn()
    engine = LocalModel(str(folder), template, max_batch=3, device="cpu")
    replies = Caller(tmp_path).ask(engine, calls, "teacher")
    loaded = load_pretrained(str(folder), "cpu")
    chat = ChatTokenizer.of(loaded.tokenizer, template)
    prompts = [chat.prompt(call.messages) for call in calls]
    sampling = Sampling(12, stop_ids=(*loaded.stop_ids, chat.end_id))
    seeds = [[5, call.number] for call in calls]
    for reply, prompt, completion in zip(replies, prompts, generate(loaded.model, prompts, sampling, seeds)):
        assert reply is not None
        ids = completion.ids[:-1] if completion.finish_reason == "stop" else completion.ids
        assert reply.message == {"role": "assistant", "content": opening + loaded.tokenizer.decode(ids)}
        assert (reply.finish, reply.prompt_tokens) == (completion.finish_reason, len(prompt))
        assert reply.completion_tokens == len(completion.ids)
    assert len({reply.message["content"] for reply in replies if reply}) == len(calls)


@pytest.mark.runs
def test_a_call_that_cannot_be_asked_fails_alone(folder: Path, tmp_path: Path) -> None:
    engine = LocalModel(str(folder), device="cpu")
    engine._origin = type(find_origin(str(folder)))(folder, find_origin(str(folder)).shape, 40)  # 40 tokens of context
    calls = [make_call("a"), make_call("b" * 40), Call([{"role": "nobody", "content": "c"}], Sampling(8), 0)]
    caller = Caller(tmp_path, max_failed=0.7)
    assert [reply is None for reply in caller.ask(engine, calls, "teacher")] == [False, True, True]
    assert caller.summary()["failures"] == {TOO_LONG: 1, REFUSED: 1}


@pytest.mark.runs
def test_at_a_limit_the_rows_that_run_are_finished(folder: Path, tmp_path: Path) -> None:
    calls = drawn("abcdefghij")
    engine = LocalModel(str(folder), max_batch=2, device="cpu")
    with pytest.raises(BudgetSpent):
        Caller(tmp_path, Budget(tokens=1)).ask(engine, calls, "teacher")
    lines = (tmp_path / "calls.jsonl").read_text().splitlines()
    assert 1 <= len(lines) <= 4  # two run and two wait
    stopped = Caller(tmp_path).ask(engine, calls, "teacher")
    assert stopped == Caller(tmp_path / "whole").ask(engine, calls, "teacher")


@pytest.mark.runs
def test_who_a_model_is(folder: Path) -> None:
    digest = find_origin(str(folder)).digest()
    about = LocalModel(str(folder)).about()
    assert about == {"name": "tiny", "digest": digest, "prompts": about["prompts"]}
    other = LocalModel(str(folder), THINKS, variables={"enable_thinking": False}).about()
    assert other == {**about, "prompts": other["prompts"], "template_kwargs": {"enable_thinking": False}}
    reply = Reply({}, "stop", 1, 1)
    assert make_call("a").key(other) != make_call("a").key(about) and not reply.is_cut


@pytest.mark.runs
@pytest.mark.parametrize("content", [THINKS, None])
def test_equal_weights_beside_another_template_or_tokenizer_are_asked_anew(
    folder: Path, tmp_path: Path, content: str | None
) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    if content:
        (other / "chat_template.jinja").write_text(content)
    else:
        spec = json.loads((other / "tokenizer.json").read_text())
        spec["normalizer"] = {"type": "Lowercase"}
        (other / "tokenizer.json").write_text(json.dumps(spec))
    one, another = LocalModel(str(folder)).about(), LocalModel(str(other)).about()
    assert one["digest"] == another["digest"] and one["prompts"] != another["prompts"]


# Flags --------------------------------------------------------------------------------------------------------------


def flags(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_call_flags(parser)
    return parser.parse_args(words)


def test_flags_make_a_budget_and_engines() -> None:
    a = flags("--price", "0.5,2", "--budget", "3", "--max-calls", "7", "--timeout", "9", "--concurrency", "5")
    assert budget_of(a) == Budget(7, None, 3.0, (0.5, 2.0))
    endpoint = make_engine("--teacher", "http://host:8000/v1/", "big", a)
    assert isinstance(endpoint, Endpoint) and endpoint.about() == {"name": "big", "url": "http://host:8000/v1"}
    assert (endpoint.concurrency, endpoint.timeout) == (5, 9.0)
    local = make_engine("--teacher", "outputs/runs/sft", None, a)
    assert isinstance(local, LocalModel) and local.path == "outputs/runs/sft"


@pytest.mark.parametrize(
    "words, error",
    [
        (["--concurrency", "0"], "--concurrency is 0; it must be at least 1"),
        (["--max-batch", "0"], "--max-batch is 0; it must be at least 1"),
        (["--timeout", "0"], "--timeout is 0; it must be above 0 seconds"),
        (["--price", "3"], "--price is '3'; it must be two numbers: IN,OUT"),
        (["--price", "a,b"], "--price is 'a,b'; it must be two numbers: IN,OUT"),
        (["--budget", "0", "--price", "1,1"], "--budget is 0.0; it must be a number above 0"),
    ],
)
def test_flags_that_cannot_be(words: list[str], error: str) -> None:
    with pytest.raises(ValueError) as raised:
        check_call_flags(a := flags(*words))
        budget_of(a)
    assert str(raised.value) == error


@pytest.mark.parametrize("text", ["ftp://x/v1", "http://", "http://x:abc/v1", "http:// /v1"])
def test_an_address_that_cannot_be(text: str) -> None:
    with pytest.raises(ValueError) as raised:
        make_engine("--teacher", text, "big", flags())
    assert str(raised.value) == f"--teacher is {text!r}; an endpoint's address is http(s)://HOST[:PORT]/v1"


def test_a_key_in_an_address_is_refused_and_not_shown() -> None:
    with pytest.raises(ValueError) as raised:
        make_engine("--teacher", "https://user:sk-secret@host/v1", "big", flags())
    assert "secret" not in str(raised.value) and "the API key is read from OPENAI_API_KEY" in str(raised.value)
