"""What a call to a model costs this machine: our own CPU time and memory, and over HTTP beside OpenAI's client.

    python benchmarks/calls.py [--prompts 10000] [--calls-per-prompt 9] [--http 2000] [--rounds 3]

The first part asks an engine that answers at once: keys, journal, counts and progress are all that is left. The second
asks a server on loopback that answers at once, in another process: `Endpoint` with its journal, and OpenAI's client
bare, in threads and asynchronous, take turns. CPU time is of the asking process alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import memory_mb, table
from data.calls.call import Call, Reply
from data.calls.caller import Caller
from data.calls.endpoint import Endpoint
from data.calls.engine import OnReply
from nb_lightning.generation.sampling import Sampling

QUESTION = "A question of about a thousand characters. " * 24
ANSWER = "An answer of about five hundred characters. " * 12
SAMPLING = Sampling(512, temperature=0.7)
PROMPTS_PER_ASK = 100
CONCURRENCY = 16


class AtOnce:
    """An engine that answers at once."""

    def about(self) -> dict[str, Any]:
        return {"name": "at once"}

    def answer(self, calls: Sequence[Call], on_reply: OnReply) -> None:
        for number in range(len(calls)):
            on_reply(number, Reply({"role": "assistant", "content": ANSWER}, "stop", 250, 120))


def prompt(n: int) -> list[dict[str, Any]]:
    return [{"role": "user", "content": f"{n}: {QUESTION}"}]


def measure_caller(prompts: int, calls_per_prompt: int, folder: Path) -> tuple[float, list[float]]:
    """Return CPU milliseconds a call, and the resident MiB at the start, in the middle and at the end."""
    caller, engine, memory, seconds = Caller(folder), AtOnce(), [], 0.0
    for first in range(0, prompts, PROMPTS_PER_ASK):
        if first in (PROMPTS_PER_ASK, prompts // 2):
            memory.append(memory_mb("VmRSS"))
        start = time.process_time()
        calls = [Call(prompt(first + i), SAMPLING, n) for i in range(PROMPTS_PER_ASK) for n in range(calls_per_prompt)]
        caller.ask(engine, calls, "teacher")
        seconds += time.process_time() - start
    return 1e3 * seconds / (prompts * calls_per_prompt), [*memory, memory_mb("VmRSS")]


# Over HTTP ----------------------------------------------------------------------------------------------------------


def serve(port: Any) -> None:
    """Answer every request at once with the same completion."""
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": ANSWER}}
    usage = {"prompt_tokens": 250, "completion_tokens": 120, "total_tokens": 370}
    fields = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}
    body = json.dumps(fields).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                request = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    int(line[15:]) for line in request.split(b"\r\n") if line.lower().startswith(b"content-length:")
                )
                await reader.readexactly(length)
                writer.write(head + body)
        except asyncio.IncompleteReadError:
            writer.close()

    async def run() -> None:
        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        port.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


def ask_ours(url: str, calls: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        asked = [Call(prompt(n), SAMPLING, n) for n in range(calls)]
        replies = Caller(Path(folder)).ask(Endpoint(url, "m", CONCURRENCY), asked, "teacher")
    assert all(reply and reply.message["content"] == ANSWER for reply in replies)


def request(n: int) -> dict[str, Any]:
    sampling = {"temperature": SAMPLING.temperature, "top_p": 1.0, "max_tokens": SAMPLING.max_new_tokens, "seed": n}
    return {"model": "m", "messages": prompt(n), **sampling}


def ask_openai_threads(url: str, calls: int) -> None:
    import openai

    with openai.OpenAI(base_url=url, api_key="none") as client, ThreadPoolExecutor(CONCURRENCY) as pool:
        replies = list(pool.map(lambda n: client.chat.completions.create(**request(n)), range(calls)))
    assert all(reply.choices[0].message.content == ANSWER for reply in replies)


def ask_openai_async(url: str, calls: int) -> None:
    import openai

    async def run() -> None:
        free = asyncio.Semaphore(CONCURRENCY)
        async with openai.AsyncOpenAI(base_url=url, api_key="none") as client:

            async def one(n: int) -> None:
                async with free:
                    reply = await client.chat.completions.create(**request(n))
                assert reply.choices[0].message.content == ANSWER

            await asyncio.gather(*map(one, range(calls)))

    asyncio.run(run())


WAYS: dict[str, Callable[[str, int], None]] = {
    "ours, with the journal": ask_ours,
    "OpenAI's client, threads": ask_openai_threads,
    "OpenAI's client, asynchronous": ask_openai_async,
}


def measure_http(calls: int, rounds: int) -> dict[str, list[float]]:
    """Return CPU milliseconds a call of each way, one for each round."""
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs,), daemon=True)
    server.start()
    url = f"http://127.0.0.1:{ours.recv()}/v1"
    costs: dict[str, list[float]] = {name: [] for name in WAYS}
    try:
        for turn in range(rounds + 1):
            for name, ask in WAYS.items():
                start = time.process_time()
                ask(url, calls if turn else calls // 10)
                if turn:  # the first turn imports and connects
                    costs[name].append(1e3 * (time.process_time() - start) / calls)
    finally:
        server.terminate()
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=10_000)
    parser.add_argument("--calls-per-prompt", type=int, default=9)
    parser.add_argument("--http", type=int, default=2_000, metavar="CALLS")
    parser.add_argument("--rounds", type=int, default=3)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cost, memory = measure_caller(a.prompts, a.calls_per_prompt, Path(folder))
        size = (Path(folder) / "calls.jsonl").stat().st_size / 2**20
    print(f"{a.prompts * a.calls_per_prompt:,} calls at once: {cost:.3f} CPU-ms a call; journal {size:.0f} MiB; "
          f"resident MiB at the start, half-way, at the end: {', '.join(f'{m:.0f}' for m in memory)}")  # fmt: skip
    costs = measure_http(a.http, a.rounds)
    ours = costs["ours, with the journal"]
    rows = [
        [name, f"{statistics.median(ms):.2f}", f"{statistics.median(o / m for o, m in zip(ours, ms)):.2f}"]
        for name, ms in costs.items()
    ]
    print(table(["over HTTP", "CPU-ms a call", "ours to it"], rows))


if __name__ == "__main__":
    main()
