"""`python -m data.pairs`: which responses become a pair, going on after a stop, and endpoints."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from data.calls.caller import Caller
from data.calls.endpoint import Endpoint as EndpointEngine
from data.pairs.__main__ import main
from data.pairs.judge import Comparison, EndpointJudge, compare
from data.pairs.responses import Response, Sampler
from data.pairs.rule import CUT_OFF, EQUAL, FAILED, NEVER_RIGHT, NEVER_WRONG, NOT_PREFERRED, UNANSWERED, Rule
from data.prepare.__main__ import main as prepare
from data.prepare.pairs import Pairs
from data.prepare.settings import ChatSettings, SourceSettings
from nb_lightning.checkpoints.tokenizer_files import load_tokenizer
from nb_lightning.generation.sampling import Sampling
from nb_lightning.model.transformer import ModelShape, Transformer
from nb_lightning.rewards.tasks import Task, write_tasks
from nb_lightning.text.chat_template import choose_by_tools
from nb_lightning.text.chat_tokens import ChatTokenizer
from nb_lightning.text.messages import ChatError
from nb_lightning.token_source import Source
from tests.dpd_harness import save_model

pytestmark = pytest.mark.runs

# Which pairs are kept -----------------------------------------------------------------------------------------------


def r(text: str, reward: float = 1.0, finish: str = "stop", status: str = "") -> Response:
    return Response(text, finish, reward, status or ("correct" if reward == 1 else "wrong"))


RIGHT, WRONG, CUT, BROKEN = r("a"), r("b", 0.0), r("c", finish="length"), r("d", 0.0, status="verifier_error")


@pytest.mark.parametrize(
    "rule, teacher, student, expected",
    [
        (Rule(), [WRONG, RIGHT], [RIGHT, WRONG], [("a", "b")]),
        (Rule(), [WRONG, WRONG], [WRONG], NEVER_RIGHT),
        (Rule(), [CUT, WRONG], [WRONG], CUT_OFF),
        (Rule(), [BROKEN], [WRONG], FAILED),
        (Rule(), [BROKEN, RIGHT], [BROKEN], FAILED),  # a verifier that failed says nothing of the response
        (Rule(), [RIGHT], [RIGHT, r("x")], NEVER_WRONG),
        (Rule(), [RIGHT], [RIGHT, CUT, r("x", 0.5)], NEVER_WRONG),
        (Rule(margin=0.5), [RIGHT], [RIGHT, r("x", 0.5)], [("a", "x")]),
        (Rule(least=0.5, margin=0.5), [r("x", 0.5)], [WRONG], [("x", "b")]),
        (Rule(), [RIGHT], [r("a", 0.0)], EQUAL),  # a verifier of two minds
        (Rule(), [RIGHT], [r("c", 0.0, "length")], [("a", "c")]),  # one that never ends is a good rejected one
        (Rule(by="judge"), [WRONG], [r("x")], [("b", "x")]),
        (Rule(by="judge"), [RIGHT], [RIGHT], EQUAL),
        (Rule(by="judge"), [BROKEN], [BROKEN, RIGHT], [("d", "a")]),
        (Rule(by="judge"), [CUT], [WRONG], CUT_OFF),
        (Rule(by="both"), [WRONG], [RIGHT], NEVER_RIGHT),
    ],
)  # fmt: skip
def test_the_rule(rule: Rule, teacher: list[Response], student: list[Response], expected: Any) -> None:
    found = rule.choose_pairs(teacher, student, "seed")
    assert (found if isinstance(found, str) else [(c.text, d.text) for c, d in found]) == expected


def test_several_pairs_of_a_prompt() -> None:
    """They share no response, unless there are too few to choose."""
    teacher = [r(f"t{i % 4}") for i in range(8)] + [r("bad", 0.0)]
    student = [r(f"s{i % 3}", 0.0) for i in range(6)] + [r("good")]
    pairs = Rule(pairs=5).choose_pairs(teacher, student, "x")
    assert len(pairs) == 3 == len({c.text for c, _ in pairs}) == len({d.text for _, d in pairs})
    assert all(c.reward == 1 and d.reward == 0 for c, d in pairs)
    assert pairs == Rule(pairs=5).choose_pairs(teacher, student, "x")
    drawn = {Rule().choose_pairs(teacher, student, str(seed))[0][0].text for seed in range(40)}
    assert drawn == {"t0", "t1", "t2", "t3"}
    for chosen in (["t"], ["t", "u"]):
        pairs = Rule(pairs=5).choose_pairs([r(text) for text in chosen], student, "x")
        assert sorted(d.text for _, d in pairs) == ["s0", "s1", "s2"] and {c.text for c, _ in pairs} == set(chosen)
        assert len(Rule(pairs=2).choose_pairs([r("t")], student, "x")) == 2


@pytest.mark.parametrize("wrong", [{"by": "luck"}, {"margin": 0}, {"least": 2}, {"preference": 0}, {"pairs": 0}])
def test_a_rule_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^--"):
        Rule(**wrong)


# From models to a source --------------------------------------------------------------------------------------------


def bigram(follows: dict[str, str]) -> Transformer:
    """A model whose next token depends on the last one alone: one of the characters that may follow, equally often."""
    tokenizer = load_tokenizer("bytes").tokenizer
    model = Transformer(ModelShape(260, 64, 1, 1, 1, 64, 64))
    generator = torch.Generator().manual_seed(0)
    u = torch.nn.functional.normalize(torch.randn(260, 64, generator=generator), dim=1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.fill_(1.0) if p.dim() == 1 else p.zero_()
            if name == "embedding.weight":
                p.copy_(u)
        for before, after in follows.items():
            for token in after or ["<|im_end|>"]:
                id = tokenizer.token_to_id(token) if token.startswith("<|") else tokenizer.encode(token).ids[0]
                model.head.weight[id] += 3 * u[tokenizer.encode(before).ids[0]]
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that answers 7, a student that answers 7 or 8; and tasks: of three sevenths is the answer 9."""
    folder = tmp_path_factory.mktemp("models")
    save_model(bigram({"\n": "7", "7": ""}), folder / "teacher")
    save_model(bigram({"\n": "78", "7": "", "8": ""}), folder / "student")
    tasks = [
        Task(f"t{n}", "sums", [{"role": "user", "content": f"{n} + ?"}], "exact", "9" if n % 7 < 3 else "7")
        for n in range(28)
    ]
    write_tasks(folder / "tasks.jsonl", tasks)
    return folder


