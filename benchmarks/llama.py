"""transformers' Llama in the shape of the benchmarks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.common import Shape


def llama(s: Shape, context: int, weights: Mapping[str, Any] | None = None, **more: Any) -> Any:
    """Build a LlamaForCausalLM from weights with the names of nb_lightning's Transformer; `more` goes to its config."""
    import transformers

    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=s.vocab, hidden_size=s.dim, intermediate_size=s.mlp, num_hidden_layers=s.layers,
        num_attention_heads=s.heads, num_key_value_heads=s.kv_heads, head_dim=s.head_dim, rms_norm_eps=s.eps,
        rope_parameters={"rope_type": "default", "rope_theta": s.theta}, max_position_embeddings=context,
        tie_word_embeddings=False, attn_implementation="sdpa", bos_token_id=0, eos_token_id=1, **more,
    ))  # fmt: skip
    if weights is not None:
        model.load_state_dict({_hf_name(name): weight for name, weight in weights.items()})
    return model


def _hf_name(name: str) -> str:
    if name == "head.weight":
        return "lm_head.weight"
    for mine, theirs in (
        ("embedding.", "embed_tokens."), ("attention_norm", "input_layernorm"), ("attention.", "self_attn."),
        ("mlp_norm", "post_attention_layernorm"),
    ):  # fmt: skip
        name = name.replace(mine, theirs)
    return f"model.{name}"
