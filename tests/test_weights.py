"""Hugging Face checkpoints in and out, beside transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nb_lightning.model import Transformer
from nb_lightning.weights import (
    HFWeights,
    fill,
    shape_from_config,
)
from tests.test_model import ids

# The released Nanbeige4-3B config (RECIPE.md section 1) in small.
NANBEIGE = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "hidden_size": 40,
    "initializer_range": 0.02,
    "intermediate_size": 64,
    "max_position_embeddings": 65536,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 10,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 70000000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 96,
}


def write(folder: Path, config: dict[str, Any], shard: str = "1GB", dtype: str = "float32") -> torch.nn.Module:
    """A checkpoint as transformers writes it, with random weights, and config.json as given."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**config)).to(getattr(torch, dtype)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(mean=float(p.dim() == 1), std=0.2)
    model.save_pretrained(folder, max_shard_size=shard)
    (folder / "config.json").write_text(json.dumps(config))
    return model


def load(folder: Path) -> Transformer:
    model = Transformer(shape_from_config(json.loads((folder / "config.json").read_text())))
    fill(model, HFWeights(folder))
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_logits_are_those_of_transformers(tmp_path: Path, tied: bool, shard: str) -> None:
    reference = write(tmp_path, {**NANBEIGE, "tie_word_embeddings": tied}, shard)
    assert (tmp_path / "model.safetensors").exists() == (shard == "1GB")
    tokens = ids(2, 50, 96)
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path)(tokens), reference(tokens).logits, atol=1e-4, rtol=1e-5)