def command(models: Path, output: Path, *more: str) -> list[str]:
    names = {"tasks": models / "tasks.jsonl", "teacher": models / "teacher", "student": models / "student"}
    words = [word for name, path in names.items() for word in (f"--{name}", str(path))]
    return [*words, "--output", str(output), "--k", "2", "--max-new-tokens", "4", "--seed", "3", *more]


@pytest.fixture(scope="module")
def made(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("made") / "pairs"
    main(command(models, output))
    return output


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_teacher_right_and_the_student_wrong(models: Path, made: Path, tmp_path: Path) -> None:
    pairs = lines(made / "pairs.jsonl")
    assert 8 < len(pairs) < 16  # of the 16 it can be right in; a quarter of the students are right twice
    for pair in pairs:
        assert (pair["chosen"], pair["rejected"]) == ("7", "8") and int(pair["id"][1:]) % 7 >= 3
        assert pair["messages"] == [{"role": "user", "content": f"{pair['id'][1:]} + ?"}]
        assert pair["scores"]["chosen"] == {"reward": 1.0, "status": "correct"}
        assert pair["scores"]["rejected"] == {"reward": 0.0, "status": "wrong"}
        assert pair["scores"]["teacher"] == [1.0, 1.0] and 0.0 in pair["scores"]["student"]
        provenance = pair["provenance"]
        assert (provenance["teacher"]["name"], provenance["student"]["name"]) == ("teacher", "student")
        assert len(provenance["teacher"]["digest"]) == 64 != provenance["student"]["digest"]
        assert provenance["seed"] == 3 and provenance["sampling"]["temperature"] == 1.0
    report = json.loads((made / "report.json").read_text())
    assert report["prompts"] == 28 and report["with_pairs"] == report["pairs"] == len(pairs)
    none = {reason: len(ids) for reason, ids in report["none"].items()}
    assert none == {NEVER_RIGHT: 12, NEVER_WRONG: 16 - len(pairs)}
    assert report["sources"]["sums"]["teacher"] == pytest.approx(16 / 28)
    prepare(["--pairs", "--input", str(made / "pairs.jsonl"), "--output", str(tmp_path / "source"), "--workers", "1",
             "--tokenizer", str(models / "student"), "--val-fraction", "0.2", "--on-bad", "fail"])  # fmt: skip
    assert sum(len(Source(str(tmp_path / f"source/{split}")).samples()) for split in ("train", "val")) == 2 * len(pairs)


def test_stopped_anywhere_it_goes_on_to_the_same_pairs(models: Path, made: Path, tmp_path: Path) -> None:
    again = tmp_path / "pairs"
    again.mkdir()
    (again / "claim.json").write_bytes((made / "claim.json").read_bytes())
    whole = (made / "calls.jsonl").read_bytes()
    (again / "calls.jsonl").write_bytes(whole[: len(whole) // 2])  # in the middle of a line
    kept = whole[: len(whole) // 2].rpartition(b"\n")[0]
    main(command(models, again))
    assert (again / "pairs.jsonl").read_bytes() == (made / "pairs.jsonl").read_bytes()
    assert (again / "calls.jsonl").read_bytes().startswith(kept)
    assert sorted(lines(again / "calls.jsonl"), key=str) == sorted(lines(made / "calls.jsonl"), key=str)


def test_the_journals_of_an_earlier_version_are_refused(models: Path, made: Path, tmp_path: Path) -> None:
    again = tmp_path / "pairs"
    again.mkdir()
    claim = json.loads((made / "claim.json").read_text())
    del claim["version"]
    (again / "claim.json").write_text(json.dumps(claim))
    (again / "teacher.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit) as stopped:
        main(command(models, again))
    assert str(stopped.value) == (
        f"error: --output {again} holds responses in the journals of an earlier version, which are no longer read; "
        "name another folder, or replace them with --overwrite"
    )
    main(command(models, again, "--overwrite"))
    assert (again / "pairs.jsonl").read_bytes() == (made / "pairs.jsonl").read_bytes()
    assert not (again / "teacher.jsonl").exists()


def test_killed_before_the_claim_was_whole_it_begins_again(models: Path, made: Path, tmp_path: Path) -> None:
    again = tmp_path / "pairs"
    again.mkdir()
    (again / ".claim.json.tmp").write_text('{"tas')
    main(command(models, again))
    assert (again / "pairs.jsonl").read_bytes() == (made / "pairs.jsonl").read_bytes()


def test_overwriting_keeps_the_claim_until_the_new_one_is_there(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = tmp_path / "pairs"
    again.mkdir()
    (again / "claim.json").write_text('{"seed": 1}')

    def killed(folder: Path, claim: object) -> None:
        assert (folder / "claim.json").is_file()
        raise KeyboardInterrupt

    monkeypatch.setattr("data.prepare.claim.write_claim", killed)
    with pytest.raises(SystemExit):
        main(command(models, again, "--overwrite"))


def test_what_is_there_is_not_sampled_again(models: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.calls.local.load_pretrained", None)
    before = (made / "pairs.jsonl").read_bytes()
    main(command(models, made, "--margin", "0.5"))  # another rule needs no other responses
    assert (made / "pairs.jsonl").read_bytes() == before


def test_mistakes_are_one_line(models: Path, made: Path, tmp_path: Path) -> None:
    (tmp_path / "else").mkdir()
    (tmp_path / "else/notes.txt").touch()
    (tmp_path / "other.jinja").write_text("{{ messages }}")
    no_reason = f"not one pair of 28 prompts: 16 {NEVER_WRONG}, 12 {NEVER_RIGHT}; the responses are in"
    for words, error in (
        (
            command(models, made, "--seed", "4"),
            "holds responses of other seed; name another folder, or",
        ),
        (command(models, tmp_path / "else"), "holds something else (notes.txt); name another folder"),
        (command(models, tmp_path / "x", "--student", str(models / "teacher")), no_reason),
        (
            command(models, tmp_path / "y", "--by", "both"),
            "--by both needs --judge: a run of stage=reward_model, or an endpoint",
        ),
        (command(models, tmp_path / "y", "--teacher", "http://x/v1"), "name its model with --teacher-model"),
        (command(models, tmp_path / "y", "--student", "http://x/v1"), "--student is an endpoint; it must be a local"),
        (command(models, tmp_path / "y", "--teacher", "nowhere"), "no checkpoint at 'nowhere'"),
        (command(models, tmp_path / "y", "--k", "0"), "--k is 0; it must be at least 1"),
        (command(models, tmp_path / "y", "--margin", "2"), "--margin is 2.0; it must be above 0 and at most 1"),
        (command(models, tmp_path / "y", "--chat-template", "nowhere"), "--chat-template nowhere cannot be read"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert error in str(stopped.value) and "\n" not in str(stopped.value)
    assert not (tmp_path / "y").exists()


def test_pairs_are_prepared_with_the_variables_they_were_sampled_with(models: Path, tmp_path: Path) -> None:
    (tmp_path / "noted.jinja").write_text(
        "{{ note | default('') }}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    words = [
        "--chat-template",
        str(tmp_path / "noted.jinja"),
        "--template-kwargs",
        '{"note": "Hush."}',
        "--limit",
        "14",
    ]
    main(command(models, tmp_path / "pairs", *words))
    pairs = lines(tmp_path / "pairs/pairs.jsonl")
    assert all(pair["chat_template_kwargs"] == {"note": "Hush."} for pair in pairs)
    form = Pairs(SourceSettings("bytes", chat=ChatSettings((tmp_path / "noted.jinja").read_text()), pairs=True))
    _, (chosen, _) = form.parse(pairs[0])
    noted = form.encoder.with_variables({"note": "Hush."})
    prompt = noted.prompt(pairs[0]["messages"])
    assert chosen[: len(prompt)] == prompt and form.tokenizer.decode(prompt).startswith("Hush.<|im_start|>")


# Endpoints ----------------------------------------------------------------------------------------------------------


class Endpoint(ThreadingHTTPServer):
    """Answers chats with `self.answer(request)`: a message, or a status."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.answer: Any = None
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.requests.append(request)
                answer = server.answer(request)
                body: dict[str, Any] = {"error": {"message": "no"}}
                if isinstance(answer, dict):
                    choice = {"index": 0, "finish_reason": answer.pop("finish", "stop"), "message": answer}
                    body = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
                self.send_response(200 if isinstance(answer, dict) else answer)
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(json.dumps(body).encode())

            def log_message(self, *_: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    server = Endpoint()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


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
