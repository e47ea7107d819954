"""The backbone against transformers' Llama, against each document alone, and against counts made by hand."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nb_lightning.batch import PackedBatch
from nb_lightning.model import attention
from nb_lightning.model.transformer import ModelShape, RoPE, Transformer
from tests.model.harness import TINY, ids, llama, random_model

PAPER = ModelShape(166144, 2560, 32, 20, 4, 128, 10496)
EOS = 0


def assert_same_logits(model: Transformer, rope_theta: float, T: int) -> None:
    tokens = ids(2, T, model.shape.vocab_size)
    with torch.no_grad():
        expected = llama(model, rope_theta)(tokens).logits
        assert 0.5 < expected.std() < 5  # neither so small nor so large that 1e-5 would say nothing
        torch.testing.assert_close(model(tokens), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("n_kv_heads", [1, 2, 6])
@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_logits_equal_transformers(n_kv_heads: int, tie_embeddings: bool) -> None:
    shape = replace(TINY, n_kv_heads=n_kv_heads, tie_embeddings=tie_embeddings)
    assert_same_logits(random_model(shape), shape.rope_theta, T=20)


def test_logits_equal_transformers_with_a_large_rope_base_and_norm_eps() -> None:
    assert_same_logits(random_model(replace(TINY, rope_theta=70e6, norm_eps=0.1)), 70e6, T=20)


def test_logits_follow_a_change_of_the_rope_base_and_longer_rows() -> None:
    model = random_model(TINY)
    assert_same_logits(model, TINY.rope_theta, T=12)
    model.rope.theta = 70e6
    assert_same_logits(model, 70e6, T=12)
    assert_same_logits(model, 70e6, T=90)  # past the table of the first call
    model.rope.theta = TINY.rope_theta
    assert_same_logits(model, TINY.rope_theta, T=12)


@pytest.mark.parametrize("theta", [1e4, 5e6, 70e6])
def test_rope_angles_are_bitwise_those_of_transformers_up_to_64k(theta: float) -> None:
    """An ulp of the frequency is 0.002 of a cosine at position 65 535: released weights want the same rounding."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    x, positions = torch.zeros(1, 65_536, 1), torch.arange(65_536).unsqueeze(0)
    config = LlamaConfig(head_dim=128, rope_parameters={"rope_type": "default", "rope_theta": theta})
    expected = LlamaRotaryEmbedding(config)(x, positions)
    for ours, theirs in zip(RoPE(128, theta)(x, positions), expected):
        assert torch.equal(ours.squeeze(2), theirs[..., :64])


def test_position_ids_choose_the_angles() -> None:
    rope, x = RoPE(8, 1e4), torch.zeros(2, 6, 1)
    straight = torch.cat(rope(x, None), dim=-1)[0]
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 0, 1, 2, 3, 4]])
    chosen = torch.cat(rope(x, positions), dim=-1)
    assert torch.equal(chosen, straight[positions])


def test_angles_made_in_inference_mode_serve_training() -> None:
    model = random_model(TINY)
    with torch.inference_mode():
        model(ids(1, 6))
    model(ids(1, 6)).sum().backward()
    assert model.embedding.weight.grad is not None


# Packed documents ---------------------------------------------------------------------------------------------------


def documents(tokens: Tensor) -> list[tuple[int, int, int]]:
    """(row, start, end) of each document of `tokens` [B, T]; EOS ends one."""
    spans = []
    for row, line in enumerate(tokens.tolist()):
        start = 0
        for t, token in enumerate(line):
            if token == EOS or t == len(line) - 1:
                spans.append((row, start, t + 1))
                start = t + 1
    return spans


