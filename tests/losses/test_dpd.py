"""DPO and DPD against naive float64 ones and hand calculations."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nb_lightning.batch import IGNORE, PreferenceBatch, pack_responses
from nb_lightning.losses import dpd
from nb_lightning.losses.divergence import Divergence, TeacherOutputs
from tests.losses.counting_harness import HeadProducts
from tests.losses.head_harness import most_likely, naive_divergence
from tests.losses.pairs_harness import LENGTHS, TEACHER_D, D, V, pack_pairs, random_pairs


def rows(batch: PreferenceBatch, width: int) -> PreferenceBatch:
    """The same tokens in rows of `width`, the last one padded."""
    missing = -batch.input_ids.numel() % width

    def pad(x: Tensor, value: int) -> Tensor:
        return F.pad(x.flatten(), (0, missing), value=value).view(-1, width)

    index = pad(batch.response_index, -1)
    return PreferenceBatch(
        pad(batch.input_ids, 0), pad(batch.labels, IGNORE), pairs=batch.pairs, response_index=index,
        ref_logprobs=batch.ref_logprobs,
    )  # fmt: skip


def states(batch: PreferenceBatch, seed: int = 1) -> tuple[Tensor, Tensor, TeacherOutputs]:
    """Hidden states and head of a student, and a teacher of another width, float64."""
    generator = torch.Generator().manual_seed(seed)
    B, T = batch.input_ids.shape
    draw = partial(torch.randn, dtype=torch.float64, generator=generator)
    hidden, head_weight = draw(B, T, D).requires_grad_(), draw(V, D).requires_grad_()
    return hidden, head_weight, TeacherOutputs(draw(B * T, TEACHER_D), draw(V, TEACHER_D))


def reference(batch: PreferenceBatch) -> Tensor:
    return -5 * torch.rand(batch.pairs, 2, generator=torch.Generator().manual_seed(4))


def naive_dpd(
    hidden: Tensor, head_weight: Tensor, batch: PreferenceBatch, teacher: TeacherOutputs, divergence: Divergence,
    variant: str, beta: float, smoothing: float, weights: tuple[float, float, float],
) -> Tensor:  # fmt: skip
    """Everything materialised, one response after the other, one mean a term."""
    logits = hidden.flatten(0, 1) @ head_weight.T
    of_teacher = teacher.hidden @ teacher.head_weight.T
    logprobs, labels, index = logits.log_softmax(-1), batch.labels.flatten(), batch.response_index.flatten()
    ratios, kl = [], ([], [])
    for response in range(2 * batch.pairs):
        at = (index == response).nonzero().flatten().tolist()
        total = sum((logprobs[t, labels[t]] for t in at), start=torch.zeros((), dtype=torch.float64))
        ratio = total - batch.ref_logprobs.double().flatten()[response]
        ratios.append(ratio / max(1, len(at)) if variant == "ipo" else ratio)
        kl[response % 2].extend(naive_divergence(divergence, logits[at], of_teacher[at]))
    terms = []
    for chosen, rejected in zip(ratios[::2], ratios[1::2]):
        x = chosen - rejected
        if variant == "sigmoid":
            terms.append(-(1 - smoothing) * F.logsigmoid(beta * x) - smoothing * F.logsigmoid(-beta * x))
        elif variant == "hinge":
            terms.append(torch.clamp(1 - beta * x, min=0))
        else:
            terms.append((x - 0.5 / beta) ** 2)
    means = [torch.stack(x).mean() for x in (terms, *kl)]
    return sum(w * mean for w, mean in zip(weights, means))


@pytest.mark.parametrize("variant, smoothing", [("sigmoid", 0.0), ("sigmoid", 0.2), ("hinge", 0.0), ("ipo", 0.0)])
@pytest.mark.parametrize(
    "divergence",
    [Divergence(), Divergence("reverse_kl", temperature=2.0), Divergence("jsd", beta=0.3)],
    ids=str,
)
@pytest.mark.parametrize("width, chunk", [(None, 5), (7, 13), (None, 512)])  # a pair has up to 8 trained tokens
def test_dpd_and_its_gradients_equal_the_naive_loss(
    variant: str, smoothing: float, divergence: Divergence, width: int | None, chunk: int
) -> None:
    batch = pack_pairs(random_pairs())
    batch.ref_logprobs = reference(batch)
    batch = rows(batch, width) if width else batch
    hidden, head_weight, teacher = states(batch)
    weights = (0.7, 0.5, 0.3)
    loss, _ = dpd.dpd_loss(
        hidden, head_weight, batch, batch.counts, teacher, beta=0.4, variant=variant, label_smoothing=smoothing,
        dpo_weight=weights[0], lambda_plus=weights[1], lambda_minus=weights[2], divergence=divergence, chunk_size=chunk,
    )  # fmt: skip
    expected = naive_dpd(hidden, head_weight, batch, teacher, divergence, variant, 0.4, smoothing, weights)
    torch.testing.assert_close(loss, expected, atol=1e-9, rtol=1e-9)
    for a, b in zip(
        torch.autograd.grad(loss, (hidden, head_weight)), torch.autograd.grad(expected, (hidden, head_weight))
    ):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def test_pairs_that_lie_apart_are_still_pairs() -> None:
    """All chosen responses, then all rejected ones: no chunk holds a whole pair."""
    pairs = random_pairs([(3, 5, 2), (1, 1, 7), (4, 3, 1)])
    together = pack_pairs(pairs, ref_logprobs=torch.zeros(3, 2))
    prompts = [pair[0] for pair in pairs]
    packed, index = pack_responses([*prompts, *prompts], [*(pair[1] for pair in pairs), *(pair[2] for pair in pairs)])
    index = torch.where(index < 0, -1, 2 * (index % 3) + index // 3).int()
    apart = PreferenceBatch(**packed, pairs=3, response_index=index, ref_logprobs=together.ref_logprobs)
    edges = apart.cu_seqlens.tolist()
    documents = [torch.arange(a, b) for a, b in pairwise(edges)]
    order = torch.cat([documents[i] for i in (0, 3, 1, 4, 2, 5)])
    hidden, head_weight, teacher = states(apart)
    moved = hidden.detach()[:, order].requires_grad_()
    expected, sums = dpd.dpd_loss(
        moved,
        head_weight,
        together,
        together.counts,
        TeacherOutputs(teacher.hidden[order], teacher.head_weight),
        beta=2.0,
        chunk_size=9,
    )
    loss, found = dpd.dpd_loss(hidden, head_weight, apart, apart.counts, teacher, beta=2.0, chunk_size=9)
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(found, sums, atol=1e-12, rtol=1e-12)
    (a, of_weight), (b, expected_of_weight) = (
        torch.autograd.grad(loss, (hidden, head_weight)), torch.autograd.grad(expected, (moved, head_weight)),
    )  # fmt: skip
    torch.testing.assert_close(a[:, order], b, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(of_weight, expected_of_weight, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("chunk", [5, 16, 512])  # pairs longer than a chunk, some to a chunk, all in one
@pytest.mark.parametrize("dpo_weight", [0.0, 1.0])
def test_the_reference_is_computed_as_the_loss_computes_it(chunk: int, dpo_weight: float) -> None:
    """In float32 and to the last bit: where policy and reference are one model, every margin is exactly 0."""
    batch = pack_pairs(random_pairs())
    hidden, head_weight, teacher = states(batch)
    hidden, head_weight = hidden.detach().float().requires_grad_(), head_weight.detach().float().requires_grad_()
    teacher = TeacherOutputs(teacher.hidden.float(), teacher.head_weight.float())
    batch.ref_logprobs = dpd.response_logprobs(hidden, head_weight, batch, chunk).detach()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            _, sums = dpd.dpd_loss(
                hidden, head_weight, batch, batch.counts, teacher, dpo_weight=dpo_weight, chunk_size=chunk
            )
        assert sums["margin"] == sums["chosen_reward"] == sums["rejected_reward"] == sums["accuracy"] == 0.0


def test_a_batch_of_no_pairs_adds_nothing() -> None:
    batch = pack_pairs(random_pairs())
    hidden, head_weight, teacher = states(batch)
    batch = replace(batch.silenced(), ref_logprobs=torch.zeros(0, 2))
    loss, sums = dpd.dpd_loss(hidden, head_weight, batch, batch.counts, teacher)
    loss.backward()
    assert loss == 0 and all(value == 0 for value in sums.values())
    assert not hidden.grad.any() and not head_weight.grad.any()
    assert dpd.response_logprobs(hidden, head_weight, batch).shape == (0, 2)


@pytest.mark.parametrize("weights", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 1.0, 0.0)])
def test_a_weight_of_0_leaves_its_term_out(weights: tuple[float, float, float]) -> None:
    batch = pack_pairs(random_pairs())
    batch.ref_logprobs = reference(batch)
    hidden, head_weight, teacher = states(batch)
    knobs = dict(zip(("dpo_weight", "lambda_plus", "lambda_minus"), weights))
    loss, _ = dpd.dpd_loss(hidden, head_weight, batch, batch.counts, teacher, **knobs)
    expected = naive_dpd(hidden, head_weight, batch, teacher, Divergence(), "sigmoid", 0.1, 0.0, weights)
    torch.testing.assert_close(loss, expected, atol=1e-9, rtol=1e-9)
    for a, b in zip(
        torch.autograd.grad(loss, (hidden, head_weight)), torch.autograd.grad(expected, (hidden, head_weight))
    ):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def test_micro_batches_of_a_step_add_up_to_the_whole_step() -> None:
    """Two micro-batches (or ranks) with the counts of both, against all pairs at once."""
    pairs = random_pairs()
    whole = pack_pairs(pairs)
    whole.ref_logprobs = reference(whole)
    hidden, head_weight, teacher = states(whole)
    loss, sums = dpd.dpd_loss(hidden, head_weight, whole, whole.counts, teacher)
    expected = torch.autograd.grad(loss, (hidden, head_weight))

    parts = [pack_pairs(pairs[a:b], ref_logprobs=whole.ref_logprobs[a:b]) for a, b in ((0, 2), (2, 6))]
    counts = {name: sum(part.counts[name] for part in parts) for name in whole.counts}
    assert counts == whole.counts
    total, gradients, logged, start = 0.0, [], {}, 0
    for part in parts:
        end = start + part.input_ids.numel()
        own = TeacherOutputs(teacher.hidden[start:end], teacher.head_weight)
        loss_of_part, found = dpd.dpd_loss(hidden[:, start:end], head_weight, part, counts, own)
        gradients.append(torch.autograd.grad(loss_of_part, (hidden, head_weight)))
        total, start = total + loss_of_part.detach(), end
        logged = {name: logged.get(name, 0) + value for name, value in found.items()}
    torch.testing.assert_close(total, loss.detach(), atol=1e-12, rtol=1e-12)
    for a, b in zip((sum(x) for x in zip(*gradients)), expected):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)
    assert logged.keys() == sums.keys()
    for name, value in sums.items():
        torch.testing.assert_close(logged[name], value, atol=1e-12, rtol=1e-12, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", dpd.DPO_VARIANTS)
@pytest.mark.parametrize("chunk", [16, 70, 512])  # pairs longer than a chunk, one a chunk, all in one
def test_at_step_0_the_margin_is_exactly_0(dtype: torch.dtype, variant: str, chunk: int) -> None:
    batch = pack_pairs(random_pairs([(3, 40, 25), (5, 9, 61), (2, 0, 1)]))
    hidden, head_weight, teacher = states(batch)
    hidden, head_weight = hidden.to(dtype), head_weight.to(dtype)
    with torch.no_grad():
        batch.ref_logprobs = dpd.response_logprobs(hidden, head_weight, batch, chunk_size=chunk)
    _, sums = dpd.dpd_loss(hidden, head_weight, batch, batch.counts, teacher, variant=variant, chunk_size=chunk)
    assert sums["margin"] == sums["chosen_reward"] == sums["rejected_reward"] == sums["accuracy"] == 0


def test_the_batchs_own_cached_teacher_is_used() -> None:
    batch = pack_pairs(random_pairs())
    batch.ref_logprobs = reference(batch)
    hidden, head_weight, teacher = states(batch)
    cached = most_likely(teacher, 4)
    expected, _ = dpd.dpd_loss(hidden, head_weight, batch, batch.counts, cached)
    batch.teacher_ids, batch.teacher_logprobs = cached.ids.unsqueeze(0), cached.logprobs.unsqueeze(0)
    loss, _ = dpd.dpd_loss(hidden, head_weight, batch, batch.counts)
    whole, _ = dpd.dpd_loss(hidden, head_weight, batch, batch.counts, teacher)
    assert torch.equal(loss, expected) and loss < whole


def test_the_logged_sums_make_up_the_loss() -> None:
    batch = pack_pairs(random_pairs())
    batch.ref_logprobs = reference(batch)
    hidden, head_weight, teacher = states(batch)
    loss, sums = dpd.dpd_loss(hidden, head_weight, batch, batch.counts, teacher, beta=0.3, lambda_minus=0.5)
    rewards = 0.3 * (dpd.response_logprobs(hidden, head_weight, batch) - batch.ref_logprobs)
    margin = rewards[:, 0] - rewards[:, 1]
    pairs, chosen, rejected = map(int, batch.counts.values())
    assert (pairs, chosen, rejected) == (6, sum(c for _, c, _ in LENGTHS), sum(r for _, _, r in LENGTHS))
    assert sums["chosen_reward"] == pytest.approx(rewards[:, 0].sum().item())
    assert sums["rejected_reward"] == pytest.approx(rewards[:, 1].sum().item())
    assert sums["margin"] == pytest.approx(margin.sum().item())
    assert sums["accuracy"] == (margin > 0).sum()
    value = sums["dpo"] / pairs + sums["chosen_divergence"] / chosen + 0.5 * sums["rejected_divergence"] / rejected
    assert loss.item() == pytest.approx(value.item())
    assert 0 < sums["chosen_entropy"] < chosen * math.log(V)
    assert sums.keys() == dpd.DPD_PER.keys() and set(dpd.DPD_PER.values()) == batch.counts.keys()
    assert not any(value.requires_grad for value in sums.values())
    with torch.no_grad():
        without, _ = dpd.dpd_loss(hidden, head_weight, batch, batch.counts, teacher, beta=0.3, lambda_minus=0.5)
    assert without.item() == pytest.approx(loss.item(), rel=1e-12) and not without.requires_grad


def test_nothing_but_empty_responses_is_no_nan() -> None:
    batch = pack_pairs(random_pairs([(1, 0, 0), (3, 0, 0)]), ref_logprobs=torch.zeros(2, 2))
    hidden, head_weight, teacher = states(batch)
    for variant in dpd.DPO_VARIANTS:
        loss, sums = dpd.dpd_loss(hidden, head_weight, batch, batch.counts, teacher, variant=variant)
        assert loss.isfinite() and all(value.isfinite() for value in sums.values())
        assert all((x == 0).all() for x in torch.autograd.grad(loss, (hidden, head_weight)))


@pytest.mark.parametrize("chunk, products", [(64, 4), (9, 5)])
def test_short_pairs_take_four_products_and_long_ones_five(chunk: int, products: int) -> None:
    """Logits, the teacher's, two gradients; and, where a pair of 10 tokens is longer than a chunk, logits once more."""
    batch = pack_pairs(random_pairs([(3, 5, 5), (3, 4, 6)]), ref_logprobs=torch.zeros(2, 2))
    hidden, head_weight, teacher = states(batch)
    teacher = TeacherOutputs(teacher.hidden[:, :D], teacher.head_weight[:, :D])  # of the same width, to count alike
    with HeadProducts(V) as counted:
        loss, _ = dpd.dpd_loss(hidden, head_weight, batch, batch.counts, teacher, chunk_size=chunk)
        loss.backward()
    assert counted.multiplications == products * 20 * V * D  # 20 tokens are trained; the prompts' are not projected


def test_each_dpo_variant_equals_numbers_by_hand() -> None:
    ratios = torch.tensor([[1.0, -1.0], [-2.0, 0.5]])
    sigmoid = dpd.dpo_loss(ratios, 0.5)
    assert sigmoid.tolist() == pytest.approx([math.log(1 + math.exp(-1)), math.log(1 + math.exp(1.25))])
    assert dpd.dpo_loss(ratios, 0.5, "hinge").tolist() == pytest.approx([0.0, 2.25])
    assert dpd.dpo_loss(ratios, 0.5, "ipo").tolist() == pytest.approx([1.0, 12.25])
    assert dpd.dpo_loss(torch.tensor([[1e5, -1e5], [-1e5, 1e5]]), 1.0).isfinite().all()
