"""Tokens per CPU-second of generating, ours beside transformers' `generate`, in one process that takes turns.

    python benchmarks/decode.py [--shapes demo,smollm2] [--batches 1,8,64] [--rounds 3] [--model PATH]

Both sides have the same weights, the same prompts of 8 to 40 tokens, and the same number of new tokens for each:

| stops | new tokens |
|---|---|
| even | `--tokens` for every row |
| ragged | exponential with mean `--tokens`, at most four times it: rows end at different times |
| queue | as ragged, four batches of prompts that wait |

Greedy, float32. Ours: `nb_lightning.generation.decoder.stream`. Theirs: left-padded batches, each run until its last
row ends. Random weights unless `--model` names some (a run, a Hugging Face folder, a .gguf file).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from benchmarks.common import append_jsonl, table
from nb_lightning.checkpoints.hf_config import config_from_shape
from nb_lightning.checkpoints.hf_weights import to_hf
from nb_lightning.generation.decoder import Request, stream
from nb_lightning.generation.sampling import Sampling
from nb_lightning.model.transformer import ModelShape, Transformer

SHAPES = {
    "demo": ModelShape(260, 128, 4, 4, 2, 32, 352),
    "smollm2": ModelShape(49_152, 576, 30, 9, 3, 64, 1536, rope_theta=1e5, tie_embeddings=True),
}


def transformers_model(model: Transformer) -> Any:
    """Build transformers' Llama over the same tensors."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        other = LlamaForCausalLM(LlamaConfig(**config_from_shape(model.shape, torch.float32)))
    weights = {to_hf(name): p for name, p in model.state_dict().items()}
    other.load_state_dict(weights, assign=True, strict=False)
    other.tie_weights()
    other.model.rotary_emb = type(other.model.rotary_emb)(other.config)
    assert not any(p.is_meta for p in other.parameters())
    other.generation_config.eos_token_id = None
    return other.eval()


def work(stops: str, batch: int, tokens: int, vocab: int) -> tuple[list[list[int]], list[int]]:
    """Prompts, and how many tokens each is continued by."""
    rng = np.random.RandomState(0)
    rows = batch * (4 if stops == "queue" else 1)
    prompts = [rng.randint(0, vocab, size=n).tolist() for n in rng.randint(8, 41, size=rows)]
    if stops == "even":
        return prompts, [tokens] * rows
    return prompts, np.clip(rng.exponential(tokens, size=rows), 1, 4 * tokens).astype(int).tolist()


def run_ours(model: Transformer, prompts: list[list[int]], lengths: list[int], batch: int) -> list[list[int]]:
    requests = [Request(i, p, Sampling(n, temperature=0)) for i, (p, n) in enumerate(zip(prompts, lengths))]
    found = dict(stream(model, requests, batch))
    return [found[i].ids for i in range(len(prompts))]


@torch.no_grad()
def run_theirs(model: Any, prompts: list[list[int]], lengths: list[int], batch: int) -> list[list[int]]:
    found = []
    for start in range(0, len(prompts), batch):
        some, wanted = prompts[start : start + batch], torch.tensor(lengths[start : start + batch])
        width = max(map(len, some))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in some])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in some])

        def stop(ids: torch.Tensor, scores: Any, width: int = width, wanted: torch.Tensor = wanted) -> torch.Tensor:
            return ids.shape[1] - width >= wanted

        longest = int(wanted.max())
        out = model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=longest,
            pad_token_id=0,
            stopping_criteria=[stop],
        )
        found += [row[width : width + n].tolist() for row, n in zip(out, lengths[start : start + batch])]
    return found


def measure(run: Callable[[], list[list[int]]]) -> tuple[float, list[list[int]]]:
    start = time.process_time()
    found = run()
    return time.process_time() - start, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="demo,smollm2")
    parser.add_argument("--model", help="measure this one instead")
    parser.add_argument("--batches", default="1,8,64")
    parser.add_argument("--stops", default="even,ragged,queue")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", help="append one JSON line a case to this file")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    records = []
    for name in [a.model] if a.model else a.shapes.split(","):
        if a.model:
            from nb_lightning.checkpoints.pretrained import load_pretrained

            ours = load_pretrained(a.model, "cpu", "float32").model
        else:
            ours = Transformer(SHAPES[name]).eval()
        theirs = transformers_model(ours)
        for batch in map(int, a.batches.split(",")):
            for stops in a.stops.split(","):
                prompts, lengths = work(stops, batch, a.tokens, ours.shape.vocab_size)
                seconds: dict[str, list[float]] = {"ours": [], "transformers": []}
                for _ in range(a.rounds):
                    one, found = measure(lambda: run_ours(ours, prompts, lengths, batch))  # noqa: B023
                    other, expected = measure(lambda: run_theirs(theirs, prompts, lengths, batch))  # noqa: B023
                    seconds["ours"].append(one)
                    seconds["transformers"].append(other)
                same = statistics.mean(x == y for x, y in zip(found, expected))
                rates = {side: sum(lengths) / statistics.median(s) for side, s in seconds.items()}
                records.append({"model": Path(name).name, "batch": batch, "stops": stops, "same": same, **rates})
                print(records[-1], file=sys.stderr, flush=True)
    append_jsonl(a.out, records)
    print(f"\nNew tokens per CPU-second, {a.threads} thread(s), float32; medians of {a.rounds}\n")
    rows = [
        [r["model"], r["batch"], r["stops"], r["transformers"], r["ours"], r["ours"] / r["transformers"],
         f"{r['same']:.0%}"] for r in records
    ]  # fmt: skip
    print(table(["model", "batch", "stops", "transformers", "ours", "ratio", "rows alike"], rows))


if __name__ == "__main__":
    main()