def gradients(model: Transformer) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("seed", range(3))
def test_packed_documents_equal_each_document_alone(seed: int) -> None:
    model = random_model(TINY).double()
    rows = ids(3, 18, seed=seed)
    rng = random.Random(seed)
    for _ in range(7):
        rows[rng.randrange(3), rng.randrange(18)] = EOS
    batch = PackedBatch.from_rows(rows, EOS)
    wanted = torch.randn(3, 17, TINY.vocab_size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    packed = model(batch.input_ids, batch.position_ids, batch.cu_seqlens)
    (packed * wanted).sum().backward()
    packed_gradients = gradients(model)

    for row, start, end in documents(batch.input_ids):
        alone = model(batch.input_ids[row : row + 1, start:end])
        torch.testing.assert_close(alone[0], packed[row, start:end], atol=1e-10, rtol=0)
        (alone[0] * wanted[row, start:end]).sum().backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(packed_gradients[name], gradient, atol=1e-10, rtol=1e-10)


# Counts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize("n_kv_heads", [1, 6])
def test_the_parameter_formula_counts_the_real_ones(tie_embeddings: bool, n_kv_heads: int) -> None:
    shape = replace(TINY, tie_embeddings=tie_embeddings, n_kv_heads=n_kv_heads)
    assert shape.count_parameters() == sum(p.numel() for p in Transformer(shape).parameters())


def test_the_papers_model_has_3_93_billion_parameters() -> None:
    with torch.device("meta"):
        model = Transformer(PAPER)
    assert all(p.is_meta for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == PAPER.count_parameters() == 3_933_637_120
    assert PAPER.count_parameters() - 2 * 166144 * 2560 == 3_082_979_840  # without the two embeddings


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_flops_are_those_that_forward_and_backward_run(tie_embeddings: bool) -> None:
    shape = replace(TINY, tie_embeddings=tie_embeddings)
    model = random_model(shape)
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):  # MATH: whole squares, seen as matmuls
        model(ids(2, 32)).sum().backward()
    assert counter.get_total_flops() == 2 * 32 * shape.flops_per_token(32, causal=False)


@pytest.mark.parametrize("seq_len, gigaflops", [(4096, 23.1), (32768, 37.2), (65536, 53.3)])
def test_flops_of_the_papers_model(seq_len: int, gigaflops: float) -> None:
    layer_weights = 2560 * 128 * (20 + 4 + 4 + 20) + 3 * 2560 * 10496
    matmul = 6 * (32 * layer_weights + 166144 * 2560)
    attention_half = 3 * 32 * (2 + 2) * seq_len * 20 * 128 / 2
    assert PAPER.flops_per_token(seq_len) == matmul + attention_half
    assert round(PAPER.flops_per_token(seq_len) / 1e9, 1) == gigaflops


# Initialisation -----------------------------------------------------------------------------------------------------


def test_initial_weights_have_the_standard_deviation_of_their_role() -> None:
    model = Transformer(replace(TINY, d_model=64, d_mlp=96, n_layers=8, vocab_size=500, init_std=0.03))
    for name, p in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (p == 1).all()
            continue
        into_residual = name.endswith(("attention.o_proj.weight", "mlp.down_proj.weight"))
        std = 0.03 / 4 if into_residual else 0.03  # sqrt(2 x 8 layers)
        tolerance = 5 / (2 * p.numel()) ** 0.5  # five standard errors
        assert p.std().item() == pytest.approx(std, rel=tolerance), name
        assert abs(p.mean().item()) < 5 * std / p.numel() ** 0.5, name


def test_each_seed_has_its_own_weights_and_each_layer_too() -> None:
    model = Transformer(TINY)
    first = {name: p.clone() for name, p in model.named_parameters()}
    model.init_weights(seed=1)
    matrices = [name for name, p in first.items() if p.dim() > 1]
    assert not any(torch.equal(first[name], model.get_parameter(name)) for name in matrices)
    assert not torch.equal(model.layers[0].mlp.up_proj.weight, model.layers[1].mlp.up_proj.weight)
    model.init_weights(seed=0)
    assert all(torch.equal(first[name], p) for name, p in model.named_parameters())


def test_initial_weights_do_not_depend_on_the_global_generator_or_on_meta() -> None:
    torch.manual_seed(5)
    usual = Transformer(TINY)
    torch.manual_seed(6)
    with torch.device("meta"):
        model = Transformer(TINY)
    model.to_empty(device="cpu").init_weights()
    assert all(torch.equal(a, b) for a, b in zip(usual.parameters(), model.parameters()))


def test_tied_embeddings_are_one_parameter() -> None:
    model = Transformer(replace(TINY, tie_embeddings=True))
    assert model.head.weight is model.embedding.weight
    assert "head.weight" not in dict(model.named_parameters())


# How it runs --------------------------------------------------------------------------------------------------------


def test_activation_checkpointing_recomputes_layers_and_gives_identical_gradients() -> None:
    model = random_model(TINY)
    batch = PackedBatch.from_rows(ids(2, 13).index_fill(1, torch.tensor([5]), EOS), EOS)
    runs: list[int] = []
    model.layers[0].register_forward_pre_hook(lambda *_: runs.append(1))

    def run() -> tuple[int, Tensor, dict[str, Tensor]]:
        runs.clear()
        logits = model(batch.input_ids, batch.position_ids, batch.cu_seqlens)
        logits.pow(2).sum().backward()
        return len(runs), logits, gradients(model)

    plain_runs, plain_logits, plain = run()
    model.activation_checkpointing = True
    checkpointed_runs, logits, checkpointed = run()
    assert (plain_runs, checkpointed_runs) == (1, 2)
    assert torch.equal(plain_logits, logits)
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)
    model.eval()
    assert run()[0] == 1  # nothing to save memory for


def test_the_head_gets_the_normed_hidden_states_and_its_weight() -> None:
    model = random_model(TINY)
    hidden, weight = model(ids(2, 5), head=lambda hidden, weight: (hidden, weight))
    assert hidden.shape == (2, 5, TINY.d_model) and weight is model.head.weight
    torch.testing.assert_close(hidden @ weight.T, model(ids(2, 5)))


def test_backends_get_queries_keys_and_values_of_one_dtype_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    sdpa = attention._ATTEND["sdpa"]

    def spy(q: Tensor, k: Tensor, v: Tensor, mask: attention.AttentionMask) -> Tensor:
        seen.add((q.dtype, k.dtype, v.dtype))
        return sdpa(q, k, v, mask)

    monkeypatch.setitem(attention._ATTEND, "sdpa", spy)
    with torch.autocast("cpu", torch.bfloat16):
        random_model(TINY)(ids(1, 4))
    assert seen == {(torch.bfloat16,) * 3}
