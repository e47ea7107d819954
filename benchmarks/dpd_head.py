"""Distillation of preferences, DPO plus KL to a teacher: CPU-seconds and peak memory.

    python benchmarks/dpd_head.py step [--vocab 32768] [--steps 4] [--rounds 1] [--layers 6]
    python benchmarks/dpd_head.py memory [--vocab 166144] [--tokens 2048,4096,8192] [--chunk 512]

step: one optimizer step of 8 pairs (prompt 64, responses 32 to 192 tokens) with policy, frozen reference and teacher of
the same shape, beside assemblies of TRL's pieces over transformers' Llama in the same bare loop. The loss is checked to
be the same. `--layers 0` leaves the loss alone. Needs trl.

    ours                packed rows, losses.dpd_loss
    ours-cached         the same with the reference's log-probabilities computed beforehand
    trl-logits          padded rows, whole logits, selective_log_softmax and GKDTrainer.generalized_jsd_loss
    trl-compact         the same with logits of response tokens only
    trl-compact-cached  the same with the reference's log-probabilities computed beforehand
    trl-kernels         TRL's chunked kernels on the hidden states of response tokens

memory: of `losses.dpd_loss`, forward and backward, beyond weights, hidden states and their gradients, by tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # before this folder: `data` is not our data.py

from benchmarks.common import (
    MARK,
    Shape,
    Turns,
    append_jsonl,
    environment,
    memory_mb,
    reset_peak,
    table,
    take_turns,
)
from benchmarks.llama import llama

KINDS = ("ours", "ours-cached", "trl-logits", "trl-compact", "trl-compact-cached", "trl-kernels")
PAIRS, BETA, LAMBDA, WARMUP = 8, 0.1, 0.5, 1
Pair = tuple[list[int], list[int], list[int]]


def pairs_of(step: int, vocab: int) -> list[Pair]:
    rng = random.Random(step)

    def draw(n: int) -> list[int]:
        return [rng.randrange(4, vocab) for _ in range(n)]

    return [(draw(64), draw(rng.randint(32, 192)), draw(rng.randint(32, 192))) for _ in range(PAIRS)]


def batch_of(pairs: list[Pair]) -> Any:
    """One packed row, the two responses of a pair side by side."""
    from nb_lightning.batch import PreferenceBatch, pack_responses

    prompts = [prompt for prompt, _, _ in pairs for _ in range(2)]
    packed, index = pack_responses(prompts, [response for pair in pairs for response in pair[1:]])
    return PreferenceBatch(**packed, pairs=len(pairs), response_index=index)


# One optimizer step -------------------------------------------------------------------------------------------------


def shape_of(a: argparse.Namespace) -> Any:
    from nb_lightning.model.transformer import ModelShape

    s = Shape(a.vocab, a.layers)
    return ModelShape(
        vocab_size=s.vocab, d_model=s.dim, n_layers=s.layers, n_heads=s.heads, n_kv_heads=s.kv_heads,
        head_dim=s.head_dim, d_mlp=s.mlp, norm_eps=s.eps, rope_theta=s.theta,
    )  # fmt: skip


def models(a: argparse.Namespace, theirs: bool) -> list[Any]:
    """Policy, reference and teacher; the first two are equal."""
    import torch

    from nb_lightning.model.transformer import Transformer

    made = []
    for seed in (0, 0, 7):
        model = Transformer(shape_of(a))
        model.init_weights(seed)
        if theirs:
            model = llama(Shape(a.vocab, a.layers), 512, model.state_dict(), use_cache=False)
        made.append(model if not made else model.requires_grad_(False))
    torch.manual_seed(0)
    return made


def ours(a: argparse.Namespace, cached: bool) -> Callable[[int], Any]:
    """`loss(step)`, and the policy's parameters."""
    import torch

    from nb_lightning.losses.divergence import TeacherOutputs
    from nb_lightning.losses.dpd import dpd_loss, response_logprobs

    policy, reference, teacher = models(a, theirs=False)

    def run(model: Any, batch: Any, head: Callable) -> Any:
        return model(batch.input_ids, batch.position_ids, batch.cu_seqlens, head=head)

    @torch.no_grad()
    def of_reference(batch: Any) -> Any:
        return run(reference, batch, partial(response_logprobs, batch=batch))

    batches = [batch_of(pairs_of(step, a.vocab)) for step in range(a.steps + WARMUP)]
    if cached:
        for batch in batches:
            batch.ref_logprobs = of_reference(batch)
        del reference

    def loss(step: int) -> Any:
        batch = batches[step]
        if not cached:
            batch.ref_logprobs = of_reference(batch)
        with torch.no_grad():
            of_teacher = run(teacher, batch, lambda hidden, weight: TeacherOutputs(hidden.flatten(0, 1), weight))
        weights = {"beta": BETA, "lambda_plus": LAMBDA, "lambda_minus": LAMBDA}
        head = partial(dpd_loss, batch=batch, counts=batch.counts, teacher=of_teacher, **weights)
        return run(policy, batch, head)[0]

    return loss, policy


