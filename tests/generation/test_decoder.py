"""Generation against transformers' `generate`, against teacher forcing, and against itself in other company.

Run by torchrun this file is the script of `test_two_processes`.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from nb_lightning.generation import decoder as module
from nb_lightning.generation.decoder import Decoder, generate
from nb_lightning.generation.kv_cache import MIN_CAPACITY
from nb_lightning.generation.sampling import Sampling
from nb_lightning.model.transformer import ModelShape, Transformer
from tests.generation.harness import SAMPLED, expected, model_of, p_value, prompts, run_all
from tests.harness import ROOT, environment
from tests.model.harness import TINY, llama, random_model

GREEDY = Sampling(64, temperature=0)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return model_of()


# Against transformers -----------------------------------------------------------------------------------------------


@torch.no_grad()
def theirs(model: Transformer, prompt: list[int], max_new_tokens: int, stop_ids: tuple[int, ...] = ()) -> list[int]:
    reference = llama(model, model.rope.theta)
    reference.generation_config.eos_token_id = list(stop_ids) or None
    tokens = torch.tensor([prompt])
    out = reference.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.runs
@pytest.mark.parametrize("n_kv_heads, tie_embeddings", [(2, False), (1, True), (6, False)])
def test_greedy_equals_transformers(n_kv_heads: int, tie_embeddings: bool) -> None:
    """64 tokens of 8 prompts of ragged lengths, all in one batch here, one by one there."""
    model = model_of(n_kv_heads=n_kv_heads, tie_embeddings=tie_embeddings)
    if tie_embeddings:
        with torch.no_grad():
            model.norm.weight[::2] *= -1  # else it says its last token again and again
    completions = generate(model, prompts(), GREEDY)
    for prompt, completion in zip(prompts(), completions):
        assert completion.ids == theirs(model, prompt, 64)
        assert completion.finish_reason == "length"
        assert len(set(completion.ids)) > 4  # not one token for ever, whatever the cache holds


@pytest.mark.runs
def test_stop_tokens_equal_transformers(model: Transformer) -> None:
    stop_ids = (3, 17, 40, 41, 42)
    completions = generate(model, prompts(), replace(GREEDY, stop_ids=stop_ids))
    for prompt, completion in zip(prompts(), completions):
        assert completion.ids == theirs(model, prompt, 64, stop_ids)
        stopped = completion.ids[-1] in stop_ids
        assert completion.finish_reason == ("stop" if stopped else "length")
        assert not set(completion.ids[:-1]) & set(stop_ids)
    reasons = [completion.finish_reason for completion in completions]
    assert 2 < reasons.count("stop") and len({len(completion.ids) for completion in completions}) > 3  # ragged


def test_a_stop_token_in_the_last_place_is_a_stop(model: Transformer) -> None:
    (free,) = generate(model, prompts()[:1], GREEDY)
    n = free.ids.index(free.ids[9]) + 1
    (completion,) = generate(model, prompts()[:1], replace(GREEDY, max_new_tokens=n, stop_ids=(free.ids[9],)))
    assert completion.ids == free.ids[:n] and completion.finish_reason == "stop"


# Log-probabilities --------------------------------------------------------------------------------------------------


@pytest.mark.runs
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, Sampling(200, temperature=1.5, top_k=5)], ids=str)
def test_logprobs_are_the_teacher_forced_ones(model: Transformer, sampling: Sampling) -> None:
    """At temperature 1 and over the whole vocabulary, whatever the sampling; also past the cache's first capacity."""
    sampling = replace(sampling, top_logprobs=3)
    for prompt, completion in zip(prompts(), generate(model, prompts(), sampling, seeds=1)):
        row = torch.tensor([prompt + completion.ids])
        with torch.no_grad():
            logprobs = model(row)[0, len(prompt) - 1 : -1].log_softmax(-1)
        want = logprobs.gather(1, row[0, len(prompt) :, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logprobs), want, atol=1e-4, rtol=0)
        values, indices = logprobs.topk(3)
        assert [[id for id, _ in top] for top in completion.top] == indices.tolist()
        torch.testing.assert_close(
            torch.tensor([[p for _, p in top] for top in completion.top]), values, atol=1e-4, rtol=0
        )
    assert sampling.max_new_tokens < 100 or sampling.max_new_tokens > MIN_CAPACITY


