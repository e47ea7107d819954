"""The whole command: through a server of ours, through an endpoint that does everything wrong, and killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from data.refine.__main__ import main
from nb_lightning.rewards.tasks import Task
from tests.data.calls.harness import Fault, StandIn, completion, standing_in
from tests.data.refine.harness import role_of, save_chat_model, solve, write_sums
from tests.harness import ROOT, environment
from tests.llama_cpp_harness import LlamaServer, smollm2
from tests.serve.harness import start, stop

pytestmark = pytest.mark.runs
PLAN = "dimensions: {correctness: {by: verifier, least: 1}}\nk: 2\nrounds: 2\npatience: 1\nchecklist: false\n"
FILES = ("samples.jsonl", "histories.jsonl", "dropped.jsonl")


def arguments(folder: Path, url: str, *more: str) -> list[str]:
    """Return the command's arguments; the tasks and the plan are written into `folder`."""
    (folder / "plan.yaml").write_text(PLAN)
    return ["--tasks", str(folder / "sums.jsonl"), "--output", str(folder / "out"), "--plan", str(folder / "plan.yaml"),
            "--teacher", url, "--teacher-model", "tiny", *more]  # fmt: skip


def command(arguments: list[str]) -> list[str]:
    return [sys.executable, "-m", "data.refine", *arguments]


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Answer as `solve` does; the message names its call's seed, so that the journal has it."""
    prompt = request["messages"][-1]["content"]
    value = completion(solve(role_of(prompt), prompt))
    value["choices"][0]["message"]["seed"] = request["seed"]
    return value


def contents(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in FILES]


def journaled(folder: Path) -> list[int]:
    path = folder / "calls/calls.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line)["reply"]["message"]["seed"] for line in lines if line.endswith("\n")]


