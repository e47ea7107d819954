"""Tiny base folders in the shapes of the Nanbeige family: config, random weights, tokenizer and chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from nb_lightning.checkpoints.hf_config import shape_from_config
from nb_lightning.checkpoints.hf_weights import save_hf
from nb_lightning.model.transformer import ModelShape
from tests.checkpoints.harness import Random, train

PIECES, VOCAB = 1000, 1024  # the released models: 166100 pieces, 166144 rows of the embedding
CHAT_TOKENS = {  # token -> is it special
    "<|im_start|>": True,
    "<|im_end|>": True,
    "<|endoftext|>": True,
    "<think>": False,
    "</think>": False,
    "<tool_call>": False,
    "</tool_call>": False,
}
IM_START, IM_END, END_OF_TEXT = PIECES, PIECES + 1, PIECES + 2

_SHAPE = {  # widths are multiples of 64, which 4-bit layers ask for
    "vocab_size": VOCAB, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "rope_scaling": None, "attention_bias": False, "tie_word_embeddings": False, "torch_dtype": "float32",
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "4-3B": {  # the base model, whose files name the end of a document only
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "mlp_bias": False, "rope_theta": 5e6,
        "max_position_embeddings": 65536, "bos_token_id": 1, "eos_token_id": 2, **_SHAPE,
    },
    "4.1": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "mlp_bias": False, "rope_theta": 7e7,
        "max_position_embeddings": 262144, "bos_token_id": IM_START, "eos_token_id": IM_END, "pad_token_id": 0,
        **_SHAPE,
    },
    "4.2": {
        "architectures": ["NanbeigeForCausalLM"], "model_type": "nanbeige", "rope_theta": 7e7, "num_loops": 2,
        "skip_loop_final_norm": False, "loop_loss_weights": [], "max_position_embeddings": 262144,
        "bos_token_id": IM_START, "eos_token_id": IM_END, "pad_token_id": 0, **_SHAPE,
    },
}  # fmt: skip


class RandomWeights(Random):
    """Weights as a fresh model has them: matrices of a small `std`, and norms of 1."""

    def __init__(self, shape: ModelShape, std: float = 0.02) -> None:
        super().__init__(shape)
        self.std = std

    def read(self, name: str) -> torch.Tensor:
        dims = self.stored[name].shape
        if len(dims) == 1:
            return torch.ones(dims)
        seed = sum(name.encode())
        return self.std * torch.randn(dims, generator=torch.Generator().manual_seed(seed))


def write_base(folder: Path, kind: str, template: str | None) -> Path:
    """Write a base folder of `kind` with random weights.

    Args:
        template: the chat template; None for a base model without one.
    """
    folder.mkdir(parents=True)
    config = CONFIGS[kind]
    shape = shape_from_config(config)
    save_hf(RandomWeights(shape), shape, folder, torch.float32, 10**9)
    _write_json(folder / "config.json", config)
    train(folder)
    (folder / "text").unlink()
    (folder / "tokenizer.vocab").unlink()
    is_chat = kind != "4-3B"
    decoder = {
        str(PIECES + i): {"content": token, "special": special, "normalized": False, "lstrip": False, "rstrip": False,
                          "single_word": False}
        for i, (token, special) in enumerate(CHAT_TOKENS.items())
    }  # fmt: skip
    tokenizer = {
        "tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, "add_eos_token": False,
        "bos_token": "<|im_start|>" if is_chat else "<s>", "eos_token": "<|im_end|>" if is_chat else "</s>",
        "unk_token": "<unk>", "pad_token": "<unk>", "added_tokens_decoder": decoder,
        "clean_up_tokenization_spaces": False, "model_max_length": config["max_position_embeddings"],
    }  # fmt: skip
    if template is not None:
        tokenizer["chat_template"] = template
    _write_json(folder / "tokenizer_config.json", tokenizer)
    return folder


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")
