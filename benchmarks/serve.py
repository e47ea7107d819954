"""Throughput of the server with 1, 8 and 32 streams at once, beside `generate` on the same prompts.

    python benchmarks/serve.py [--model PATH] [--streams 1 8 32] [--tokens 128] [--repeats 5]

Both sides draw as many tokens from the same seeds (checked) and take turns. On a busy machine only the ratios of CPU
time mean something: of the decoding process, and of all the server's processes together. The client reads events and
parses none. Without --model: a random byte-level Llama of 5 M parameters.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import ROOT, Shape, append_jsonl, environment, table
from nb_lightning.checkpoints.pretrained import load_pretrained
from nb_lightning.checkpoints.tokenizer_files import load_tokenizer
from nb_lightning.generation.decoder import generate
from nb_lightning.generation.sampling import Sampling

PROMPT = "Question {}: what does a server of language models do all day? Answer: "
HOW = {"temperature": 0.6, "top_p": 0.95}


def random_model(folder: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    s = Shape()
    config = LlamaConfig(
        vocab_size=260, hidden_size=s.dim, intermediate_size=s.mlp, num_hidden_layers=s.layers,
        num_attention_heads=s.heads, num_key_value_heads=s.kv_heads, head_dim=s.head_dim, max_position_embeddings=4096,
        bos_token_id=None, eos_token_id=256, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    load_tokenizer("bytes").save(folder)
    return folder


async def ask(port: int, body: bytes) -> tuple[int, float]:
    """Completion tokens of one stream, and seconds to its first event."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    began, first, last = time.perf_counter(), 0.0, b""
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n")
    writer.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            first, last = first or time.perf_counter() - began, line
    writer.close()
    return json.loads(last.removeprefix(b"data: "))["usage"]["completion_tokens"], first


async def ask_all(port: int, bodies: Sequence[bytes]) -> tuple[int, float]:
    """Tokens of all, and the median time to the first."""
    counts, firsts = zip(*await asyncio.gather(*(ask(port, body) for body in bodies)))
    return sum(counts), statistics.median(firsts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="append the results to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        path = args.model or str(random_model(Path(temporary) / "model"))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "nb_lightning.serve", "--model", path, "--name", "m", "--port", str(port)]
        server = subprocess.Popen(command, cwd=ROOT, env=environment())
        try:
            measure(args, path, port, server)
        finally:
            server.terminate()
            server.wait(60)


def measure(args: argparse.Namespace, path: str, port: int, server: subprocess.Popen[bytes]) -> None:
    loaded = load_pretrained(path)
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
            break
        except OSError:
            if server.poll() is not None:
                sys.exit("the server did not start")
            time.sleep(0.2)
    processes = psutil.Process(server.pid).children()
    (decoder,) = (process for process in processes if "spawn_main" in " ".join(process.cmdline()))
    sampling = Sampling(args.tokens, stop_ids=loaded.stop_ids, **HOW)
    records = []
    for streams in args.streams:
        texts = [PROMPT.format(i) for i in range(streams)]
        more = {"max_tokens": args.tokens, "stream": True, "stream_options": {"include_usage": True}, **HOW}
        bodies = [json.dumps({"model": "m", "prompt": t, "seed": i, **more}).encode() for i, t in enumerate(texts)]
        ids = [loaded.tokenizer.tokenizer.encode(text).ids for text in texts]
        runs = []
        for _ in range(args.repeats + 1):
            wall, cpu = time.perf_counter(), time.process_time()
            rows = generate(loaded.model, ids, sampling, [[i, 0] for i in range(streams)])
            alone, alone_cpu = time.perf_counter() - wall, time.process_time() - cpu
            tokens = sum(len(row.ids) for row in rows)
            wall, before = time.perf_counter(), [used(process) for process in processes]
            counted, first = asyncio.run(ask_all(port, bodies))
            served = time.perf_counter() - wall
            after = [used(process) for process in processes]
            assert counted == tokens, f"the server drew {counted} tokens, generate {tokens}"
            at = processes.index(decoder)
            runs.append((
                tokens / alone, tokens / served, alone / served, (after[at] - before[at]) / alone_cpu,
                (sum(after) - sum(before)) / alone_cpu, 1000 * first,
            ))  # fmt: skip
        medians = map(statistics.median, zip(*runs[1:]))  # the first run warms up
        names = (
            "generate, tokens/s",
            "server, tokens/s",
            "ratio",
            "decoder CPU ratio",
            "all CPU ratio",
            "first event, ms",
        )
        records.append({"streams": streams, **dict(zip(names, medians))})
    print(table(list(records[0]), [list(record.values()) for record in records]))
    append_jsonl(args.json, records)


def used(process: psutil.Process) -> float:
    """CPU-seconds so far."""
    return sum(process.cpu_times()[:2])


if __name__ == "__main__":
    main()
