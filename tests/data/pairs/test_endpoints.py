"""Teachers and judges behind an endpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data.calls.caller import Caller
from data.calls.endpoint import Endpoint as EndpointEngine
from data.pairs.__main__ import main
from data.pairs.judge import Comparison, EndpointJudge, compare
from data.pairs.responses import Sampler
from data.pairs.rule import NOT_PREFERRED, UNANSWERED
from nb_lightning.checkpoints.tokenizer_files import load_tokenizer
from nb_lightning.generation.sampling import Sampling
from nb_lightning.rewards.tasks import Task
from nb_lightning.text.chat_template import choose_by_tools
from nb_lightning.text.chat_tokens import ChatTokenizer
from nb_lightning.text.messages import ChatError
from tests.data.pairs.harness import Endpoint, command, lines

pytestmark = pytest.mark.runs


def test_a_teacher_behind_an_endpoint(models: Path, tmp_path: Path, endpoint: Endpoint) -> None:
    limit = ["--teacher", endpoint.url, "--teacher-model", "big", "--limit", "14"]
    endpoint.answer = lambda request: 400 if len(endpoint.requests) > 9 else {"content": "Answer: 7"}
    with pytest.raises(SystemExit) as stopped:
        main(command(models, tmp_path / "pairs", *limit, "--concurrency", "1"))
    assert str(stopped.value) == f"error: {endpoint.url}: BadRequestError (400): no"
    done = len(lines(tmp_path / "pairs/calls.jsonl"))
    assert done == 9
    endpoint.requests.clear()

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
        if request["messages"][0]["content"] == "13 + ?":
            return {"content": None, "tool_calls": [call]}
        return {"content": "Answer: 7", "reasoning_content": "It is 7.", "role": "assistant"}

    endpoint.answer = answer
    main(command(models, tmp_path / "pairs", *limit))
    assert len(endpoint.requests) == 2 * 14 - done
    assert {request["model"] for request in endpoint.requests} == {"big"}
    assert len({request["seed"] for request in endpoint.requests}) == len(endpoint.requests)
    chosen = {pair["id"]: pair["chosen"] for pair in lines(tmp_path / "pairs/pairs.jsonl")}
    assert chosen["t3"] == "Answer: 7"
    assert chosen["t12"] == "<think>\nIt is 7.\n</think>\n\nAnswer: 7"
    pairs = lines(tmp_path / "pairs/pairs.jsonl")
    assert pairs and all(pair["provenance"]["teacher"] == {"name": "big", "url": endpoint.url} for pair in pairs)


def test_a_spent_budget_is_one_line_and_a_larger_one_goes_on(models: Path, tmp_path: Path, endpoint: Endpoint) -> None:
    endpoint.answer = lambda request: {"content": "7"}
    words = ["--teacher", endpoint.url, "--teacher-model", "big", "--limit", "14", "--concurrency", "3"]
    output = tmp_path / "pairs"
    for limit in (0, 9, 31):
        with pytest.raises(SystemExit) as stopped:
            main(command(models, output, *words, "--max-calls", str(limit)))
        error = str(stopped.value)
        assert "\n" not in error
        if not limit:
            assert error == "error: --max-calls is 0; it must be a number above 0" and not output.exists()
            continue
        assert error.startswith(f"error: the budget is spent: {limit} calls of --max-calls {limit} (")
        assert error.endswith("and the same command with a larger budget goes on")
        assert len(lines(output / "calls.jsonl")) == limit
    main(command(models, output, *words))
    assert len(endpoint.requests) == 2 * 14  # the teacher's; the student is a model on this machine
    main(command(models, tmp_path / "whole", *words))
    assert (output / "pairs.jsonl").read_bytes() == (tmp_path / "whole/pairs.jsonl").read_bytes()
    calls = json.loads((output / "report.json").read_text())["calls"]
    assert calls["cached"] == 31 and calls["roles"]["teacher"]["calls"] == 28 == calls["roles"]["teacher"]["cached"]


@pytest.mark.parametrize(
    "reply",
    [{key: "It is 7."} for key in ("reasoning_content", "reasoning", "thinking")]
    + [{"reasoning": "It is 7.", "reasoning_content": "It is 7.", "reasoning_details": [{"text": "It is 7."}]}],
)  # fmt: skip
def test_a_teachers_reasoning_is_read_under_any_of_its_names(
    endpoint: Endpoint, tmp_path: Path, reply: dict[str, Any]
) -> None:
    endpoint.answer = lambda request: {"content": "7", "refusal": None, **reply}
    assert answer_of(endpoint, tmp_path) == ("<think>\nIt is 7.\n</think>\n\n7", "stop")


@pytest.mark.parametrize("is_old", [True, False])
def test_a_teachers_call_is_written(endpoint: Endpoint, tmp_path: Path, is_old: bool) -> None:
    call = {"name": "add", "arguments": '{"a": 1}'}
    form = {"function_call": call} if is_old else {"tool_calls": [{"id": "1", "type": "function", "function": call}]}
    endpoint.answer = lambda request: {"content": None, **form}
    assert answer_of(endpoint, tmp_path)[0] == '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


def test_a_task_s_tools_reach_the_teacher_and_its_call_is_written(endpoint: Endpoint, tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    endpoint.answer = lambda request: {"content": None, "tool_calls": [call]} if request["tools"] == tools else {}
    text, _ = answer_of(endpoint, tmp_path, tools=tools)
    assert text == '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


def test_the_end_of_a_turn_of_a_template_for_tools_is_no_part_of_a_response(endpoint: Endpoint, tmp_path: Path) -> None:
    template = "{%% for m in messages %%}<|im_start|>{{ m.role }}\n{{ m.content }}%s{%% endfor %%}"
    template += "{%% if add_generation_prompt %%}<|im_start|>assistant\n{%% endif %%}"
    chosen = choose_by_tools(template % "<|im_end|>", template % "<|endoftext|>")
    endpoint.answer = lambda request: {"content": "7"}
    for number, tools in enumerate((None, [{"type": "function", "function": {"name": "add"}}])):
        assert answer_of(endpoint, tmp_path / str(number), chosen, tools) == ("7", "stop")


def test_a_teachers_reasoning_that_the_students_template_leaves_out_is_named(
    models: Path, endpoint: Endpoint, tmp_path: Path
) -> None:
    plain = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    endpoint.answer = lambda request: {"content": "7", "reasoning": "It is 7."}
    with pytest.raises(ChatError) as error:
        answer_of(endpoint, tmp_path, plain)
    assert str(error.value) == "message 1: the template leaves out the reasoning"
    (tmp_path / "plain.jinja").write_text(plain)
    words = ["--teacher", endpoint.url, "--teacher-model", "big", "--chat-template", str(tmp_path / "plain.jinja")]
    with pytest.raises(SystemExit) as stopped:
        main(command(models, tmp_path / "pairs", *words, "--limit", "3"))
    assert str(stopped.value) == (
        f"error: not one pair of 3 prompts: 3 {UNANSWERED}; 6 replies are no responses: the template leaves out the "
        f"reasoning; the responses are in {tmp_path / 'pairs'}"
    )


def answer_of(
    endpoint: Endpoint, folder: Path, template: str | None = None, tools: list[dict[str, Any]] | None = None
) -> tuple[str, str]:
    chat = ChatTokenizer.of(load_tokenizer("bytes"), template)
    sampler = Sampler("teacher", EndpointEngine(endpoint.url, "big"), Sampling(8), 1, 0, chat)
    task = Task("t", "s", [{"role": "user", "content": "3 + 4?"}], "exact", "7", tools)
    (reply,) = Caller(folder).ask(sampler.engine, sampler.calls(task), "teacher")
    assert reply is not None
    return sampler.text(task, reply), reply.finish


def test_a_judge_sees_the_tools() -> None:
    judge = EndpointJudge(EndpointEngine("http://127.0.0.1:1/v1", "judge"))
    plain, with_tools = (
        judge.calls(Comparison([{"role": "user", "content": "3 + 4"}], "7", "8", tools))[0].messages[0]["content"]
        for tools in (None, [{"name": "add"}])
    )
    assert with_tools == plain.replace("user: 3 + 4", 'tools: [{"name": "add"}]\n\nuser: 3 + 4')


def test_a_judge_is_asked_both_ways_round(models: Path, tmp_path: Path, endpoint: Endpoint) -> None:
    judge = EndpointJudge(EndpointEngine(endpoint.url, "judge"))
    verdicts = {"first": "Both are fine.\nA", "seven": None, "none": "I cannot say."}

    def says(kind: str) -> None:
        def answer(request: dict[str, Any]) -> dict[str, Any]:
            question = request["messages"][0]["content"]
            seven_is_a = "<answer_A>\n7" in question
            return {"content": verdicts[kind] or ("So:\n**A**" if seven_is_a else "B")}

        endpoint.answer = answer

    asked = [Comparison([{"role": "user", "content": "3 + 4"}], "7", "8")]
    for kind, expected in (("first", 0.5), ("seven", 1.0), ("none", 0.5)):
        says(kind)
        assert compare(judge, asked, Caller(tmp_path / kind)) == [expected]
    assert compare(judge, [Comparison(asked[0].messages, "8", "7")], Caller(tmp_path / "none")) == [0.5]
    words = ["--judge", endpoint.url, "--judge-model", "judge", "--limit", "14"]
    says("first")
    with pytest.raises(SystemExit, match=f"{NOT_PREFERRED}"):
        main(command(models, tmp_path / "pairs", "--by", "both", *words))
    says("seven")
    main(command(models, tmp_path / "other", "--by", "judge", *words))
    pairs = lines(tmp_path / "other/pairs.jsonl")
    assert len(pairs) > 8 and all(pair["scores"]["preference"] == 1.0 for pair in pairs)
    assert {(pair["chosen"], pair["rejected"]) for pair in pairs} == {("7", "8")}
    assert pairs[0]["provenance"]["judge"]["name"] == "judge"
    endpoint.requests.clear()
    main(command(models, tmp_path / "other", "--by", "judge", *words))
    assert endpoint.requests == []