def test_top_logprobs_of_each_row_as_it_asked(model: Transformer) -> None:
    decoder = Decoder(model)
    for n in (0, 2, 99):
        decoder.add(n, [1, 2], Sampling(1, top_logprobs=n))
    assert {token.key: len(token.top) for token in decoder.step()} == {0: 0, 2: 2, 99: TINY.vocab_size}


# Sampling -----------------------------------------------------------------------------------------------------------


@pytest.mark.runs
@pytest.mark.parametrize("sampling", [Sampling(1), Sampling(1, 0.6, top_k=20, top_p=0.95)], ids=str)
def test_the_first_tokens_follow_the_models_distribution(model: Transformer, sampling: Sampling) -> None:
    """Two tokens a row: the second after a first that was drawn, from keys and values in the cache."""
    sampling = replace(sampling, max_new_tokens=2)
    prompt = prompts()[1]
    drawn = np.array([completion.ids for completion in generate(model, [prompt] * 6000, sampling, max_batch=500)])
    with torch.no_grad():
        first = model(torch.tensor([prompt]))[0, -1].double().numpy()
        assert p_value(np.bincount(drawn[:, 0], minlength=61), expected(first, sampling)) > 1e-3
        most = np.bincount(drawn[:, 0]).argmax()
        second = model(torch.tensor([[*prompt, most]]))[0, -1].double().numpy()
    counts = np.bincount(drawn[drawn[:, 0] == most, 1], minlength=61)
    assert counts.sum() > 300 and p_value(counts, expected(second, sampling)) > 1e-3


@pytest.mark.runs
@pytest.mark.parametrize("max_batch", [1, 2, 3, 64])
def test_a_row_depends_on_its_seed_alone(model: Transformer, max_batch: int) -> None:
    """Not on the batch, its size, the order, or who else is there."""
    asked = prompts() * 3
    seeds = [[3, i] for i in range(len(asked))]
    base = generate(model, asked, SAMPLED, seeds)
    assert len({tuple(c.ids) for c in base}) == len(asked)  # equal prompts, other draws
    order = np.random.RandomState(1).permutation(len(asked))[:15]
    completions = generate(model, [asked[i] for i in order], SAMPLED, [seeds[i] for i in order], max_batch)
    for i, completion in zip(order, completions):
        assert completion.ids == base[i].ids and completion.finish_reason == base[i].finish_reason
        np.testing.assert_allclose(completion.logprobs, base[i].logprobs, atol=1e-4)
    assert {c.finish_reason for c in base} == {"stop", "length"}


def test_seeds(model: Transformer) -> None:
    """One seed for all gives row i [seed, i]."""
    sampling = Sampling(30)
    asked = [[1, 2]] * 3
    one = [c.ids for c in generate(model, asked, sampling, seeds=9)]
    assert one == [c.ids for c in generate(model, asked, sampling, seeds=[[9, 0], [9, 1], [9, 2]])]
    assert one[1:] == [c.ids for c in generate(model, asked[1:], sampling, seeds=[[9, 1], [9, 2]])]
    assert [c.ids for c in generate(model, asked, sampling, seeds=8)] != one
    state = torch.get_rng_state()
    generate(model, asked, SAMPLED)
    assert torch.equal(state, torch.get_rng_state())  # the trainer's own random numbers are left alone


def test_a_rows_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all tokens are equally likely a draw shows its number: those of numpy's generator, one after the other."""
    monkeypatch.setattr(module, "DRAWS", 20)
    flat = model_of()
    with torch.no_grad():
        flat.head.weight.zero_()
    (completion,) = generate(flat, [[1, 2]], Sampling(50), seeds=[[9, 4]])
    assert completion.ids == (np.random.default_rng([9, 4]).random(50) * TINY.vocab_size).astype(int).tolist()