def trl(a: argparse.Namespace, pieces: str) -> Callable[[int], Any]:
    import torch
    from torch.nn.utils.rnn import pad_sequence

    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl.experimental.gkd import GKDTrainer
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer import distillation_trainer
    from trl.trainer.utils import selective_log_softmax

    policy, reference, teacher = models(a, theirs=True)
    jsd = partial(GKDTrainer.generalized_jsd_loss, beta=0.0)  # 0 is the forward KL

    def padded(step: int) -> tuple[Any, Any, Any]:
        """Chosen rows, then rejected ones: ids, attention mask, and labels as GKD has them."""
        drawn = pairs_of(step, a.vocab)
        rows = [(prompt, pair[i]) for i in (1, 2) for pair in drawn for prompt in (pair[0],)]
        ids = pad_sequence([torch.tensor(p + r) for p, r in rows], batch_first=True)
        labels = pad_sequence([torch.tensor([-100] * len(p) + r) for p, r in rows], True, -100)
        mask = pad_sequence([torch.ones(len(p) + len(r), dtype=torch.int64) for p, r in rows], batch_first=True)
        return ids, mask, labels[:, 1:]

    def dpo(of_policy: Any, of_reference: Any) -> Any:
        chosen, rejected = (of_policy - of_reference).chunk(2)
        return -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()

    def from_logits(step: int) -> Any:
        ids, mask, labels = padded(step)
        kept = labels != -100

        def logits(model: Any) -> Any:
            return model(input_ids=ids, attention_mask=mask).logits[:, :-1]

        def response(values: Any) -> Any:
            return (selective_log_softmax(values, ids[:, 1:]) * kept).sum(1)

        with torch.no_grad():
            of_reference = response(logits(reference))
            of_teacher = logits(teacher)
        student, sides = logits(policy), (slice(0, PAIRS), slice(PAIRS, None))
        kl = sum(jsd(student[side], of_teacher[side], labels=labels[side]) for side in sides)
        return dpo(response(student), of_reference) + LAMBDA * kl

    known: dict[int, Any] = {}  # the reference's log-probabilities by step

    def from_hidden(step: int, only_reference: bool = False) -> Any:
        ids, mask, labels = padded(step)
        kept = labels != -100
        rows, target = kept.nonzero()[:, 0], labels[kept]
        sides = [rows < PAIRS, rows >= PAIRS]

        def hidden(model: Any) -> Any:
            return model.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, :-1][kept]

        def response(logprobs: Any) -> Any:
            return torch.zeros(2 * PAIRS).index_add(0, rows, logprobs)

        def kernel(h: Any, model: Any) -> Any:
            arguments = (model.lm_head.weight, None, target, 1.0, 32768, None, 1.0, ("log_probs",))
            return ChunkedLogProbFunction.apply(h, *arguments)[0]

        def divergence(h: Any, t: Any) -> Any:
            heads = (policy.lm_head.weight, teacher.lm_head.weight)
            arguments = (*heads, torch.ones(1, len(h)))
            return distillation_trainer._chunked_divergence_loss(h[None], t[None], *arguments, beta=0.0)[0]

        with torch.no_grad():
            if step not in known:
                h = hidden(reference)
                whole = pieces != "kernels"
                known[step] = response(
                    selective_log_softmax(reference.lm_head(h), target) if whole else kernel(h, reference)
                )
                if only_reference:
                    return None
            of_reference, t = known[step], hidden(teacher)
            of_teacher = None if pieces == "kernels" else teacher.lm_head(t)
        h = hidden(policy)
        if pieces == "kernels":
            kl = sum(divergence(h[side], t[side]) for side in sides)
            return dpo(response(kernel(h, policy)), of_reference) + LAMBDA * kl
        student = policy.lm_head(h)
        kl = sum(jsd(student[side], of_teacher[side], labels=target[side]) for side in sides)
        return dpo(response(selective_log_softmax(student, target)), of_reference) + LAMBDA * kl

    if pieces == "compact-cached":
        for step in range(a.steps + WARMUP):
            from_hidden(step, only_reference=True)
        del reference
    return (from_logits if pieces == "logits" else from_hidden), policy


def train(a: argparse.Namespace) -> None:
    """One assembly in this process."""
    import torch

    from benchmarks.plain import adamw, update

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    family, _, variant = a.child.partition("-")
    loss_of, policy = ours(a, variant == "cached") if family == "ours" else trl(a, variant)
    optimizer = adamw(policy)
    turns = Turns()
    turns.begin()
    for step in range(a.steps + WARMUP):
        loss = loss_of(step)
        loss.backward()
        update(policy, optimizer)
        turns.end_of_step(loss.item())
    os._exit(0)


