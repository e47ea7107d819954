"""Divergences from a teacher against naive float64 ones: values, every gradient, top-k bounds, precision, memory."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from nb_lightning.batch import IGNORE
from nb_lightning.losses import head
from nb_lightning.losses.divergence import Divergence, TeacherOutputs, TopKTeacherOutputs
from tests.losses.counting_harness import Allocations
from tests.losses.head_harness import (
    CHUNKS,
    D,
    N,
    V,
    inputs,
    most_likely,
    naive_divergence,
    naive_logprobs,
    per_token_weights,
)

KINDS = [
    Divergence("forward_kl"),
    Divergence("reverse_kl"),
    Divergence("jsd"),
    Divergence("jsd", beta=0.1),
    Divergence("forward_kl", temperature=2.5),
    Divergence("reverse_kl", temperature=0.7),
    Divergence("jsd", beta=0.9, temperature=1.5),
]
WIDTH = 9  # of the teacher; the student's is 6


def teacher_of(n: int = N, v: int = V, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> TeacherOutputs:
    generator = torch.Generator().manual_seed(2)
    hidden, head_weight = (torch.randn(k, WIDTH, dtype=torch.float64, generator=generator) for k in (n, v))
    return TeacherOutputs((hidden * scale).to(dtype), head_weight.to(dtype))


def naive_buckets(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities [N, k + 1] of `ids` and of all other tokens together; with all tokens, of them alone."""
    logprobs = torch.log_softmax(logits.double(), -1)
    mask = torch.ones_like(logprobs, dtype=torch.bool).scatter(1, ids.long(), False)
    chosen = logprobs.gather(1, ids.long())
    if not mask.any():
        return chosen
    rest = torch.stack([row[keep].logsumexp(0) for row, keep in zip(logprobs, mask)])
    return torch.cat([chosen, rest.unsqueeze(1)], 1)


def naive(
    divergence: Divergence, hidden: Tensor, head_weight: Tensor, labels: Tensor, teacher: TeacherOutputs, k: int
) -> Tensor:
    """[N] float64; with k > 0 of the k + 1 buckets of the cached teacher."""
    s = hidden.double() @ head_weight.double().T / divergence.temperature
    t = teacher.hidden.double() @ teacher.head_weight.double().T / divergence.temperature
    if k:
        ids = t.topk(k).indices
        s, t = naive_buckets(s, ids), naive_buckets(t, ids)
    plain = Divergence(divergence.kind, divergence.beta)
    return naive_divergence(plain, s, t).where(labels != IGNORE, 0)


def naive_entropy(hidden: Tensor, head_weight: Tensor, labels: Tensor) -> Tensor:
    logits = hidden.double() @ head_weight.double().T
    return torch.distributions.Categorical(logits=logits).entropy().where(labels != IGNORE, 0)


# Values and gradients -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", KINDS, ids=str)
@pytest.mark.parametrize("k", [0, 1, 5, V])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_every_statistic_and_every_gradient_equal_the_naive_head(divergence: Divergence, k: int, chunk: int) -> None:
    hidden, head_weight, labels = inputs()
    teacher = teacher_of()
    given = most_likely(teacher, k, divergence.temperature) if k else teacher
    found = head.token_statistics(hidden, head_weight, labels, given, divergence, chunk)
    expected = (
        naive_logprobs(hidden, head_weight, labels),
        naive_entropy(hidden, head_weight, labels),
        naive(divergence, hidden, head_weight, labels, teacher, k),
    )
    upstream = torch.randn(3, N, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for ours, theirs, factor in zip((found.logprobs, found.entropy, found.divergence), expected, upstream):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)
        assert (ours[labels == IGNORE] == 0).all()
        for a, b in zip(
            torch.autograd.grad(ours, (hidden, head_weight), factor, retain_graph=True),
            torch.autograd.grad(theirs, (hidden, head_weight), factor, retain_graph=True),
        ):
            torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)
    ours = sum((x * w).sum() for x, w in zip((found.logprobs, found.entropy, found.divergence), upstream))
    theirs = sum((x * w).sum() for x, w in zip(expected, upstream))
    for a, b in zip(
        torch.autograd.grad(ours, (hidden, head_weight)), torch.autograd.grad(theirs, (hidden, head_weight))
    ):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("divergence", KINDS, ids=str)
