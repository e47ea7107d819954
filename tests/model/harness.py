"""Tiny models of the backbone, and the same as transformers' Llama."""

from __future__ import annotations

import torch
from torch import Tensor

from nb_lightning.model.transformer import ModelShape, Transformer

TINY = ModelShape(
    vocab_size=61, d_model=24, n_layers=3, n_heads=6, n_kv_heads=2, head_dim=8, d_mlp=40, norm_eps=1e-5, rope_theta=1e4
)


@torch.no_grad()
def random_model(shape: ModelShape, seed: int = 0) -> Transformer:
    """Every weight random, norms too, and large enough that a wrong one is seen in the logits."""
    model = Transformer(shape)
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.normal_(mean=float(p.dim() == 1), std=0.2, generator=generator)
    return model


def ids(B: int, T: int, vocab: int = TINY.vocab_size, seed: int = 0) -> Tensor:
    return torch.randint(1, vocab, (B, T), generator=torch.Generator().manual_seed(seed))


# Against transformers -----------------------------------------------------------------------------------------------


def llama(model: Transformer, rope_theta: float) -> torch.nn.Module:
    """transformers' Llama with the weights of `model`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    s = model.shape
    config = LlamaConfig(
        vocab_size=s.vocab_size,
        hidden_size=s.d_model,
        intermediate_size=s.d_mlp,
        num_hidden_layers=s.n_layers,
        num_attention_heads=s.n_heads,
        num_key_value_heads=s.n_kv_heads,
        head_dim=s.head_dim,
        rms_norm_eps=s.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        tie_word_embeddings=s.tie_embeddings,
        attn_implementation="eager",
    )
    reference = LlamaForCausalLM(config).eval()
    renamed = {
        ("model." if not name.startswith("head") else "")
        + name.replace("attention_norm", "input_layernorm")
        .replace("mlp_norm", "post_attention_layernorm")
        .replace("attention.", "self_attn.")
        .replace("embedding", "embed_tokens")
        .replace("head.weight", "lm_head.weight"): value
        for name, value in model.state_dict().items()
    }
    reference.load_state_dict(renamed)
    return reference