def steps(a: argparse.Namespace) -> None:
    words = ["step", "--vocab", str(a.vocab), "--steps", str(a.steps), "--layers", str(a.layers), "--child"]
    commands = {kind: [sys.executable, __file__, *words, kind] for kind in a.kinds.split(",")}
    with tempfile.TemporaryDirectory() as folder:
        rounds = [take_turns(commands, Path(folder), a.steps + WARMUP, round=number) for number in range(a.rounds)]
    records = [record for one in rounds for record in one]
    append_jsonl(a.out, records)
    first = {r["kind"]: r["loss"] for r in records if r["step"] == 0}
    assert max(first.values()) - min(first.values()) < 1e-4, f"not the same loss: {first}"
    timed = [r for r in records if r["step"] >= WARMUP]
    cpu = {kind: statistics.median(r["cpu"] for r in timed if r["kind"] == kind) for kind in first}
    peak = {kind: max(r["peak_mb"] for r in records if r["kind"] == kind) for kind in first}
    smallest = min((peak[kind] for kind in first if kind.startswith("trl")), default=float("nan"))
    turns = {(r["kind"], r["round"], r["step"]): r["cpu"] for r in timed}
    rows = []
    for kind in first:  # a ratio is the median over single turns, which saw the same machine
        ratios = []
        for base in ("trl-compact", "trl-compact-cached"):
            pairs = [v / turns[base, *turn] for (name, *turn), v in turns.items() if name == kind and base in first]
            ratios.append(statistics.median(pairs) if pairs else None)
        rows.append([kind, cpu[kind], *ratios, peak[kind], peak[kind] / smallest])
    print(f"\n{PAIRS} pairs, vocabulary {a.vocab:,}, {a.layers} layers, float32; first loss {first}\n")
    header = ["one step", "CPU-s", "to trl-compact", "to trl-compact-cached", "peak MiB beyond start"]
    print(table([*header, "to TRL's smallest"], rows))


# Memory of the head -------------------------------------------------------------------------------------------------


def case(a: argparse.Namespace) -> None:
    import torch

    from nb_lightning.losses.divergence import TeacherOutputs
    from nb_lightning.losses.dpd import dpd_loss

    torch.set_num_threads(1)
    tokens, response = a.case, [5] * (a.case // 4)
    batch = batch_of([([1], response, response)] * 2)
    batch.ref_logprobs = torch.zeros(2, 2)
    assert int(batch.counts["chosen_tokens"] + batch.counts["rejected_tokens"]) == tokens == batch.labels.numel()
    torch.manual_seed(0)
    hidden = torch.randn(1, tokens, a.dim).requires_grad_()
    weight = (torch.randn(a.vocab, a.dim) * 0.02).requires_grad_()
    teacher = TeacherOutputs(torch.randn(tokens, a.dim), torch.randn(a.vocab, a.dim) * 0.02)
    reset_peak()
    base, start = memory_mb("VmRSS"), time.process_time()
    loss, _ = dpd_loss(hidden, weight, batch, batch.counts, teacher, chunk_size=a.chunk)
    loss.backward()
    gradients = (hidden.numel() + weight.numel()) * 4 / 2**20
    found = {"cpu": time.process_time() - start, "peak_mb": memory_mb("VmHWM") - base - gradients, "loss": loss.item()}
    print(MARK + json.dumps(found))


def memory(a: argparse.Namespace) -> None:
    rows = []
    for tokens in map(int, a.tokens.split(",")):
        command = [sys.executable, __file__, *sys.argv[1:], "--case", str(tokens)]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        found = json.loads(done.stdout.rpartition(MARK)[2])
        append_jsonl(a.out, [{"tokens": tokens, "vocab": a.vocab, "chunk": a.chunk, **found}])
        one = tokens * a.vocab * 4 / 2**20
        rows.append([tokens, found["cpu"], found["peak_mb"], one, 5 * one])
    print(f"\nvocabulary {a.vocab:,}, width {a.dim}, chunk {a.chunk}, float32; MiB beyond weights and gradients\n")
    # Without chunks: log-softmax of student and teacher, probabilities of the teacher, logits and their gradient.
    print(table(["tokens", "CPU-s", "peak MiB", "one [tokens, V]", "naive, five of them, by calculation"], rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("step", "memory"))
    parser.add_argument("--vocab", type=int)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--layers", type=int, default=Shape.layers)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--tokens", default="2048,4096,8192")
    parser.add_argument("--dim", type=int, default=Shape.dim)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--out", help="append JSON lines to this file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    a = parser.parse_args()
    a.vocab = a.vocab or {"step": 32_768, "memory": 166_144}[a.part]
    if a.child:
        train(a)
    elif a.case:
        case(a)
    else:
        {"step": steps, "memory": memory}[a.part](a)


if __name__ == "__main__":
    main()
