"""One trainer each in a process of its own, for pretrain.py: `python peers.py KIND FOLDER STEPS ...`.

All start from the same weights and train on the same rows (weights.pt and rows.npy in FOLDER, made by `prepare`).
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # before this folder: `data` is not our data.py

import numpy as np
import torch

from benchmarks.common import ADAM_EPS, BETAS, CLIP, LR, Shape, Turns
from benchmarks.llama import llama
from benchmarks.plain import BLOCK_WEIGHTS

PER_STEP = ("fg_wsd", "data_mixture", "context_extension", "throughput")  # callbacks that act in every step


def prepare(a: argparse.Namespace) -> None:
    """Write the corpus, the weights, and the rows in the order of our loader."""
    from benchmarks.corpus import write_corpus
    from data.pretrain import PretrainData
    from nb_lightning.config.compose import plan_of
    from nb_lightning.model.transformer import ModelShape, Transformer

    write_corpus(a.folder, 2 * a.steps * a.rows * a.seq_len, a.vocab)
    cfg = config(a)
    plan = plan_of(cfg.stage).in_whole_steps()
    data = PretrainData(cfg, plan)
    data.open_sources()
    dataset = data.steps()
    batches = [micro for i in range(len(dataset)) for micro in dataset[i].micro_batches]
    rows = [torch.cat((batch.input_ids, batch.labels[:, -1:]), 1) for batch in batches]
    np.save(a.folder / "rows.npy", torch.cat(rows).numpy())
    model = Transformer(ModelShape(**asdict(cfg.model)))
    model.init_weights(cfg.seed)
    torch.save(model.state_dict(), a.folder / "weights.pt")


def config(a: argparse.Namespace, *more: str) -> Any:
    from benchmarks.corpus import composed, overrides

    words = overrides(a.folder, a.steps, Shape(a.vocab), a.seq_len, a.rows)
    return composed([*words, f"trainer.precision={a.precision}", f"run_name={a.kind}", *more])


def load(a: argparse.Namespace) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Rows [steps * rows, seq_len + 1] int64, and the weights by the names of nb_lightning's Transformer."""
    return torch.from_numpy(np.load(a.folder / "rows.npy")), torch.load(a.folder / "weights.pt", weights_only=True)


