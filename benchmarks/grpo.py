"""CPU-seconds of one on-policy GRPO step, sampling and training apart, beside a hand-written loop and TRL's trainer.

    python benchmarks/grpo.py [--rounds 1] [--steps 6] [--peers ours,floor,floor-compiled,trl,trl-compact]

A step samples 8 completions of up to 128 tokens to each of 8 prompts of 64, scores them, and updates the weights once.
`ours` is `stage=rl` in its Trainer. `floor` is the same by hand: prompts are run once, a cache of fixed size, the head
on completion tokens alone; `floor-compiled` compiles its loss. `trl` is GRPOTrainer over transformers' `generate`;
`trl-compact` is made to project completion tokens only, as it does on GPUs. Every trainer is a process of its own; they
take turns step by step. Random weights, temperature 1: 3 % of completions end before 128 tokens, in the floor none.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # before this folder: `data` is not our data.py

from benchmarks.common import BETAS, CLIP, ROOT, Shape, Turns, append_jsonl, table, take_turns
from benchmarks.llama import llama

WARMUP = 1
PROMPTS, GROUP, PROMPT, NEW = 8, 8, 64, 128
LR = 1e-6
KINDS = ("ours", "floor", "floor-compiled", "trl", "trl-compact")
FIRST_WORD = 4  # token i is the word "wi"; below are special tokens
CHAT = 5  # tokens that the chat template adds to a prompt


def words(number: int, length: int) -> str:
    """Prompt `number`, of `length` tokens."""
    rng = random.Random(number)
    return " ".join(f"w{rng.randrange(FIRST_WORD, Shape.vocab)}" for _ in range(length))


def reward(text: str) -> float:
    """Score by the share of even words: it differs inside every group and costs nothing."""
    found = [int(word[1:]) % 2 == 0 for word in text.split() if word[1:].isdigit()]
    return sum(found) / max(1, len(found))


class Even:
    """`reward` as a verifier."""

    in_process = True

    def score(self, prompt: str, completions: Sequence[str], reference: Any) -> list[Any]:
        from nb_lightning.rewards import Score

        return [Score(reward(text), {}) for text in completions]


def word_tokenizer(special: Sequence[str]) -> Any:
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    names = [*special, *(f"w{i}" for i in range(FIRST_WORD, Shape.vocab))]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=names[-1]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    return tokenizer


class Stopwatch:
    """CPU-seconds spent in a function since it was last read."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.seconds = function, 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        began = time.process_time()
        try:
            return self.function(*args, **kwargs)
        finally:
            self.seconds += time.process_time() - began

    def read(self) -> float:
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def run_ours(folder: Path, steps: int, micro: int) -> None:
    """Run train.py's stage, data and trainer, without the callbacks that filter, draw, save or validate."""
    import lightning.pytorch as pl
    from omegaconf import OmegaConf

    from benchmarks.corpus import base, composed, fit
    from nb_lightning.rewards import registry
    from nb_lightning.text.tokenizer import SPECIAL

    registry.BUILT_IN["even"] = "benchmarks.grpo:Even"
    word_tokenizer(SPECIAL).save(str(folder / "tokenizer.json"))
    tasks = [
        {"id": str(i), "source": "bench", "verifier": "even", "reference": None,
         "messages": [{"role": "user", "content": words(i, PROMPT - CHAT)}]}
        for i in range(steps * PROMPTS)
    ]  # fmt: skip
    (folder / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    phases = OmegaConf.load(ROOT / "conf/plan/rl/demo.yaml").stage.phases
    first, *others = phases
    cfg = composed([
        "stage=rl", *base(folder, Shape()), f"data.tokenizer={folder}/tokenizer.json",
        f"+data.sources.bench={folder}/tasks.jsonl", "data.demo_tasks=false", "data.tasks=[]",
        f"stage.group_size={GROUP}", f"stage.max_new_tokens={NEW}", "stage.mask_truncated=false",
        f"stage.micro_batch_size={micro}", *(f"~stage.phases.{name}" for name in others),
        *(f"~stage.phases.{first}.mixture.{name}" for name in phases[first].mixture),
        f"+stage.phases.{first}.mixture.bench=1.0", f"stage.phases.{first}.steps={steps}",
        f"stage.phases.{first}.prompts={PROMPTS}", f"stage.phases.{first}.seq_len={PROMPT + NEW}",
        f"stage.phases.{first}.rope_theta={Shape.theta}", f"stage.phases.{first}.lr={{start: {LR}, end: null}}",
    ])  # fmt: skip

    class Clock(pl.Callback):
        turns = Turns()

        def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
            self.sampling = module.roll_out = Stopwatch(module.roll_out)
            self.turns.begin()

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            tokens = int(outputs["rl/sampled_tokens"])
            self.turns.end_of_step(float(outputs["train/loss"]), tokens=tokens, sampling=self.sampling.read())

    fit(cfg, ("fg_wsd", "data_mixture", "context_extension"), Clock())


def run_floor(folder: Path, steps: int, compiled: bool) -> None:
    import torch
    import torch.nn.functional as F
    from torch import Tensor

    from benchmarks.plain import Block, Llama, adamw, rotate, update

    s, rows = Shape(), PROMPTS * GROUP
    model = Llama(s, PROMPT + NEW)
    optimizer = adamw(model)
    optimizer.param_groups[0]["lr"] = LR
    tokenizer = word_tokenizer(("<s>", "</s>", "<pad>", "<unk>"))

    def attend(block: Block, x: Tensor, at: slice, keys: Tensor, values: Tensor) -> Tensor:
        """One layer over the tokens `at` of each row; their keys and values go to the cache, all before are there."""
        B, T, _ = x.shape
        qk, v = block.qkv(block.norm_1(x)).view(B, T, -1, s.head_dim).split((s.heads + s.kv_heads, s.kv_heads), 2)
        q, k = rotate(qk, model.cos[:, at], model.sin[:, at]).split((s.heads, s.kv_heads), 2)
        keys[:, :, at], values[:, :, at] = k.transpose(1, 2), v.transpose(1, 2)
        keys, values = keys[:, :, : at.stop], values[:, :, : at.stop]
        if T == 1:  # query heads of a group are the "tokens" of one query
            a = F.scaled_dot_product_attention(q.view(B, s.kv_heads, -1, s.head_dim), keys, values)
        else:
            a = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, is_causal=True, enable_gqa=True)
            a = a.transpose(1, 2)
        x = x + block.out(a.reshape(B, T, -1))
        h = block.norm_2(x)
        return x + block.down(F.silu(block.gate(h)) * block.up(h))

    def draw(logits: Tensor) -> Tensor:  # an exponential race: the first to arrive is drawn by its rate
        return (logits.softmax(-1) / torch.empty_like(logits).exponential_()).argmax(-1, keepdim=True)

    @torch.no_grad()
    def sample(prompts: Tensor) -> Tensor:
        """[64, 128] tokens."""
        shape = (2, s.layers, rows, s.kv_heads, PROMPT + NEW, s.head_dim)
        cache, once = torch.zeros(shape), torch.zeros(2, s.layers, PROMPTS, *shape[3:])
        x = model.embedding(prompts)
        for block, keys, values in zip(model.blocks, *once):
            x = attend(block, x, slice(0, PROMPT), keys, values)
        cache[..., :PROMPT, :] = once[..., :PROMPT, :].repeat_interleave(GROUP, 2)
        found = [draw(model.head(model.norm(x[:, -1])).repeat_interleave(GROUP, 0))]
        for t in range(PROMPT, PROMPT + NEW - 1):
            x = model.embedding(found[-1])
            for block, keys, values in zip(model.blocks, *cache):
                x = attend(block, x, slice(t, t + 1), keys, values)
            found.append(draw(model.head(model.norm(x[:, 0]))))
        return torch.cat(found, 1)

    def loss_of(ids: Tensor, advantages: Tensor) -> Tensor:
        hidden = model.hidden(ids[:, :-1], torch.arange(PROMPT + NEW - 1))[:, PROMPT - 1 :]
        logprobs = -F.cross_entropy(model.head(hidden).flatten(0, 1), ids[:, PROMPT:].flatten(), reduction="none")
        ratio = (logprobs - logprobs.detach()).exp()
        weight = advantages.repeat_interleave(NEW)
        return -torch.minimum(ratio * weight, ratio.clamp(0.8, 1.2) * weight).mean()

    loss_of = torch.compile(loss_of) if compiled else loss_of
    turns, watch = Turns(), Stopwatch(sample)
    turns.begin()
    for step in range(steps):
        texts = [words(step * PROMPTS + i, PROMPT) for i in range(PROMPTS)]
        prompts = torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(texts)])
        completions = watch(prompts)
        rewards = torch.tensor([reward(text) for text in tokenizer.decode_batch(completions.tolist())])
        groups = rewards.view(PROMPTS, GROUP)
        advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
        loss = loss_of(torch.cat((prompts.repeat_interleave(GROUP, 0), completions), 1), advantages.flatten())
        loss.backward()
        update(model, optimizer)
        turns.end_of_step(loss.item(), tokens=completions.numel(), sampling=watch.read())


