"""The journal, keys, budgets and failures of `data.calls.Caller`, with an engine that answers at once."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tqdm import tqdm

from data.calls.budget import Budget, BudgetSpent, Spent
from data.calls.call import Call, Reply, join_seeds
from data.calls.caller import Caller, TooManyFailed
from nb_lightning.generation.sampling import Sampling
from tests.data.calls.harness import Echo, make_call
from tests.harness import ROOT


def texts(replies: list[Reply | None]) -> list[str | None]:
    return [reply.message["content"] if reply else None for reply in replies]


# Keys ---------------------------------------------------------------------------------------------------------------


def test_a_key_is_the_sha256_of_everything_that_the_reply_depends_on() -> None:
    call = Call([{"role": "user", "content": "é"}], Sampling(8, 0.5), seed=7, number=2)
    sampling = {"max_new_tokens": 8, "temperature": 0.5}
    content = json.dumps(
        [{"name": "m"}, [{"content": "é", "role": "user"}], sampling, 7, 2], sort_keys=True
    )  # written by hand: another order of a message's keys is the same call
    assert call.key({"name": "m"}) == hashlib.sha256(content.encode()).hexdigest()
    same = Call([{"content": "é", "role": "user"}], Sampling(8, 0.5, top_k=0), 7, 2)
    assert same.key({"name": "m"}) == call.key({"name": "m"})
    others = [
        Call([{"role": "user", "content": "e"}], Sampling(8, 0.5), 7, 2),
        Call(call.messages, Sampling(9, 0.5), 7, 2),
        Call(call.messages, Sampling(8, 0.5), 8, 2),
        Call(call.messages, Sampling(8, 0.5), 7, 3),
    ]
    keys = {c.key({"name": "m"}) for c in [call, *others]} | {call.key({"name": "n"})}
    assert len(keys) == 6


@pytest.mark.parametrize("parts", [(3,), (0, 5), (7, 123456, 0), (7, 123456, 3), (2**33, 9, 1), (2**32 - 1, 2**32 - 1)])
def test_joined_seeds_draw_what_numpy_draws_from_the_sequence(parts: tuple[int, ...]) -> None:
    expected = np.random.default_rng(list(parts)).random(4)
    assert np.random.default_rng(join_seeds(*parts)).random(4).tolist() == expected.tolist()


# The journal --------------------------------------------------------------------------------------------------------


def test_replies_come_in_the_order_of_the_calls_and_are_paid_once(tmp_path: Path) -> None:
    engine = Echo()
    calls = [make_call(text) for text in ("a", "b", "a", "c")]
    caller = Caller(tmp_path)
    assert texts(caller.ask(engine, calls, "teacher")) == ["a", "b", "a", "c"]
    assert texts(caller.ask(engine, [make_call("d"), make_call("b")], "critic")) == ["d", "b"]
    again = Caller(tmp_path)
    assert texts(again.ask(engine, calls, "teacher")) == ["a", "b", "a", "c"]
    assert engine.asked == ["a", "b", "c", "d"]
    assert len((tmp_path / "calls.jsonl").read_text().splitlines()) == 4
    summary = again.summary()
    assert (summary["calls"], summary["cached"], summary["failed"]) == (3, 3, 0)
    assert caller.summary()["roles"]["critic"]["calls"] == 1  # "b" was the teacher's


def test_equal_contents_with_other_numbers_are_other_calls(tmp_path: Path) -> None:
    engine = Echo()
    Caller(tmp_path).ask(engine, [make_call("a", number=n) for n in range(3)], "teacher")
    assert engine.asked == ["a"] * 3


def test_a_torn_last_line_is_cut_off_and_asked_again(tmp_path: Path) -> None:
    engine, path = Echo(), tmp_path / "calls.jsonl"
    calls = [make_call(text) for text in "abc"]
    Caller(tmp_path).ask(engine, calls, "teacher")
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        engine.asked.clear()
        assert texts(Caller(tmp_path).ask(engine, calls, "teacher")) == ["a", "b", "c"]
        assert path.read_bytes() == whole
        assert len(engine.asked) == 3 - whole[:length].count(b"\n")


def test_a_reply_is_in_the_file_before_the_next_is_asked(tmp_path: Path) -> None:
    path = tmp_path / "calls.jsonl"

    class Watching(Echo):
        def answer(self, calls: Any, on_reply: Any) -> None:
            for i, _ in enumerate(calls):
                assert len(path.read_bytes().splitlines()) == i
                on_reply(i, Reply({"role": "assistant", "content": "x"}, "stop", 1, 1))

    Caller(tmp_path).ask(Watching(), [make_call(text) for text in "abc"], "teacher")


def test_a_reply_comes_back_as_it_was(tmp_path: Path) -> None:
    message = {"role": "assistant", "content": "é \ud800", "tool_calls": [{"function": {"arguments": "{"}}]}
    reply = Reply(message, "tool_calls", 3, 2, 4, 1.5, {"HTTP 429": 3})

    class Once(Echo):
        def answer(self, calls: Any, on_reply: Any) -> None:
            on_reply(0, reply)

    for _ in range(2):
        assert Caller(tmp_path).ask(Once(), [make_call("a")], "teacher") == [reply]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    Caller(tmp_path).ask(Echo(), [make_call("a")], "teacher")
    path = tmp_path / "calls.jsonl"
    path.write_bytes(path.read_bytes() + b'{"key": 3}\n')
    with pytest.raises(ValueError, match=r"calls\.jsonl:2: not the reply to a call .*; remove the line"):
        Caller(tmp_path).ask(Echo(), [make_call("a")], "teacher")


def test_one_process_writes_at_a_time(tmp_path: Path) -> None:
    class Nosy(Echo):
        def answer(self, calls: Any, on_reply: Any) -> None:
            code = (
                "import sys, pathlib; from data.calls.caller import Caller; "
                "from tests.data.calls.harness import Echo, make_call; "
                "Caller(pathlib.Path(sys.argv[1])).ask(Echo(), [make_call('b')], 'r')"
            )
            done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
            assert f"another process writes {tmp_path / 'calls.jsonl'}; wait until it is done" in done.stderr
            super().answer(calls, on_reply)

    Caller(tmp_path).ask(Nosy(), [make_call("a")], "teacher")


# Budgets ------------------------------------------------------------------------------------------------------------


def test_what_calls_cost() -> None:
    budget = Budget(money=1.0, price=(0.5, 2.0))
    spent = Spent()
    spent.add(Reply({}, "stop", 300_000, 100_000), priced=True)
    spent.add(Reply({}, "stop", 999_999, 999_999), priced=False)
    assert budget.cost(spent) == pytest.approx(0.3 * 0.5 + 0.1 * 2.0)
    assert budget.reached(spent) == ""
    spent.add(Reply({}, "stop", 0, 325_000), priced=True)
    assert budget.reached(spent) == "1 of --budget 1"


@pytest.mark.parametrize(
    "limits, asked, words",
    [
        ({"calls": 3}, 3, "3 calls of --max-calls 3"),
        ({"tokens": 40}, 3, "42 tokens of --max-tokens 40"),  # 14 a call
        ({"tokens": 42}, 3, "42 tokens of --max-tokens 42"),
        ({"money": 0.00004, "price": (1.0, 2.0)}, 3, "5.4e-05 of --budget 4e-05"),  # 18 millionths a call
    ],
)
def test_at_a_limit_it_stops_and_the_same_command_with_a_larger_one_goes_on(
    limits: dict[str, Any], asked: int, words: str, tmp_path: Path
) -> None:
    engine = Echo(url="http://x/v1")
    calls = [make_call(text) for text in "abcde"]
    for _ in range(2):  # the second time nothing is left to spend
        with pytest.raises(BudgetSpent) as stopped:
            Caller(tmp_path, Budget(**limits)).ask(engine, calls, "teacher")
        assert f"the budget is spent: {words} (" in str(stopped.value) and "\n" not in str(stopped.value)
        assert str(stopped.value).endswith("the same command with a larger budget goes on")
        assert engine.asked == list("abcde")[:asked]
    larger = {name: value if name == "price" else 100 * value for name, value in limits.items()}
    assert texts(Caller(tmp_path, Budget(**larger)).ask(engine, calls, "teacher")) == list("abcde")
    assert engine.asked == list("abcde")


def test_a_budget_that_is_just_enough_stops_nothing(tmp_path: Path) -> None:
    calls = [make_call(text) for text in "abc"]
    caller = Caller(tmp_path, Budget(calls=3, tokens=42))
    assert texts(caller.ask(Echo(), calls, "teacher")) == ["a", "b", "c"]
    assert texts(caller.ask(Echo(), calls, "teacher")) == ["a", "b", "c"]  # from the journal


def test_failed_calls_do_not_use_up_the_calls_of_a_budget(tmp_path: Path) -> None:
    engine = Echo(failing=["a", "b"])
    caller = Caller(tmp_path, Budget(calls=3), max_failed=0.5)
    assert texts(caller.ask(engine, [make_call(text) for text in "abcde"], "teacher")) == [None, None, "c", "d", "e"]


@pytest.mark.parametrize(
    "limits, words",
    [
        ({"calls": 0}, "--max-calls is 0; it must be a number above 0"),
        ({"tokens": -1}, "--max-tokens is -1; it must be a number above 0"),
        ({"money": 0.0, "price": (1, 1)}, "--budget is 0.0; it must be a number above 0"),
        ({"money": float("nan"), "price": (1, 1)}, "--budget is nan; it must be a number above 0"),
        ({"money": 1.0}, "--budget needs --price IN,OUT: what a million"),
        ({"price": (-1, 1)}, "--price is -1,1; a price must not be negative"),
    ],
)
def test_a_budget_that_cannot_be(limits: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as raised:
        Budget(**limits)
    assert str(raised.value).startswith(words)


def test_a_budget_of_tokens_needs_replies_that_count_them(tmp_path: Path) -> None:
    calls = [make_call(text) for text in "abc"]
    with pytest.raises(ValueError, match="teacher: replies come without a count of their tokens, which --max-tokens"):
        Caller(tmp_path, Budget(tokens=100)).ask(Echo(tokens=(0, 0)), calls, "teacher")
    Caller(tmp_path, Budget(calls=100)).ask(Echo(tokens=(0, 0)), calls, "teacher")


# Failures -----------------------------------------------------------------------------------------------------------


def test_failed_calls_are_none_counted_and_asked_again(tmp_path: Path) -> None:
    engine = Echo(failing=["b"])
    caller = Caller(tmp_path, max_failed=0.5)
    calls = [make_call(text) for text in "abc"]
    assert texts(caller.ask(engine, calls, "teacher")) == ["a", None, "c"]
    summary = caller.summary()
    assert (summary["calls"], summary["failed"]) == (3, 1)
    assert summary["failures"] == {"no answer": 1} and summary["retries"] == {"time-out": 6}
    assert summary["roles"]["teacher"]["failed"] == 1
    engine.failing = []
    assert texts(caller.ask(engine, calls, "teacher")) == ["a", "b", "c"]
    assert caller.summary()["failed"] == 0 and caller.summary()["calls"] == 3
    assert engine.asked == list("abcb")


def test_too_many_failures_stop_the_run_with_the_commonest_reason(tmp_path: Path) -> None:
    engine = Echo(failing=["b", "c"])
    calls = [make_call(chr(code)) for code in range(ord("a"), ord("z"))]  # 25
    with pytest.raises(TooManyFailed) as stopped:
        Caller(tmp_path, max_failed=0.04).ask(engine, calls, "teacher")  # one is allowed
    assert str(stopped.value) == (
        "2 of 25 calls failed, more than --max-failed 0.04 allows; most often (2): no answer: b; all replies are in "
        f"{tmp_path / 'calls.jsonl'}, and the same command asks the rest"
    )
    assert engine.asked == ["a", "b", "c"]
    assert Caller(tmp_path, max_failed=0.08).ask(engine, calls, "teacher").count(None) == 2


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_of_failures_that_cannot_be(share: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="it must be from 0 to 1"):
        Caller(tmp_path, max_failed=share)


# Counts -------------------------------------------------------------------------------------------------------------


def test_the_progress_line_says_calls_tokens_cost_failures_and_what_was_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("data.calls.caller.tqdm", partial(tqdm, mininterval=0.0, ncols=200))
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    caller = Caller(tmp_path, Budget(price=(1000.0, 2000.0)), max_failed=0.5)
    caller.kept = 1234
    caller.ask(Echo(failing=["b"], url="http://x/v1"), [make_call(text) for text in "abc"], "teacher")
    shown = capsys.readouterr().err
    assert "teacher: 100%" in shown and "3/3" in shown
    assert "28 tokens, cost 0.036, 1 failed, 1,234 kept" in shown


def test_tokens_and_cost_are_the_same_whatever_was_cached(tmp_path: Path) -> None:
    engine, budget = Echo(url="http://x/v1"), Budget(price=(1.0, 2.0))
    calls = [make_call(text) for text in "abcd"]
    Caller(tmp_path / "one", budget).ask(engine, calls[:3], "teacher")
    summaries = []
    for folder in ("one", "two"):
        caller = Caller(tmp_path / folder, budget)
        caller.ask(engine, calls, "teacher")
        caller.ask(Echo(), calls[:1], "student")
        summaries.append(caller.summary())
        assert summaries[-1].pop("cached") == (3 if folder == "one" else 0)
        assert summaries[-1]["roles"]["teacher"].pop("cached") == (3 if folder == "one" else 0)
    assert summaries[0] == summaries[1]
    assert summaries[0]["prompt_tokens"] == 50 and summaries[0]["completion_tokens"] == 20
    assert summaries[0]["cost"] == pytest.approx(4 * (10 * 1.0 + 4 * 2.0) / 1e6)  # the student is on this machine