def run_plain(a: argparse.Namespace, compiled: bool) -> None:
    from benchmarks.plain import Llama, adamw, update

    rows, weights = load(a)
    model = Llama(Shape(a.vocab), a.seq_len)
    model.load(weights)
    del weights
    optimizer = adamw(model)
    step = torch.compile(model) if compiled else model
    turns = Turns()
    turns.begin()
    for batch in rows.split(a.rows):
        with torch.autocast("cpu", torch.bfloat16, enabled=a.precision == "bf16-mixed"):
            loss = step(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
        loss.backward()
        update(model, optimizer)
        turns.end_of_step(loss.item())


def run_ours(a: argparse.Namespace, bare: bool, compiled: bool) -> None:
    """train.py's own stage, data and trainer; without the callbacks that draw, save or validate."""
    import lightning.pytorch as pl

    from benchmarks.corpus import fit

    class Clock(pl.Callback):
        turns = Turns()

        def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            for group in trainer.optimizers[0].param_groups:  # without callbacks nobody else would
                group["lr"] = LR
            self.turns.begin()

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.turns.end_of_step(float(outputs["train/loss"]))

    cfg = config(a, f"trainer.compile={str(compiled).lower()}")
    fit(cfg, () if bare else PER_STEP, Clock())


def run_hf(a: argparse.Namespace) -> None:
    """transformers.Trainer over LlamaForCausalLM."""
    import transformers

    rows, weights = load(a)
    model = llama(Shape(a.vocab), a.seq_len, weights, use_cache=False)
    del weights
    turns = Turns()

    class Trainer(transformers.Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            self.last = super().training_step(*args, **kwargs)
            return self.last

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            turns.begin()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            turns.end_of_step(trainer.last.item())

    settings = transformers.TrainingArguments(
        output_dir=str(a.folder / "hf"), per_device_train_batch_size=a.rows, max_steps=a.steps, learning_rate=LR,
        lr_scheduler_type="constant", adam_beta1=BETAS[0], adam_beta2=BETAS[1], adam_epsilon=ADAM_EPS,
        max_grad_norm=CLIP, weight_decay=0.0, optim="adamw_torch_fused", bf16=a.precision == "bf16-mixed",
        use_cpu=True, logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True,
        remove_unused_columns=False, train_sampling_strategy="sequential",
    )  # fmt: skip
    # Labels that are shifted already, so that all 512 positions of a row are trained, as elsewhere.
    examples = [{"input_ids": row[:-1], "labels": row[1:], "shift_labels": row[1:]} for row in rows]
    trainer = Trainer(model=model, args=settings, train_dataset=examples, callbacks=[Clock()])
    trainer.train()


def run_litgpt(a: argparse.Namespace, eager: bool) -> None:
    """litgpt's own pretraining loop. It always compiles; `eager` takes that out."""
    if eager:
        torch.compile = lambda model, *args, **kwargs: model
    import litgpt.pretrain as litgpt
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.config import Config
    from litgpt.data import DataModule
    from torch.utils.data import DataLoader, Dataset

    s = Shape(a.vocab)
    rows, weights = load(a)
    turns, losses = Turns(), []

    class Rows(Dataset):
        def __getitem__(self, i: int) -> torch.Tensor:
            if i == 0:
                turns.begin()
            return rows[i]

        def __len__(self) -> int:
            return len(rows)

    class Data(DataModule):
        def connect(self, *args: Any, **kwargs: Any) -> None: ...
        def train_dataloader(self) -> Any:
            return DataLoader(Rows(), batch_size=a.rows)

        def val_dataloader(self) -> Any:  # it validates once before it trains
            return DataLoader(rows[: a.rows], batch_size=a.rows)

    def initialize(fabric: Any, model: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        model.load_state_dict(litgpt_weights(weights))
        weights.clear()

    def cross_entropy(*args: Any, **kwargs: Any) -> torch.Tensor:
        losses[:] = [real_cross_entropy(*args, **kwargs)]
        return losses[0]

    def fit(**kwargs: Any) -> None:
        optimizer = kwargs["state"]["optimizer"]
        zero_grad = optimizer.zero_grad

        def last_call_of_a_step(*args: Any, **kwargs: Any) -> None:
            zero_grad(*args, **kwargs)
            turns.end_of_step(losses[0].item())

        optimizer.zero_grad = last_call_of_a_step
        real_fit(**kwargs)

    real_fit, litgpt.fit = litgpt.fit, fit
    real_cross_entropy, litgpt.chunked_cross_entropy = litgpt.chunked_cross_entropy, cross_entropy
    litgpt.initialize_weights, litgpt.save_checkpoint = initialize, lambda *args, **kwargs: None
    litgpt.setup(
        model_name="bench",
        model_config=Config(
            name="bench", block_size=a.seq_len, n_layer=s.layers, n_embd=s.dim, n_head=s.heads,
            n_query_groups=s.kv_heads, head_size=s.head_dim, intermediate_size=s.mlp, vocab_size=s.vocab,
            padded_vocab_size=s.vocab, norm_class_name="RMSNorm", norm_eps=s.eps, bias=False, parallel_residual=False,
            mlp_class_name="LLaMAMLP", rotary_percentage=1.0, rope_base=int(s.theta), shared_attention_norm=False,
        ),
        out_dir=a.folder / "litgpt", precision=a.precision, data=Data(), devices=1,
        train=TrainArgs(
            save_interval=None, log_interval=1, global_batch_size=a.rows, micro_batch_size=a.rows, max_norm=CLIP,
            max_tokens=len(rows) * a.seq_len, lr_warmup_steps=1, min_lr=LR, tie_embeddings=False,
            max_seq_length=a.seq_len,
        ),
        eval=EvalArgs(interval=10**9, max_iters=1, initial_validation=False, final_validation=False),
        optimizer={
            "class_path": "torch.optim.AdamW",
            "init_args": {"lr": LR, "betas": BETAS, "eps": ADAM_EPS, "weight_decay": 0.0, "fused": True},
        },
        logger_name="csv",
    )  # fmt: skip


def litgpt_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our weights by litgpt's names."""
    result = {
        "lm_head.weight": weights["head.weight"],
        "transformer.wte.weight": weights["embedding.weight"],
        "transformer.ln_f.weight": weights["norm.weight"],
    }
    theirs = {"qkv": "attn.qkv", "out": "attn.proj", "gate": "mlp.fc_1", "up": "mlp.fc_2", "down": "mlp.proj"}
    for i in range(Shape.layers):
        for name, parts in BLOCK_WEIGHTS.items():
            value = torch.cat([weights[f"layers.{i}.{part}.weight"] for part in parts])
            result[f"transformer.h.{i}.{theirs.get(name, name)}.weight"] = value
    return result


KINDS = {
    "prepare": prepare,
    "plain": lambda a: run_plain(a, compiled=False),
    "plain-compiled": lambda a: run_plain(a, compiled=True),
    "ours": lambda a: run_ours(a, bare=False, compiled=False),
    "ours-bare": lambda a: run_ours(a, bare=True, compiled=False),
    "ours-compiled": lambda a: run_ours(a, bare=False, compiled=True),
    "hf": run_hf,
    "litgpt": lambda a: run_litgpt(a, eager=False),
    "litgpt-eager": lambda a: run_litgpt(a, eager=True),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("steps", type=int)
    parser.add_argument("--vocab", type=int, default=Shape.vocab)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--precision", default="32-true")
    return parser.parse_args()


if __name__ == "__main__":
    torch.set_num_threads(1)
    chosen = arguments()
    KINDS[chosen.kind](chosen)
    os._exit(0)
