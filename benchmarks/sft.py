"""Useful tokens per CPU-second and peak memory of SFT on packed samples, beside a hand-written loop and TRL's packings.

    python benchmarks/sft.py [--rounds 1] [--steps 8] [--peers ours,varlen,trl-wrapped,trl-bfd]

600 samples of 16 to 512 tokens (median about 120), 40 % of each a prompt that is not trained on, in rows of 8 x 512.
`varlen` is the floor: the same maths by hand, one flat row, attention document by document. `trl-wrapped` is TRL's
fastest packing here, and lets samples that share a row attend to each other; `trl-bfd` too, where it lacks
FlashAttention. Every trainer is a process of its own; they take turns step by step. Useful tokens are not padding.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # before this folder: `data` is not our data.py

from benchmarks.common import BETAS, CLIP, LR, Shape, Turns, append_jsonl, table, take_turns
from benchmarks.llama import llama

WARMUP = 2
ROWS, SEQ_LEN, SAMPLES = 8, 512, 600
KINDS = ("ours", "varlen", "trl-wrapped", "trl-bfd")
Sample = tuple[list[int], list[int]]  # prompt, completion


def samples() -> list[Sample]:
    rng, found = random.Random(0), []
    for _ in range(SAMPLES):
        total = int(min(SEQ_LEN, max(16, rng.lognormvariate(4.8, 0.7))))
        prompt = max(4, int(0.4 * total))
        ids = [rng.randrange(264, Shape.vocab) for _ in range(total)]
        found.append((ids[:prompt], ids[prompt:]))
    return found


def run_ours(folder: Path, steps: int) -> None:
    """train.py's own stage, data and trainer; without the callbacks that draw, save or validate."""
    import lightning.pytorch as pl

    from benchmarks.corpus import base, composed, fit
    from benchmarks.peers import PER_STEP
    from data.prepare.chats import template_digest
    from data.prepare.source_writer import SampleWriter
    from nb_lightning.checkpoints.tokenizer_files import load_tokenizer
    from nb_lightning.text.chat_template import ChatTemplate
    from nb_lightning.token_source import TRAINED, SourceManifest

    tokenizer = load_tokenizer("bytes")  # only names the vocabulary here
    for split in ("train", "val"):
        template = template_digest(ChatTemplate(ChatTemplate.chatml().source, tokenizer.special))
        manifest = SourceManifest(tokenizer.digest, Shape.vocab, tokenizer.eos_id, template=template)
        writer = SampleWriter(folder / "chats" / split, manifest)
        for prompt, completion in samples():
            writer.add([*prompt, *(id | TRAINED for id in completion)])
        writer.close()
    cfg = composed([
        "stage=sft", *base(folder, Shape()), "data.demo_tasks=false", "data.tasks=[]", "init_from=null",
        f"data.sources.maths_sort={folder}/chats", "~stage.phases.overall", "stage.total_tokens=null",
        f"stage.global_batch_tokens={ROWS * SEQ_LEN}", f"stage.micro_batch_size={ROWS}",
        f"stage.phases.cold_start.tokens={steps * ROWS * SEQ_LEN}", f"stage.phases.cold_start.seq_len={SEQ_LEN}",
        f"stage.phases.cold_start.rope_theta={Shape.theta}", f"stage.phases.cold_start.lr={{start: {LR}, end: null}}",
        *(f"~stage.phases.cold_start.mixture.{name}" for name in OTHERS),
        "stage.phases.cold_start.mixture.maths_sort=1.0",
    ])  # fmt: skip

    class Clock(pl.Callback):
        turns = Turns()

        def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            self.turns.begin()

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            useful = sum(sum(_lengths(micro)) for micro in batch.micro_batches)
            self.turns.end_of_step(float(outputs["train/loss"]), useful=useful)

    def _lengths(micro: Any) -> list[int]:  # a row's padding is a document without labels
        lengths = micro.cu_seqlens.diff().tolist()
        trained = [bool((part != -100).any()) for part in micro.labels.flatten().split(lengths)]
        return [length + 1 for length, kept in zip(lengths, trained) if kept]

    fit(cfg, PER_STEP, Clock())


OTHERS = ("science_binary", "code_functions")  # sources of the demo's cold start beside maths_sort


def run_varlen(folder: Path, steps: int) -> None:
    import torch
    import torch.nn.functional as F

    from benchmarks.plain import Llama, adamw, update

    model = Llama(Shape(), SEQ_LEN)
    optimizer = adamw(model)
    turns = Turns()
    turns.begin()
    for group, _ in zip(_groups(), range(steps)):
        ids = torch.tensor([id for prompt, completion in group for id in prompt + completion])
        trained = torch.tensor([t for p, c in group for t in [False] * len(p) + [True] * len(c)])
        lengths = [len(p) + len(c) for p, c in group]
        starts = torch.tensor([0, *lengths]).cumsum(0)[:-1]
        positions = torch.arange(len(ids)) - starts.repeat_interleave(torch.tensor(lengths))
        kept = trained.roll(-1)
        kept[starts - 1] = False  # the last token of a document predicts nothing
        hidden = model.hidden(ids[None], positions, lengths)[0, kept]
        loss = F.cross_entropy(model.head(hidden), ids.roll(-1)[kept])
        loss.backward()
        update(model, optimizer)
        turns.end_of_step(loss.item(), useful=len(ids))