@pytest.mark.runs
def test_rows_of_any_sampling_in_one_batch(model: Transformer) -> None:
    samplings = [GREEDY, SAMPLED, Sampling(20), Sampling(30, 0.7, top_k=4), Sampling(9, 2.0, top_p=0.3)] * 2
    alone = [generate(model, [p], s, [[1, i]])[0] for i, (p, s) in enumerate(zip(prompts(), samplings))]
    decoder = Decoder(model)
    for i, (prompt, sampling) in enumerate(zip(prompts(), samplings)):
        decoder.add(i, prompt, sampling, [1, i])
    completions = run_all(decoder)
    assert [completions[i].ids for i in range(8)] == [completion.ids for completion in alone]


# The model ----------------------------------------------------------------------------------------------------------


def test_no_prompts(model: Transformer) -> None:
    assert generate(model, [], GREEDY) == []


def test_the_model_is_in_the_mode_it_was_in(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = random_model(TINY).train()
    trained.activation_checkpointing = True
    assert [c.ids for c in generate(trained, prompts(), SAMPLED)] == [
        c.ids for c in generate(model, prompts(), SAMPLED)
    ]
    assert trained.training
    monkeypatch.setattr(module, "choose", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(trained, prompts(), SAMPLED)
    assert trained.training


def test_training_goes_on_after_generating() -> None:
    trained = random_model(TINY).train()
    generate(trained, prompts(), SAMPLED)
    trained(torch.tensor([[1, 2, 3]])).sum().backward()
    assert all(p.grad is not None for p in trained.parameters())


def test_bfloat16(model: Transformer) -> None:
    half = random_model(TINY).eval().bfloat16()
    (completion,) = generate(half, prompts()[:1], GREEDY)
    row = torch.tensor([prompts()[0] + completion.ids])
    with torch.no_grad():
        want = half(row)[0, 2:-1].float().log_softmax(-1).gather(1, row[0, 3:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(completion.logprobs), want, atol=0.15, rtol=0)


@pytest.mark.runs
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_prefill(model: Transformer) -> None:
    flex = random_model(TINY).eval()
    flex.attention_backend = "flex"
    assert [c.ids for c in generate(flex, prompts(), SAMPLED)] == [c.ids for c in generate(model, prompts(), SAMPLED)]


@pytest.mark.parametrize(
    "asked, seeds, message",
    [
        ([[1], []], 0, "prompt 1 is empty; give it at least one token"),
        ([[1, 61]], 0, "prompt 0 has token 61; the model's vocabulary is 0 to 60"),
        ([[60, -1]], 0, "prompt 0 has token -1; the model's vocabulary is 0 to 60"),
        ([[1], [2]], [1], "1 seeds for 2 prompts"),
    ],
)
def test_bad_input(model: Transformer, asked: list[list[int]], seeds: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(model, asked, GREEDY, seeds)


# Two processes ------------------------------------------------------------------------------------------------------


@pytest.mark.runs
def test_two_processes() -> None:
    """Under FSDP2 each rank has prompts of its own, other numbers and lengths; then it trains on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    env = environment(PYTHONPATH=str(ROOT))
    done = subprocess.run([*launcher, __file__], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


def two_ranks() -> None:
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh

    from nb_lightning.model.layout import shard

    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    for tie_embeddings in (False, True):
        shape: ModelShape = replace(TINY, tie_embeddings=tie_embeddings)
        full, sharded = random_model(shape), random_model(shape)
        shard(sharded, init_device_mesh("cpu", (2,)), "32-true")
        asked = prompts()[: 2 + 5 * rank]
        sampling = replace(SAMPLED, max_new_tokens=5 + 60 * rank)
        for _ in range(2):
            assert generate(sharded, asked, sampling, seeds=rank) == generate(full, asked, sampling, seeds=rank)
            row = torch.tensor([[1, 2, 3, 4 + rank]])
            for model in (full, sharded):
                model.zero_grad()
                model(row).float().log_softmax(-1)[..., 0].sum().backward()
            for p, q in zip(full.parameters(), sharded.parameters()):
                distributed.all_reduce(p.grad)
                torch.testing.assert_close(q.grad.full_tensor() * 2, p.grad, atol=1e-5, rtol=1e-4)
                assert q.to_local().numel() < p.numel()  # sharded again
    distributed.destroy_process_group()


if __name__ == "__main__":
    two_ranks()
