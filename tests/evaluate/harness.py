"""Models whose samples follow a known distribution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from nb_lightning.checkpoints.pretrained import Pretrained
from nb_lightning.checkpoints.tokenizer_files import load_tokenizer
from nb_lightning.model.transformer import ModelShape, Transformer
from nb_lightning.rewards.tasks import Task
from nb_lightning.text.chat_template import ChatTemplate

TOKENIZER = load_tokenizer("bytes")
END = TOKENIZER.tokenizer.token_to_id("<|im_end|>")


def id_of(text: str) -> int:
    (id,) = TOKENIZER.tokenizer.encode(text, add_special_tokens=False).ids
    return id


def chain(table: dict[str, dict[str, float]]) -> Transformer:
    """A model whose next token depends on the last one alone: `table[last][next]` is its probability."""
    V = TOKENIZER.vocab_size
    model = Transformer(ModelShape(V, V, 1, 1, 1, 2, 2)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0 if p.dim() == 1 else 0.0)  # the layer adds nothing
        model.embedding.weight.copy_(torch.eye(V))
        model.head.weight.fill_(-5.0)
        for last, following in table.items():
            for token, p in following.items():  # the last norm makes of a unit vector one of length sqrt(V)
                model.head.weight[id_of(token), id_of(last)] = np.log(p) / V**0.5
    return model


def pretrained_of(model: Transformer) -> Pretrained:
    return Pretrained(model, TOKENIZER, ChatTemplate.chatml(), (TOKENIZER.eos_id, END), "test")


def tasks_of(references: Sequence[Any], source: str = "s", verifier: str = "exact") -> list[Task]:
    return [
        Task(f"t{i}", source, [{"role": "user", "content": f"question {i}"}], verifier, reference)
        for i, reference in enumerate(references)
    ]


COIN = {"\n": {"4": 0.75, "7": 0.25}, "4": {"2": 1.0}, "2": {"<|im_end|>": 1.0}, "7": {"7": 1.0}}