@pytest.mark.parametrize("k", [0, 5])
@pytest.mark.parametrize("all_trained", [False, True])
def test_weighted_sum_equals_the_sum_of_statistics(divergence: Divergence, k: int, all_trained: bool) -> None:
    hidden, head_weight, labels = inputs()
    labels = labels.abs() % V if all_trained else labels
    teacher = teacher_of()
    given = most_likely(teacher, k, divergence.temperature) if k else teacher
    a, b = per_token_weights(), per_token_weights().flip(0)
    total, found = head.weighted_sum(hidden, head_weight, labels, a, given, divergence, b, chunk_size=7)
    logprobs, value = (
        naive_logprobs(hidden, head_weight, labels),
        naive(divergence, hidden, head_weight, labels, teacher, k),
    )
    expected = (a * logprobs + b * value).sum()
    torch.testing.assert_close(total, expected, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(found.logprobs, logprobs.detach(), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(found.divergence, value.detach(), atol=1e-9, rtol=1e-9)
    assert not (found.logprobs.requires_grad or found.entropy.requires_grad or found.divergence.requires_grad)
    ours = torch.autograd.grad(-3 * total, (hidden, head_weight))
    for x, y in zip(ours, torch.autograd.grad(-3 * expected, (hidden, head_weight))):
        torch.testing.assert_close(x, y, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("divergence", KINDS, ids=str)
@pytest.mark.parametrize("k", [0, 3, 9])
def test_all_statistics_pass_gradcheck(divergence: Divergence, k: int) -> None:
    hidden, head_weight, labels = inputs(n=8, d=4, v=9)
    teacher = teacher_of(8, 9)
    given = most_likely(teacher, k, divergence.temperature) if k else teacher

    def statistics(h: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return tuple(head.token_statistics(h, w, labels, given, divergence, 3))

    assert torch.autograd.gradcheck(statistics, (hidden, head_weight))


def test_a_student_that_is_the_teacher_has_no_divergence_and_no_gradient() -> None:
    hidden, head_weight, labels = inputs()
    for divergence in KINDS:
        found = head.token_statistics(hidden, head_weight, labels, TeacherOutputs(hidden, head_weight), divergence)
        assert found.divergence.abs().max() < 1e-14
        for gradient in torch.autograd.grad(found.divergence.sum(), (hidden, head_weight)):
            assert gradient.abs().max() < 1e-14


def test_the_teacher_gets_no_gradient() -> None:
    hidden, head_weight, labels = inputs()
    teacher = TeacherOutputs(*(x.requires_grad_() for x in vars(teacher_of()).values()))
    head.token_statistics(hidden, head_weight, labels, teacher).divergence.sum().backward()
    assert teacher.hidden.grad is None and teacher.head_weight.grad is None and head_weight.grad.abs().max() > 0


@pytest.mark.parametrize("divergence", KINDS[:3], ids=str)
@pytest.mark.parametrize("n", [N, 0])
def test_nothing_trained_gives_exactly_zero(divergence: Divergence, n: int) -> None:
    hidden, head_weight, _ = inputs(torch.float32)
    hidden, labels = hidden[:n].detach().requires_grad_(), torch.full((n,), IGNORE)
    teacher, ones = teacher_of(n, dtype=torch.float32), torch.ones(n)
    total, _ = head.weighted_sum(hidden, head_weight, labels, ones, teacher, divergence, ones)
    found = head.token_statistics(hidden, head_weight, labels, teacher, divergence)
    (total + found.divergence.sum() + found.entropy.sum()).backward()
    for value in (total, found.divergence, found.entropy, hidden.grad, head_weight.grad):
        assert (value == 0).all()


# The cached teacher's bound -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", KINDS[:4], ids=str)
def test_merging_tokens_only_lowers_a_divergence_and_all_tokens_give_it_whole(divergence: Divergence) -> None:
    hidden, head_weight, labels = inputs()
    teacher = teacher_of()

    def value(given: TeacherOutputs | TopKTeacherOutputs) -> Tensor:
        return head.token_statistics(hidden, head_weight, labels, given, divergence).divergence.detach()

    values = torch.stack([value(most_likely(teacher, k)) for k in range(1, V + 1)])
    trained = labels != IGNORE
    assert (values.diff(dim=0)[:, trained] > -1e-12).all(), "a finer partition lowered it"
    assert (values[:-2, trained] < value(teacher)[trained]).all()
    torch.testing.assert_close(values[-1], value(teacher), atol=1e-12, rtol=1e-12)


def test_the_bound_is_tight_where_the_student_spreads_the_rest_as_the_teacher_does() -> None:
    k, logits = 4, torch.randn(6, V, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    top = logits.topk(k).indices
    student = logits.scatter_add(1, top, torch.randn(6, k, dtype=torch.float64))  # the rest keeps its proportions
    eye, labels = torch.eye(V, dtype=torch.float64), torch.zeros(6, dtype=torch.int64)
    for divergence in KINDS[:4]:
        found = head.token_statistics(student, eye, labels, most_likely(TeacherOutputs(logits, eye), k), divergence)
        whole = head.token_statistics(student, eye, labels, TeacherOutputs(logits, eye), divergence)
        torch.testing.assert_close(found.divergence, whole.divergence, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 1e-2)])
@pytest.mark.parametrize("k", [3, V])
def test_a_rounded_cache_is_off_by_its_rounding(dtype: torch.dtype, tolerance: float, k: int) -> None:
    """Rounded probabilities can sum to more than 1; the rest must not become negative, nor NaN.

    The reverse KL of a tiny rest is the logarithm of what the rounding hides: only its sign is known.
    """
    hidden, head_weight, labels = inputs(torch.float32)
    teacher = teacher_of(scale=4)
    exact = most_likely(teacher, k)
    rounded = TopKTeacherOutputs(exact.ids, exact.logprobs.to(dtype))
    assert (rounded.logprobs.double().exp().sum(1) > 1).any() or k < V
    for divergence in KINDS[:3]:
        expected = naive(divergence, hidden, head_weight, labels, teacher, k)
        found = head.token_statistics(hidden, head_weight, labels, rounded, divergence).divergence
        if divergence.kind == "reverse_kl" and k < V:
            assert found.isfinite().all() and (found >= -tolerance).all()
        else:
            torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)


# Extremes and precision ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", KINDS, ids=str)
@pytest.mark.parametrize("cached", [None, "top 2", "missing"])
def test_certain_and_opposite_models_give_no_nan(divergence: Divergence, cached: str | None) -> None:
    hidden = torch.tensor([[1e4, 0.0], [0.0, -1e4], [60.0, 0.0]], requires_grad=True)
    head_weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.5, 0.5]], requires_grad=True)
    teacher: TeacherOutputs | TopKTeacherOutputs = TeacherOutputs(-hidden.detach(), head_weight.detach())
    if cached:
        teacher = most_likely(teacher, 2, divergence.temperature)
    if cached == "missing":  # fewer than k candidates: the others have no probability at all
        teacher = TopKTeacherOutputs(teacher.ids, torch.tensor([0.0, -math.inf]).expand(3, 2))
    found = head.token_statistics(hidden, head_weight, torch.tensor([2, 0, 1]), teacher, divergence)
    (found.logprobs + found.entropy + found.divergence).sum().backward()
    for value in (found.logprobs, found.entropy, found.divergence, hidden.grad, head_weight.grad):
        assert value.isfinite().all()
    assert (found.divergence > -1e-6).all() and found.divergence.max() > 0.1


