"""Tiny checkpoints in Hugging Face's format, and tokenizers beside them."""

from __future__ import annotations

import ast
import json
import pydoc_data.topics
import random
from pathlib import Path
from typing import Any

import sentencepiece
import torch

from nb_lightning.checkpoints.hf_config import shape_from_config
from nb_lightning.checkpoints.hf_weights import HFWeights
from nb_lightning.model.transformer import ModelShape, Transformer
from nb_lightning.model.weights import StoredTensor, Weights, load_weights, parameter_shapes
from tests.model.harness import TINY

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
    load_weights(model, HFWeights(folder))
    return model


# Files --------------------------------------------------------------------------------------------------------------


class Random(Weights):
    """Weights out of nothing."""

    def __init__(self, shape: ModelShape = TINY) -> None:
        stored = {name: StoredTensor(name, dims) for name, dims in parameter_shapes(shape).items()}
        super().__init__("nothing", stored, torch.float32)

    def read(self, name: str) -> torch.Tensor:
        return torch.randn(self.stored[name].shape, generator=torch.Generator().manual_seed(len(name)))


ENGLISH = "\n".join(pydoc_data.topics.topics[name] for name in ("naming", "assignment", "integers"))
CODE = Path(ast.__file__).read_text()


def train(folder: Path, **options: Any) -> sentencepiece.SentencePieceProcessor:
    """A `tokenizer.model` of 1,000 pieces in `folder`, byte-fallback BPE unless told otherwise."""
    (folder / "text").write_text(ENGLISH + CODE)
    chosen = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
              "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True, **options}  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "tokenizer"), vocab_size=1000, max_sentence_length=10**6,
        split_digits=True, minloglevel=2, **chosen,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def texts() -> list[str]:
    rng = random.Random(0)
    pieces = ["  ", " ", "a", "the", "\n", "1", "23", " ing", "é", "你好", "😀", "\t", "\u200b", "    "]
    mixed = ["".join(rng.choices(pieces, k=40)) for _ in range(300)]
    return [ENGLISH, CODE, "", " ", "x", " x", "  x  ", *(" " * n + "x" for n in range(40)), *mixed]