def test_random_replies_of_our_server_are_counted_and_nothing_crashes(tmp_path: Path) -> None:
    write_sums(tmp_path / "sums.jsonl", 3)
    server = start(save_chat_model(tmp_path / "tiny"), tmp_path / "log", "--device", "cpu", "--context", "4096")
    try:
        sampling = [f"sampling.{role}.max_new_tokens=12" for role in ("candidates", "score", "critique", "revise")]
        done = subprocess.run(
            command(arguments(tmp_path, f"http://127.0.0.1:{server.port}/v1", "k=8", *sampling)),
            cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    finally:
        stop(server)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: not one sample of 3 tasks: ")
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert (report["tasks"], report["kept"], sum(report["dropped"].values())) == (3, 0, 3)
    assert report["calls"]["roles"]["teacher"]["calls"] == 24
    assert report["calls"]["failed"] == 0
    histories = [json.loads(line) for line in (tmp_path / "out/histories.jsonl").read_text().splitlines()]
    assert sum(len(h["drafts"]) for h in histories) >= 24
    assert sum(sum(h["tokens"].values()) for h in histories) == report["calls"]["completion_tokens"]


def test_an_endpoint_that_does_everything_wrong_leads_to_the_same_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("data.calls.endpoint.FIRST_WAIT_S", 0.01)
    faults: list[Fault] = [(429, {"Retry-After": "0"}), 500, "drop", "cut", "no json", "no completion", "hang"]
    write_sums(tmp_path / "sums.jsonl", 12)
    with standing_in() as server:
        server.answer, server.hang_s = answer, 2.0
        main(arguments(tmp_path, server.url))
        smooth = contents(tmp_path / "out")
        (tmp_path / "out").rename(tmp_path / "smooth")
        server.fault = lambda request, number: faults[number // 5 % len(faults)] if number % 5 == 0 else ""
        main(arguments(tmp_path, server.url, "--timeout", "1"))
    assert contents(tmp_path / "out") == smooth
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["calls"]["failed"] == 0
    assert set(report["calls"]["retries"]) == {
        "HTTP 429", "HTTP 500", "broken connection", "no chat completion", "time-out",
    }  # fmt: skip
    assert report["kept"] == len((tmp_path / "out/samples.jsonl").read_text().splitlines()) > 6
    assert "samples.jsonl: " in capsys.readouterr().out


def test_calls_that_never_get_a_reply_are_bounded_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.calls.endpoint.FIRST_WAIT_S", 0.001)
    write_sums(tmp_path / "sums.jsonl", 6)
    with standing_in() as server:
        server.answer = answer
        server.fault = lambda request, number: 500 if "Add 3 and" in request["messages"][-1]["content"] else ""
        with pytest.raises(SystemExit, match=r"^error: \d+ of 12 calls failed, more than --max-failed 0.01 allows"):
            main(arguments(tmp_path, server.url))
        assert not (tmp_path / "out/samples.jsonl").exists()
        server.fault = lambda request, number: 401
        with pytest.raises(SystemExit, match=rf"^error: {server.url}: AuthenticationError \(401\): status 401"):
            main(arguments(tmp_path, server.url))
        server.fault = lambda request, number: ""
        main(arguments(tmp_path, server.url))
    seeds = journaled(tmp_path / "out")
    assert len(seeds) == len(set(seeds)) == json.loads((tmp_path / "out/report.json").read_text())["calls"]["calls"]


def kill_and_resume(tmp_path: Path, places: int) -> None:
    """Kill the command at random requests, resume it; compare with a run that was not stopped."""
    write_sums(tmp_path / "sums.jsonl", 10 * places)
    with standing_in() as server:
        server.answer = answer
        main(arguments(tmp_path, server.url))
        straight, calls = contents(tmp_path / "out"), len(server.requests)
        (tmp_path / "out").rename(tmp_path / "straight")

        server.answer = lambda request: time.sleep(0.005) or answer(request)
        targets = sorted(random.Random(places).sample(range(1, calls - 8), places))
        for target in targets:
            known, before = set(journaled(tmp_path / "out")), len(server.requests)
            kill_at(server, arguments(tmp_path, server.url), before + max(1, target - len(known)))
            assert not known & {request["seed"] for request in server.requests[before:]}
        known, before = set(journaled(tmp_path / "out")), len(server.requests)
        subprocess.run(command(arguments(tmp_path, server.url)), cwd=ROOT, env=environment(), check=True, timeout=300)
        assert not known & {request["seed"] for request in server.requests[before:]}
    assert contents(tmp_path / "out") == straight
    seeds = journaled(tmp_path / "out")
    assert len(seeds) == len(set(seeds)) == calls


def kill_at(server: StandIn, arguments: list[str], requests: int) -> None:
    process = subprocess.Popen(command(arguments), cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL)
    while len(server.requests) < requests:
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    while server.at_once:
        time.sleep(0.01)


def test_a_killed_run_resumes_to_the_same_bytes_and_pays_nothing_twice(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, places=3)


@pytest.mark.slow
def test_twenty_kills_are_resumed_to_the_same_bytes(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, places=20)


@pytest.mark.slow
def test_the_replies_of_a_real_model_through_llama_cpp_are_read_or_counted(tmp_path: Path) -> None:
    """SmolLM2 is too weak to refine anything; what matters is that none of its replies ends the run."""
    tasks: list[Task] = write_sums(tmp_path / "sums.jsonl", 4)
    server = LlamaServer(smollm2(), 4096)
    sampling = [f"sampling.{role}.max_new_tokens=200" for role in
                ("candidates", "checklist", "score", "critique", "revise", "skeleton", "chain")]  # fmt: skip
    try:
        done = subprocess.run(
            command(arguments(tmp_path, f"{server.url}/v1", "checklist=true", "dimensions.format.weight=1", *sampling)),
            cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=1200,
        )  # fmt: skip
    finally:
        server.stop()
    assert "Traceback" not in done.stderr, done.stderr
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["tasks"] == len(tasks) == report["kept"] + sum(report["dropped"].values())
    assert report["calls"]["failed"] == 0
    asked = sum(n["calls"] for role, n in report["calls"]["roles"].items() if role not in ("teacher", "revise"))
    unreadable = sum(sum(reasons.values()) for reasons in report["unreadable"].values())
    assert 0 < asked and unreadable <= asked