@pytest.mark.parametrize("divergence", KINDS, ids=str)
@pytest.mark.parametrize("k", [0, 8])
def test_float32_divergences_are_accurate_to_six_digits(divergence: Divergence, k: int) -> None:
    hidden, head_weight, labels = inputs(torch.float32, n=300, v=500)
    teacher = teacher_of(300, 500, torch.float32)
    given = teacher if k == 0 else most_likely(teacher, k, divergence.temperature)
    found = head.token_statistics(hidden, head_weight, labels, given, divergence, chunk_size=64).divergence
    expected = naive(divergence, hidden, head_weight, labels, teacher, k)
    torch.testing.assert_close(found.double(), expected, atol=2e-6, rtol=2e-6)
    # A reverse KL's gradient p (log p/q - KL) cancels where the student is nearly sure of a token.
    tolerance = 2e-5 if k and divergence.kind != "forward_kl" else 2e-6
    ours = torch.autograd.grad(found.sum(), (hidden, head_weight))
    for a, b in zip(ours, torch.autograd.grad(expected.sum(), (hidden, head_weight))):
        assert (a.double() - b).norm() / b.norm() < tolerance


@pytest.mark.parametrize("divergence", KINDS[:3], ids=str)
def test_autocast_computes_as_bfloat16_inputs_do(divergence: Divergence) -> None:
    hidden, head_weight, labels = inputs(torch.float32)
    teacher, ones = teacher_of(dtype=torch.float32), torch.ones(N)
    low = [x.detach().bfloat16().requires_grad_() for x in (hidden, head_weight)]
    low_teacher = TeacherOutputs(teacher.hidden.bfloat16(), teacher.head_weight.bfloat16())
    expected, _ = head.weighted_sum(*low, labels, ones, low_teacher, divergence, ones)
    expected_gradients = torch.autograd.grad(expected, low)
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = head.weighted_sum(hidden, head_weight, labels, ones, teacher, divergence, ones)
        gradients = torch.autograd.grad(total, (hidden, head_weight))
    assert total.dtype == torch.float32 and torch.equal(total, expected)
    for ours, theirs in zip(gradients, expected_gradients):
        assert ours.dtype == torch.float32 and torch.equal(ours, theirs.float())


