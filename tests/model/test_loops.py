"""The looped transformer (Nanbeige4.2): the stack of layers runs several times with the same weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nb_lightning.checkpoints.gguf import GGUFWeights, save_gguf
from nb_lightning.checkpoints.hf_config import config_from_shape, shape_from_config
from nb_lightning.checkpoints.hf_weights import HFWeights, save_hf
from nb_lightning.dry_run.memory import memory_per_device
from nb_lightning.generation.decoder import Decoder
from nb_lightning.generation.sampling import Sampling
from nb_lightning.losses.head import cross_entropy
from nb_lightning.model.transformer import ModelShape, Transformer
from nb_lightning.model.weights import parameter_shapes
from tests.checkpoints.harness import Random
from tests.config.harness import composed
from tests.generation.harness import prompts, run_all
from tests.harness import Train, curve, read_trace
from tests.model.harness import TINY, ids, llama, random_model
from tests.stages.distributed_harness import assert_same_training, losses, torchrun

LOOPED = replace(TINY, n_loops=2)
SHAPES = [
    LOOPED,
    replace(TINY, n_loops=3),
    replace(LOOPED, norm_every_loop=False),
    replace(LOOPED, tie_embeddings=True),
]
RELEASED = {
    "architectures": ["NanbeigeForCausalLM"],
    "model_type": "nanbeige",
    "vocab_size": 166144,
    "hidden_size": 3072,
    "intermediate_size": 10752,
    "num_hidden_layers": 22,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 262144,
    "rope_theta": 70000000,
    "rope_scaling": None,
    "attention_bias": False,
    "rms_norm_eps": 1e-05,
    "num_loops": 2,
    "loop_loss_weights": [],
    "skip_loop_final_norm": False,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 166100,
    "eos_token_id": 166101,
    "torch_dtype": "bfloat16",
}


# The equations --------------------------------------------------------------------------------------------------------


def by_the_book(model: Transformer, tokens: Tensor) -> Tensor:
    """Logits [T, V] of one row [T], in float64, one head and one position after the other; no code of the library."""
    s, w = model.shape, {name: p.detach().double() for name, p in model.named_parameters()}
    T, half = len(tokens), s.head_dim // 2

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + s.norm_eps).sqrt() * weight

    def rotated(x: Tensor) -> Tensor:  # [T, E]: component e and e + E / 2 are a complex number, turned by its position
        angles = torch.arange(T)[:, None] * s.rope_theta ** (-2 * torch.arange(half).double() / s.head_dim)
        turned = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([turned.real, turned.imag], 1)

    x = w["embedding.weight"][tokens]
    for loop in range(s.n_loops):
        for i in range(s.n_layers):
            layer = {name.removeprefix(f"layers.{i}."): p for name, p in w.items() if name.startswith(f"layers.{i}.")}
            h = norm(x, layer["attention_norm.weight"])
            heads = []
            for head in range(s.n_heads):
                group = head // (s.n_heads // s.n_kv_heads)
                rows, shared = (slice(n * s.head_dim, (n + 1) * s.head_dim) for n in (head, group))
                q = rotated(h @ layer["attention.q_proj.weight"][rows].T)
                k = rotated(h @ layer["attention.k_proj.weight"][shared].T)
                v = h @ layer["attention.v_proj.weight"][shared].T
                scores = (q @ k.T / s.head_dim**0.5).masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
                heads.append(scores.softmax(1) @ v)
            x = x + torch.cat(heads, 1) @ layer["attention.o_proj.weight"].T
            h = norm(x, layer["mlp_norm.weight"])
            gate = h @ layer["mlp.gate_proj.weight"].T
            x = x + (gate * gate.sigmoid() * (h @ layer["mlp.up_proj.weight"].T)) @ layer["mlp.down_proj.weight"].T
        if s.norm_every_loop or loop == s.n_loops - 1:
            x = norm(x, w["norm.weight"])
    return x @ w.get("head.weight", w["embedding.weight"]).T


@pytest.mark.parametrize("shape", [TINY, *SHAPES])
def test_logits_equal_the_equations(shape: ModelShape) -> None:
    model, tokens = random_model(shape).eval(), ids(1, 17)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens)[0].double(), by_the_book(model, tokens[0]), atol=1e-5, rtol=1e-5)


def test_one_loop_is_transformers_llama() -> None:
    model, tokens = random_model(TINY).eval(), ids(2, 17)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), llama(model, TINY.rope_theta)(tokens).logits, atol=1e-5, rtol=1e-5)


def test_each_pass_and_each_norm_matters() -> None:
    tokens = ids(1, 9)
    with torch.no_grad():
        once, twice, bare = (random_model(s).eval()(tokens) for s in (TINY, LOOPED, SHAPES[2]))
    assert (once - twice).abs().max() > 0.1 and (twice - bare).abs().max() > 0.1


def test_a_packed_document_is_computed_as_if_alone() -> None:
    model, (a, b) = random_model(LOOPED).eval().double(), (ids(1, 7), ids(1, 5, seed=1))
    packed = torch.cat([a, b], 1)
    positions = torch.tensor([[*range(7), *range(5)]])
    with torch.no_grad():
        together = model(packed, positions, torch.tensor([0, 7, 12], dtype=torch.int32))
        torch.testing.assert_close(together[:, :7], model(a), atol=1e-12, rtol=0)
        torch.testing.assert_close(together[:, 7:], model(b), atol=1e-12, rtol=0)


def test_checkpointed_layers_give_the_same_gradients() -> None:
    tokens, gradients = ids(2, 12), []
    for checkpointed in (False, True):
        model = random_model(LOOPED).train()
        model.activation_checkpointing = checkpointed
        model(tokens, head=lambda h, w: cross_entropy(h, w, tokens.roll(-1, 1))).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


# Generation -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_decoding_with_the_cache_equals_decoding_without(shape: ModelShape) -> None:
    model, starts = random_model(shape).eval(), prompts()
    decoder = Decoder(model, len(starts))
    for i, start in enumerate(starts):
        decoder.add(i, start, Sampling(12, temperature=0.0))
    completions = run_all(decoder)
    for i, start in enumerate(starts):
        row = list(start)
        for _ in range(12):
            with torch.no_grad():
                row.append(int(model(torch.tensor([row]))[0, -1].argmax()))
        assert completions[i].ids == row[len(start) :]


# Counting -------------------------------------------------------------------------------------------------------------


def test_flops_count_every_pass_and_the_head_once() -> None:
    s = LOOPED
    layer = 24 * 8 * (2 * 6 + 2 * 2) + 3 * 24 * 40
    attention = 2 * 2 * 6 * 8 * 100 / 2  # two products of T x E per head, two operations each, half of it causal
    assert s.flops_per_token(100) == 3 * (2 * (6 * layer + 61 * 24) + 6 * attention)
    assert s.count_parameters() == TINY.count_parameters() == sum(p.numel() for p in Transformer(s).parameters())


def test_residual_writers_start_smaller_with_depth() -> None:
    once, twice = (Transformer(shape).layers[0].attention.o_proj.weight for shape in (TINY, LOOPED))
    torch.testing.assert_close(twice, once / 2**0.5)


def test_the_memory_table_grows_with_activations_only() -> None:
    cfg = composed("stage=pretrain", "model=demo")
    once, twice = (memory_per_device(cfg, replace(TINY, n_loops=n), 4096) for n in (1, 2))
    assert twice["activations"] == 2 * once["activations"]
    assert {key for key in once if once[key] != twice[key]} == {"activations"}


# Files ----------------------------------------------------------------------------------------------------------------


def test_the_released_config_is_the_shipped_shape() -> None:
    cfg = composed("stage=sft", "model=nanbeige4_2_3b", "plan=sft/nanbeige4_3b").model
    shape = shape_from_config(RELEASED)
    assert {key: getattr(cfg, key) for key in vars(shape)} == vars(shape)
    assert round(shape.count_parameters() / 1e9, 2) == 4.17


def test_a_round_trip_through_config_json() -> None:
    shape = shape_from_config(RELEASED)
    config = config_from_shape(shape, torch.bfloat16, max_position_embeddings=262144)
    assert {key: config[key] for key in RELEASED.keys() & config.keys() - {"rope_scaling"}} == {
        key: RELEASED[key] for key in RELEASED.keys() & config.keys() - {"rope_scaling"}
    }
    assert shape_from_config(config) == shape


@pytest.mark.parametrize(
    "change, words",
    [
        ({"loop_loss_weights": [0.5]}, "loop_loss_weights"),
        ({"qk_layernorm": True}, "qk_layernorm"),
        ({"enable_mhc": True}, "enable_mhc"),
        ({"enable_double_loop_split": True}, "enable_double_loop_split"),
        ({"enable_hyper_connection": True}, "enable_hyper_connection"),
        ({"enable_depth_attention": True}, "enable_depth_attention"),
        ({"loop_share_kv": True}, "loop_share_kv"),
        ({"loop_middle_layers": [3, 4]}, "loop_middle_layers"),
        ({"emb_neighbor_num": 2}, "emb_neighbor_num"),
        ({"ngram_insert_all_layers": True}, "ngram_insert_all_layers"),
        ({"insert_ngram_layer_idx": [1]}, "insert_ngram_layer_idx"),
        ({"num_loops": 0}, "num_loops is 0; it must be a whole number from 1 to 64"),
        ({"num_loops": 10**9}, "num_loops is 1000000000"),
        ({"architectures": ["LlamaForCausalLM"]}, "only .'NanbeigeForCausalLM'. is supported"),
    ],
)
def test_a_switch_that_the_backbone_does_not_compute_is_refused_by_name(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        shape_from_config({**RELEASED, **change})


def test_switches_that_are_off_are_no_obstacle() -> None:
    off = {"qk_layernorm": False, "enable_mhc": False, "loop_share_kv": False, "emb_neighbor_num": None, "mhc_rate": 4}
    assert shape_from_config({**RELEASED, **off}) == shape_from_config(RELEASED)


@pytest.mark.parametrize("shape", SHAPES)
def test_hugging_face_and_gguf_there_and_back_are_the_same_to_the_last_bit(shape: ModelShape, tmp_path: Path) -> None:
    weights = Random(shape)
    hf = tmp_path / "hf"
    hf.mkdir()
    save_hf(weights, shape, hf, torch.float32, 2**30)
    (hf / "config.json").write_text(json.dumps(config_from_shape(shape, torch.float32)))
    save_gguf(HFWeights(hf), shape, tmp_path / "a.gguf", "float32", 512, {}, "test")
    first = GGUFWeights(tmp_path / "a.gguf")
    save_gguf(first, first.shape, tmp_path / "b.gguf", "float32", 512, {}, "test")
    assert first.metadata["general.architecture"] == "nanbeige" and first.context == 512
    assert first.metadata["nanbeige.num_loops"] == shape.n_loops
    assert first.metadata["nanbeige.skip_loop_final_norm"] is not shape.norm_every_loop
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert first.shape == replace(shape, init_std=first.shape.init_std)
    for name in parameter_shapes(shape):
        assert torch.equal(first.read(name), weights.read(name)) and torch.equal(
            HFWeights(hf).read(name), first.read(name)
        )


# Runs -----------------------------------------------------------------------------------------------------------------


def test_a_run_learns_and_two_processes_equal_one(train: Train, corpus: Path, tmp_path: Path) -> None:
    train("model.n_loops=2", "callbacks=[pretrain,trace]", "hydra.searchpath=[pkg://nb_trace.conf]")
    run = tmp_path / "runs/pretrain"
    one = losses(read_trace(run))
    assert one[-1] < one[0] and curve(run, "train/loss")
    for strategy in ("ddp", "fsdp"):
        root = tmp_path / strategy
        root.mkdir()
        torchrun(corpus, root, "model.n_loops=2", f"trainer.strategy={strategy}", "stage.micro_batch_size=4",
                 "stage.phases.decay.micro_batch_size=1")  # fmt: skip
        assert_same_training(one, losses(read_trace(root / "runs/pretrain", rank=0)))
