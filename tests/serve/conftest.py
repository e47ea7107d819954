"""Two small models, and a server that all tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nb_lightning.checkpoints.pretrained import Pretrained, load_pretrained
from nb_lightning.checkpoints.tokenizer_files import load_tokenizer
from nb_lightning.text.chat_template import ChatTemplate
from tests.serve.harness import (
    CONTEXT,
    DEFAULTS,
    END,
    END_OF_TURN,
    PAD,
    REPLIES,
    ROWS,
    TOOLS,
    Running,
    start,
    stop,
)

HOSTILE = """
{%- set said = messages[0].content -%}
{%- if said == 'raise' %}{{ raise_exception('not this') }}{% endif -%}
{%- if said == 'hang' %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif -%}
"""


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=260, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=CONTEXT, bos_token_id=None, eos_token_id=END,
        )
    )  # fmt: skip


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a model that knows `REPLIES` by heart, and says something to everything else."""
    from transformers import GenerationConfig

    folder = tmp_path_factory.mktemp("model") / "tiny"
    tokenizer, chat = load_tokenizer("bytes"), ChatTemplate.chatml()
    tokenizer.save(folder, HOSTILE + chat.source)
    talks = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in REPLIES.items()]
    texts = [*map(chat.render, talks), chat.render(talks[2], TOOLS)]
    rows = tokenizer.encode([text.removesuffix("\n") for text in texts])
    ids = torch.tensor([row + [PAD] * (max(map(len, rows)) - len(row)) for row in rows])
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(100):
        model(input_ids=ids, labels=ids.masked_fill(ids == PAD, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.generation_config = GenerationConfig(do_sample=True, eos_token_id=END, **DEFAULTS)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def endless(tmp_path: Path) -> Path:
    """A model that never says an end token: a component of its hidden state that nothing changes keeps them away."""
    load_tokenizer("bytes").save(tmp_path / "tiny", ChatTemplate.chatml().source)
    model = llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0
        model.lm_head.weight[[END, END_OF_TURN]] = 0
        model.lm_head.weight[[END, END_OF_TURN], 0] = -1e4
    model.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture(scope="session")
def loaded(folder: Path) -> Pretrained:
    return load_pretrained(str(folder), "cpu")


@pytest.fixture(scope="session")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    log = tmp_path_factory.mktemp("server") / "log"
    running = start(folder, log, "--max-batch", "8", "--max-queue", str(ROWS - 8), "--reasoning-content")
    yield running
    stop(running)
