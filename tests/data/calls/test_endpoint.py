"""Endpoints over real HTTP: what is asked again, what stops and what is counted; no reply is lost or paid twice."""

from __future__ import annotations

import json
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from data.calls.budget import Budget, BudgetSpent
from data.calls.call import Failure, Reply
from data.calls.caller import Caller, TooManyFailed
from data.calls.connection import Answer, Connection
from data.calls.endpoint import Endpoint, asked_wait
from data.calls.engine import TOO_LONG, Refused
from nb_lightning.generation.sampling import Sampling
from tests.data.calls.harness import StandIn, completion, make_call, standing_in
from tests.harness import ROOT, environment

pytestmark = pytest.mark.runs

CALLS = [make_call(f"question {n}", seed=n) for n in range(24)]
QUICK: dict[str, Any] = {"max_wait": 0.01}


@pytest.fixture
def server() -> Iterator[StandIn]:
    with standing_in() as server:
        yield server


def texts(replies: list[Reply | None]) -> list[str]:
    assert None not in replies
    return [reply.message["content"] for reply in replies if reply]


# What is asked ------------------------------------------------------------------------------------------------------


def test_what_an_endpoint_is_sent(server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\n")
    calls = [
        make_call("a", seed=7),
        make_call("a", seed=7, number=1),
        make_call("b", seed=2**70, sampling=Sampling(5, 0.5, top_k=3, top_p=0.9)),
    ]
    Caller(tmp_path).ask(Endpoint(server.url + "/", "big", concurrency=1), calls, "teacher")
    first, second, third = server.requests
    assert first == {
        "model": "big", "messages": [{"role": "user", "content": "a"}], "temperature": 0.0, "top_p": 1.0,
        "max_tokens": 8, "seed": 7,
    }  # fmt: skip
    assert second["seed"] not in (7, third["seed"]) and 0 <= second["seed"] < 2**31 > third["seed"] >= 0
    assert (third["top_k"], third["top_p"], third["max_tokens"]) == (3, 0.9, 5)
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer sk-secret"}
    assert "secret" not in (tmp_path / "calls.jsonl").read_text()


def test_the_proxy_of_the_environment_is_used(server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server.url.removesuffix("/v1"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for url, path in (("http://host.invalid/v1", "http://host.invalid/v1"), (server.url, "/v1")):
        Caller(tmp_path / path.replace("/", "_")).ask(Endpoint(url, "big", attempts=1), CALLS[:2], "teacher")
        assert [headers["path"] for headers in server.headers] == [f"{path}/chat/completions"] * 2
        server.headers.clear()


def test_calls_run_at_the_same_time(server: StandIn, tmp_path: Path) -> None:
    barrier = threading.Barrier(8)

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        barrier.wait(30)  # broken unless eight are here together
        return completion("x")

    server.answer = answer
    Caller(tmp_path).ask(Endpoint(server.url, "big", concurrency=8), CALLS, "teacher")
    assert server.most_at_once == 8


def test_a_reply_that_was_cut_off_is_kept_and_says_so(server: StandIn, tmp_path: Path) -> None:
    server.answer = lambda request: completion("half of an ans", "length")
    for _ in range(2):
        (reply,) = Caller(tmp_path).ask(Endpoint(server.url, "big"), CALLS[:1], "teacher")
        assert reply is not None and reply.is_cut and reply.message["content"] == "half of an ans"
    assert len(server.requests) == 1


# What goes wrong ----------------------------------------------------------------------------------------------------

FAULTS = {
    (429, "Retry-After", "0"): "HTTP 429",
    500: "HTTP 500",
    503: "HTTP 503",
    408: "HTTP 408",
    "drop": "broken connection",
    "cut": "broken connection",
    "no json": "no chat completion",
    "no completion": "no chat completion",
}


def test_whatever_passes_is_asked_again_and_counted_by_kind(server: StandIn, tmp_path: Path) -> None:
    """Each call meets each fault once at most; which ones, its question decides."""
    faults = list(FAULTS)
    met: dict[int, list[Any]] = {n: random.Random(n).sample(faults, n % 6) for n in range(len(CALLS))}
    expected = [FAULTS[fault] for some in met.values() for fault in some]
    kinds = {kind: expected.count(kind) for kind in expected}

    def fault(request: dict[str, Any], number: int) -> Any:
        with server.lock:
            left = met[request["seed"]]
            next_fault = left.pop() if left else ""
        return (next_fault[0], {next_fault[1]: next_fault[2]}) if isinstance(next_fault, tuple) else next_fault

    caller = Caller(tmp_path / "faults")
    server.fault = fault
    replies = caller.ask(Endpoint(server.url, "big", **QUICK), CALLS, "teacher")
    assert caller.summary()["retries"] == kinds and len(kinds) == 6
    assert [reply.attempts for reply in replies if reply] == [n % 6 + 1 for n in range(len(CALLS))]
    assert len(server.requests) == len(CALLS) + len(expected)
    server.wait_until_counted(len(CALLS))
    assert all(server.answered[n] == 1 for n in range(len(CALLS)))
    server.fault = lambda request, number: ""
    assert texts(replies) == texts(Caller(tmp_path / "none").ask(Endpoint(server.url, "big"), CALLS, "teacher"))


@pytest.mark.parametrize("fault, kind", [(500, "HTTP 500"), ("drop", "broken connection"), ("hang", "time-out")])
def test_attempts_are_bounded_and_the_call_fails(server: StandIn, fault: Any, kind: str, tmp_path: Path) -> None:
    server.fault = lambda request, number: fault if request["seed"] == 3 else ""
    caller = Caller(tmp_path, max_failed=0.2)
    replies = caller.ask(Endpoint(server.url, "big", attempts=3, timeout=0.5, **QUICK), CALLS[:6], "teacher")
    assert [reply is None for reply in replies] == [n == 3 for n in range(6)]
    assert sum(request["seed"] == 3 for request in server.requests) == 3
    assert caller.summary()["failures"] == {kind: 1} and caller.summary()["retries"] == {kind: 3}
    server.fault = lambda request, number: ""
    server.requests.clear()
    assert texts(caller.ask(Endpoint(server.url, "big"), CALLS[:6], "teacher"))
    assert len(server.requests) == 1


def test_nobody_listens(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(TooManyFailed) as stopped:
        Caller(tmp_path).ask(Endpoint(url, "big", attempts=2, **QUICK), CALLS[:2], "teacher")
    assert f"broken connection: {url}: ConnectionRefusedError" in str(stopped.value)


def test_the_wait_doubles_and_retry_after_is_obeyed_up_to_the_maximum(server: StandIn) -> None:
    class Stop(threading.Event):
        waits: list[float] = []

        def wait(self, timeout: float | None = None) -> bool:
            self.waits.append(timeout or 0.0)
            return False

    asked = [{}, {}, {"Retry-After": "7"}, {"Retry-After": "1000"}, {"Retry-After": "soon"}]
    server.fault = lambda request, number: (429, asked[number])
    failed = Endpoint(server.url, "big", attempts=6).ask(Connection(server.url, 30.0), CALLS[0], stop := Stop())
    assert isinstance(failed, Failure) or failed is None
    assert stop.waits == [0.5, 1.0, 7.0, 60.0, 8.0]


@pytest.mark.parametrize("asked", ["0", "-5", "nan", formatdate(0), "1 Jan 9999 00:00:00 +99999999999999"])
def test_a_retry_after_that_asks_for_no_time_leaves_the_wait_to_us(asked: str) -> None:
    assert asked_wait(Answer(429, b"", {"retry-after": asked})) is None


def test_a_retry_after_may_be_a_date() -> None:
    later = asked_wait(Answer(429, b"", {"retry-after": formatdate(4e9)}))
    assert later is not None and later > 1e8


@pytest.mark.parametrize(
    "status, name",
    [(400, "BadRequestError "), (401, "AuthenticationError "), (403, "PermissionDeniedError "),
     (404, "NotFoundError "), (422, "UnprocessableEntityError "), (402, ""), (301, "")],
)  # fmt: skip
def test_what_no_repetition_mends_stops_at_once_with_the_servers_words(
    server: StandIn, status: int, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    server.fault = lambda request, number: status if number >= 5 else ""
    with pytest.raises(Refused) as stopped:
        Caller(tmp_path).ask(Endpoint(server.url, "big", concurrency=1), CALLS, "teacher")
    assert str(stopped.value) == f"{server.url}: {name}({status}): status {status}"
    assert len(server.requests) == 6
    assert len((tmp_path / "calls.jsonl").read_text().splitlines()) == 5


def test_the_key_is_taken_out_of_a_servers_words(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    server.answer = lambda request: {"error": {"message": "wrong key: sk-secret!"}}  # with status 200
    failure = Endpoint(server.url, "big", attempts=1).ask(Connection(server.url, 30.0), CALLS[0], threading.Event())
    assert isinstance(failure, Failure) and "wrong key: ***!" in failure.detail and "secret" not in failure.detail
    monkeypatch.setenv("OPENAI_API_KEY", "sk-sec\nret")
    with pytest.raises(ValueError, match="OPENAI_API_KEY has characters that no HTTP header can carry"):
        Connection("http://x/v1", 1.0)


def test_a_prompt_that_is_too_long_fails_alone(server: StandIn, tmp_path: Path) -> None:
    def answer(request: dict[str, Any]) -> dict[str, Any]:
        return completion("x")

    server.answer = answer
    server.refuse = {3: {"message": "99 tokens of prompt", "code": "context_length_exceeded"}}
    caller = Caller(tmp_path, max_failed=0.5)
    replies = caller.ask(Endpoint(server.url, "big"), CALLS[:6], "teacher")
    assert [reply is None for reply in replies] == [n == 3 for n in range(6)]
    assert caller.summary()["failures"] == {TOO_LONG: 1}


def test_calls_in_flight_at_a_limit_are_finished_and_journaled(server: StandIn, tmp_path: Path) -> None:
    barrier = threading.Barrier(4)

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        if len(server.requests) <= 4:
            barrier.wait(30)  # all four are on their way before the first reply
        return completion("x")

    server.answer = answer
    with pytest.raises(BudgetSpent) as stopped:
        Caller(tmp_path, Budget(tokens=1)).ask(Endpoint(server.url, "big", concurrency=4), CALLS, "teacher")
    begun = len(server.requests)
    assert begun in range(4, 8)  # a thread that is done may begin another before the first reply is counted
    assert len((tmp_path / "calls.jsonl").read_text().splitlines()) == begun
    assert f"({begun} calls, {14 * begun} tokens)" in str(stopped.value)


# A real server ------------------------------------------------------------------------------------------------------


def test_our_own_server_gives_what_the_model_writes_here(tmp_path: Path) -> None:
    """Greedy replies of one model over HTTP and on this machine, from a server whose queue is too short."""
    from data.calls.local import LocalModel
    from tests.data.calls.harness import save_random_model
    from tests.serve.harness import start, stop

    folder = save_random_model(tmp_path / "tiny")
    calls = [make_call(f"{n} + {n}?") for n in range(24)]
    running = start(folder, tmp_path / "log", "--context", "4096", "--max-batch", "2", "--max-queue", "2")
    try:
        caller = Caller(tmp_path / "http")
        endpoint = Endpoint(f"http://127.0.0.1:{running.port}/v1", "tiny", concurrency=12, attempts=60, max_wait=0.05)
        over_http = caller.ask(endpoint, calls, "teacher")
        with pytest.raises(Refused, match=r"NotFoundError \(404\): there is no model 'other'; this server has 'tiny'"):
            caller.ask(Endpoint(endpoint.url, "other"), calls[:1], "teacher")
    finally:
        stop(running)
    here = Caller(tmp_path / "here").ask(LocalModel(str(folder), device="cpu"), calls, "teacher")
    assert texts(over_http) == texts(here) and len(set(texts(here))) > 5
    for a, b in zip(over_http, here):
        assert a and b and (a.finish, a.prompt_tokens, a.completion_tokens) == (
            b.finish, b.prompt_tokens, b.completion_tokens,
        )  # fmt: skip
    assert caller.summary()["retries"].keys() == {"HTTP 429"}


# Killed -------------------------------------------------------------------------------------------------------------

PROGRAM = """
import json, sys
from pathlib import Path
from data.calls.caller import Caller
from data.calls.endpoint import Endpoint
from tests.data.calls.harness import make_call
url, folder = sys.argv[1], Path(sys.argv[2])
caller, engine = Caller(folder), Endpoint(url, "big", concurrency=4, attempts=40, max_wait=0.01)
drafts = caller.ask(engine, [make_call(f"draft {n}", seed=n) for n in range(40)], "writer")
critics = [make_call(f"critique {reply.message['content']}", seed=100 + n) for n, reply in enumerate(drafts)]
lines = [reply.message["content"] for reply in drafts + caller.ask(engine, critics, "critic")]
(folder / "out.json").write_text(json.dumps(lines))
"""


def run_until_killed(server: StandIn, folder: Path, place: int) -> bool:
    """Run the program, and kill it when the server has got `place` requests; return whether it was killed."""
    server.reached.clear()
    server.place = len(server.requests) + place
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, server.url, str(folder)], cwd=ROOT, env=environment())
    try:
        while process.poll() is None:
            if server.reached.wait(0.01):
                process.send_signal(signal.SIGKILL)
                break
    finally:
        code = process.wait(60)
    assert code in (0, -signal.SIGKILL)
    return code != 0


def keys_in(folder: Path) -> int:
    path = folder / "calls.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.parametrize("places", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_places_it_goes_on_to_the_same_output(server: StandIn, places: int, tmp_path: Path) -> None:
    """Every request after a kill is of a call without a line in the journal."""
    server.fault = lambda request, number: random.Random(number).choice(["", "", "", 429, "drop", "cut"])
    assert not run_until_killed(server, tmp_path / "whole", 10**6)
    rng = random.Random(places)
    left, kills = places, 0
    while left:
        folder = tmp_path / f"killed {left}"
        for _ in range(min(left, rng.randint(1, 3))):  # some are killed more than once
            left -= 1
            kills += run_until_killed(server, folder, rng.randint(1, 60))
            journaled, paid = keys_in(folder), len(server.requests)
        answered = server.answered.copy()
        assert not run_until_killed(server, folder, 10**6)
        server.wait_until_counted(answered.total() + 80 - journaled)
        whole_answers = sum((server.answered - answered).values())
        assert whole_answers == 80 - journaled and len(server.requests) >= paid
        assert (folder / "out.json").read_bytes() == (tmp_path / "whole/out.json").read_bytes()
        assert len({json.loads(line)["key"] for line in (folder / "calls.jsonl").read_text().splitlines()}) == 80
    assert kills > places // 2