def test_bfloat16_gradients_are_off_by_one_rounding() -> None:
    hidden, head_weight, labels = inputs(torch.bfloat16, n=512)
    teacher = teacher_of(512, dtype=torch.bfloat16)
    for divergence in KINDS[:3]:
        found = head.token_statistics(hidden, head_weight, labels, teacher, divergence, chunk_size=16).divergence
        expected = naive(divergence, hidden, head_weight, labels, teacher, 0)
        assert found.dtype == torch.float32
        ours = torch.autograd.grad(found.sum(), (hidden, head_weight))
        theirs = torch.autograd.grad(expected.sum(), (hidden, head_weight))
        assert [x.dtype for x in ours] == [torch.bfloat16] * 2
        for a, b in zip(ours, theirs):
            assert (a.double() - b.double()).norm() / b.double().norm() < 2**-6  # two rounded logits and one result


# Memory -------------------------------------------------------------------------------------------------------------


@pytest.mark.runs
@pytest.mark.parametrize("divergence", KINDS, ids=str)
@pytest.mark.parametrize("k", [0, 4])
def test_no_tensor_is_as_large_as_tokens_times_vocabulary(divergence: Divergence, k: int) -> None:
    d, v, chunk = 8, 500, 16

    def peak(n: int) -> Allocations:
        hidden, head_weight, labels = inputs(torch.float32, n, d, v)
        teacher, ones = teacher_of(n, v, torch.float32), torch.ones(n)
        given = most_likely(teacher, k, divergence.temperature) if k else teacher
        statistics = partial(head.token_statistics, hidden, head_weight, labels, given, divergence, chunk)
        with Allocations() as made:
            total, _ = head.weighted_sum(hidden, head_weight, labels, ones, given, divergence, ones, chunk)
            total.backward()
            del total
            statistics().divergence.sum().backward()
        return made

    few, many = peak(64), peak(640)
    assert many.largest <= max(chunk * v, v * d, 640 * WIDTH)
    assert (many.peak - few.peak) / (640 - 64) <= 6 * d  # of v = 500 logits: none
    assert few.peak <= 10 * chunk * v + 4 * v * d + 5 * 64 * d  # a tile is the whole chunk here


# Mistakes -----------------------------------------------------------------------------------------------------------


def test_a_teacher_with_another_vocabulary_is_refused_by_name() -> None:
    hidden, head_weight, labels = inputs()
    with pytest.raises(ValueError, match="teacher's vocabulary has 38 tokens and the student's 37"):
        head.token_statistics(hidden, head_weight, labels, teacher_of(v=V + 1))


@pytest.mark.parametrize(
    "values, message",
    [
        ({"kind": "kl"}, "divergence is 'kl'; it must be one of forward_kl, reverse_kl, jsd"),
        ({"kind": "jsd", "beta": 0.0}, "divergence beta is 0.0; jsd takes 0 < beta < 1"),
        ({"kind": "jsd", "beta": 1.0}, "divergence beta is 1.0"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be a positive number"),
        ({"temperature": math.nan}, "temperature is nan"),
    ],
)
def test_bad_divergences_are_refused_by_name(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Divergence(**values)


def test_teacher_and_student_differ_in_width_here() -> None:
    assert WIDTH != D