def _groups() -> Iterator[list[Sample]]:
    """Yield the samples of `ROWS` rows, packed best fit decreasing."""
    rows: list[list[Sample]] = []
    for sample in sorted(samples(), key=lambda s: -len(s[0] + s[1])):
        length = lambda row: sum(len(p) + len(c) for p, c in row)  # noqa: E731
        fits = [row for row in rows if length(row) + length([sample]) <= SEQ_LEN]
        max(fits, key=length).append(sample) if fits else rows.append([sample])
    random.Random(1).shuffle(rows)
    endless = cycle(rows)
    while True:
        yield [sample for _ in range(ROWS) for sample in next(endless)]


def run_trl(folder: Path, steps: int, packing: str) -> None:
    import torch
    import transformers
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from trl import SFTConfig, SFTTrainer

    model = llama(Shape(), SEQ_LEN, use_cache=False, pad_token_id=2)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(Shape.vocab)}, unk_token="w0"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w2")
    turns, last = Turns(), {}

    class Trainer(SFTTrainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            mask = inputs.get("attention_mask")
            last["useful"] = inputs["input_ids"].numel() if mask is None else int(mask.sum())
            last["loss"] = super().training_step(model, inputs, *args, **kwargs)
            return last["loss"]

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            turns.begin()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            turns.end_of_step(last["loss"].item(), useful=last["useful"])

    rows = [{"input_ids": p + c, "completion_mask": [0] * len(p) + [1] * len(c)} for p, c in samples()]
    settings = SFTConfig(
        output_dir=str(folder / "trl"), packing=True, packing_strategy=packing, max_length=SEQ_LEN,
        per_device_train_batch_size=ROWS, completion_only_loss=True, max_steps=steps, learning_rate=LR,
        lr_scheduler_type="constant", adam_beta1=BETAS[0], adam_beta2=BETAS[1], max_grad_norm=CLIP, weight_decay=0.0,
        logging_strategy="no", save_strategy="no", report_to="none", use_cpu=True, bf16=False,
        optim="adamw_torch_fused", gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    dataset = Dataset.from_list(rows)
    Trainer(model=model, args=settings, train_dataset=dataset, processing_class=tokenizer, callbacks=[Clock()]).train()


def one_round(a: argparse.Namespace, number: int) -> list[dict[str, Any]]:
    commands = {kind: [sys.executable, __file__, "--child", kind, str(a.steps + WARMUP)] for kind in a.peers.split(",")}
    with tempfile.TemporaryDirectory() as folder:
        records = take_turns(commands, Path(folder), a.steps + WARMUP, round=number)
    return [record for record in records if record["step"] >= WARMUP]


def summary(records: list[dict[str, Any]]) -> list[list[Any]]:
    """Tokens per CPU-second over all steps (steps differ in size); a ratio is of these."""
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_kind.setdefault(record["kind"], []).append(record)
    rate = {k: sum(r["useful"] for r in found) / sum(r["cpu"] for r in found) for k, found in by_kind.items()}
    peak = {k: statistics.median(r["peak_mb"] for r in found) for k, found in by_kind.items()}
    columns = [base for base in ("varlen", "trl-wrapped", "trl-bfd") if base in rate]
    return [[k, rate[k], *(rate[k] / rate[base] for base in columns), peak[k]] for k in rate]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8, help=f"timed steps a round, after {WARMUP} that are not")
    parser.add_argument("--peers", default=",".join(KINDS))
    parser.add_argument("--out", help="append one JSON line a step to this file")
    a = parser.parse_args()
    records = [record for number in range(a.rounds) for record in one_round(a, number)]
    append_jsonl(a.out, records)
    bases = [base for base in ("varlen", "trl-wrapped", "trl-bfd") if base in a.peers.split(",")]
    print(f"\nrows {ROWS} x {SEQ_LEN}, vocabulary {Shape.vocab}, float32, one thread; {a.rounds} x {a.steps} steps\n")
    print(table(["packed SFT", "useful tokens per CPU-s", *(f"to {b}" for b in bases), "peak MiB"], summary(records)))


def child(kind: str, steps: int) -> None:
    import torch

    torch.set_num_threads(1)
    folder = Path.cwd()
    if kind == "ours":
        run_ours(folder, steps)
    elif kind == "varlen":
        run_varlen(folder, steps)
    else:
        run_trl(folder, steps, kind.removeprefix("trl-"))
    os._exit(0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], int(sys.argv[3]))
    else:
        main()