def run_trl(folder: Path, steps: int, compact: bool) -> None:
    import torch
    import transformers
    import trl.trainer.utils
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    if compact:
        trl.trainer.utils._use_triton = lambda device: True
    transformers.logging.set_verbosity_error()
    model = llama(Shape(), PROMPT + NEW, pad_token_id=2)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer(("<s>", "</s>", "<pad>", "<unk>")), bos_token="<s>", eos_token="</s>",
        pad_token="<pad>", unk_token="<unk>", padding_side="left",
    )  # fmt: skip
    turns, last = Turns(), {}

    class Trainer(GRPOTrainer):
        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            found = last["watch"](*args, **kwargs)
            last["tokens"] = sum(len(ids) for ids in found[0])
            return found

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            last["loss"] = super().training_step(*args, **kwargs)
            return last["loss"]

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            turns.begin()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            turns.end_of_step(last["loss"].item(), tokens=last["tokens"], sampling=last["watch"].read())

    settings = GRPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=PROMPTS * GROUP, num_generations=GROUP,
        max_completion_length=NEW, gradient_accumulation_steps=1, max_steps=steps, learning_rate=LR,
        lr_scheduler_type="constant", adam_beta1=BETAS[0], adam_beta2=BETAS[1], max_grad_norm=CLIP, weight_decay=0.0,
        beta=0.0, temperature=1.0, logging_strategy="no", save_strategy="no", report_to="none", use_cpu=True,
        bf16=False, optim="adamw_torch_fused", gradient_checkpointing=False, disable_tqdm=True, use_vllm=False,
    )  # fmt: skip
    trainer = Trainer(
        model=model, args=settings, processing_class=tokenizer, callbacks=[Clock()],
        reward_funcs=lambda completions, **more: [reward(text) for text in completions],
        train_dataset=Dataset.from_dict({"prompt": [words(i, PROMPT) for i in range(steps * PROMPTS)]}),
    )  # fmt: skip
    last["watch"] = Stopwatch(super(Trainer, trainer)._generate_single_turn)
    trainer.train()


def one_round(a: argparse.Namespace, number: int) -> list[dict[str, Any]]:
    words = [str(a.steps + WARMUP), str(a.micro)]
    commands = {kind: [sys.executable, __file__, "--child", kind, *words] for kind in a.peers.split(",")}
    with tempfile.TemporaryDirectory() as folder:
        records = take_turns(commands, Path(folder), a.steps + WARMUP, round=number)
    return [record for record in records if record["step"] >= WARMUP]


def summary(records: list[dict[str, Any]], bases: Sequence[str]) -> list[list[Any]]:
    """Medians by kind; a ratio is the median over the ratios of single turns."""
    cpu = {(r["kind"], r["round"], r["step"]): r["cpu"] for r in records}
    rows = []
    for kind in dict.fromkeys(r["kind"] for r in records):
        mine = [r for r in records if r["kind"] == kind]
        ratios = [
            statistics.median(r["cpu"] / cpu[base, r["round"], r["step"]] for r in mine) for base in bases
        ]  # fmt: skip
        parts = [(r["cpu"], r["sampling"], r["cpu"] - r["sampling"], r["peak_mb"], r["tokens"]) for r in mine]
        whole, sampling, training, peak, tokens = (statistics.median(part) for part in zip(*parts))
        rows.append([kind, whole, sampling, training, *ratios, peak, int(tokens)])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6, help=f"timed steps a round, after {WARMUP} that is not")
    parser.add_argument("--peers", default=",".join(KINDS))
    parser.add_argument(
        "--micro", type=int, default=PROMPTS * GROUP, help="rows of a forward, ours (stage.micro_batch_size)"
    )
    parser.add_argument("--out", help="append one JSON line a step to this file")
    a = parser.parse_args()
    records = [record for number in range(a.rounds) for record in one_round(a, number)]
    append_jsonl(a.out, records)
    bases = [base for base in KINDS[1:] if base in a.peers.split(",")]
    print(f"\n{PROMPTS} prompts x {GROUP} completions x {NEW} tokens, vocabulary {Shape.vocab}, float32, one thread; "
          f"{a.rounds} x {a.steps} steps\n")  # fmt: skip
    header = ["one step", "CPU-s", "sampling", "training", *(f"to {base}" for base in bases), "peak MiB", "tokens"]
    print(table(header, summary(records, bases)))


def child(kind: str, steps: int, micro: int) -> None:
    import torch

    torch.set_num_threads(1)
    folder = Path.cwd()
    if kind == "ours":
        run_ours(folder, steps, micro)
    elif kind.startswith("floor"):
        run_floor(folder, steps, kind == "floor-compiled")
    else:
        run_trl(folder, steps, kind == "trl-compact")
    os._exit(0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
