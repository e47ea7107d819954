"""The chunked head against a naive float64 head: values, every gradient, edge cases, and memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nb_lightning.batch import IGNORE
from nb_lightning.losses import chunks, head
from nb_lightning.losses.divergence import Chunk
from tests.losses.counting_harness import Allocations
from tests.losses.head_harness import CHUNKS, D, N, V, inputs, naive_logprobs, per_token_weights


def naive_cross_entropy(hidden: Tensor, head_weight: Tensor, labels: Tensor) -> Tensor:
    return -naive_logprobs(hidden, head_weight, labels).sum()


# Values and gradients -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("scale", [1.0, -2.5])
def test_cross_entropy_equals_the_naive_head(chunk: int, scale: float) -> None:
    hidden, head_weight, labels = inputs()
    loss = head.cross_entropy(hidden, head_weight, labels, chunk)
    expected = naive_cross_entropy(hidden, head_weight, labels)
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=1e-12)
    ours = torch.autograd.grad(loss * scale, (hidden, head_weight))
    theirs = torch.autograd.grad(expected * scale, (hidden, head_weight))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_token_logprobs_equal_the_naive_head(chunk: int) -> None:
    hidden, head_weight, labels = inputs()
    logprobs = head.token_logprobs(hidden, head_weight, labels, chunk)
    expected = naive_logprobs(hidden, head_weight, labels)
    torch.testing.assert_close(logprobs, expected, atol=1e-12, rtol=1e-12)
    assert (logprobs[labels == IGNORE] == 0).all()
    upstream = per_token_weights()
    ours = torch.autograd.grad(logprobs, (hidden, head_weight), upstream)
    theirs = torch.autograd.grad(expected, (hidden, head_weight), upstream)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_token_logprobs_pass_gradcheck() -> None:
    hidden, head_weight, labels = inputs(n=8, d=4, v=9)
    assert torch.autograd.gradcheck(lambda h, w: head.token_logprobs(h, w, labels, 3), (hidden, head_weight))


def test_a_second_backward_of_scaled_gradients_is_refused_and_not_wrong() -> None:
    loss = head.cross_entropy(*inputs())
    (2 * loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="runs only once"):
        loss.backward()


@pytest.mark.parametrize("function", [head.cross_entropy, head.token_logprobs])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_tiles_of_any_height_give_the_same(
    function: Callable[..., Tensor], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, head_weight, labels = inputs()
    expected = function(hidden, head_weight, labels)
    gradients = torch.autograd.grad(expected.sum(), (hidden, head_weight))
    monkeypatch.setattr(chunks, "CPU_TILE", rows * V // torch.get_num_threads())
    out = function(hidden, head_weight, labels, chunk_size=6)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)
    for a, b in zip(torch.autograd.grad(out.sum(), (hidden, head_weight)), gradients):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("function", [head.cross_entropy, head.token_logprobs])
def test_a_gradient_of_the_gradient_is_refused_and_not_wrong(function: Callable[..., Tensor]) -> None:
    hidden, head_weight, labels = inputs()
    loss = function(hidden, head_weight, labels).square().sum()
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_extreme_logits_stay_finite() -> None:
    hidden = torch.tensor([[1e4, 0.0], [0.0, -1e4]], requires_grad=True)
    head_weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], requires_grad=True)
    loss = head.cross_entropy(hidden, head_weight, torch.tensor([2, 0]))
    loss.backward()
    assert loss.item() == pytest.approx(2e4 + 0.6931472)  # log 2: the second row's other two logits tie
    assert hidden.grad.isfinite().all() and head_weight.grad.isfinite().all()


def test_cross_entropy_flattens_rows() -> None:
    hidden, head_weight, labels = inputs(n=24)
    loss = head.cross_entropy(hidden.view(4, 6, D), head_weight, labels.view(4, 6), chunk_size=5)
    torch.testing.assert_close(loss, naive_cross_entropy(hidden, head_weight, labels), atol=1e-12, rtol=1e-12)


# Chunks -------------------------------------------------------------------------------------------------------------


def positions(chunks: list[Chunk], n: int) -> list[list[int]]:
    return [torch.arange(n)[chunk].tolist() for chunk in chunks]


def test_chunks_are_of_nearly_equal_size_and_leave_out_what_is_ignored() -> None:
    assert chunks.split_tokens(torch.arange(10), 4) == [slice(0, 3), slice(3, 6), slice(6, 10)]
    labels = torch.arange(10).masked_fill(torch.arange(10) % 2 == 0, IGNORE)
    assert positions(chunks.split_tokens(labels, 4), 10) == [[1, 3], [5, 7, 9]]
    assert chunks.split_tokens(torch.full((3,), IGNORE), 4) == chunks.split_tokens(torch.arange(0), 4) == []


def test_no_chunk_ends_inside_a_group() -> None:
    groups = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 4])
    labels = torch.zeros(9, dtype=torch.int64)
    assert chunks.split_between_groups(labels, groups, 5) == [slice(0, 5), slice(5, 9)]
    assert chunks.split_between_groups(labels, groups, 3) == [slice(0, 3), slice(3, 5), slice(5, 8), slice(8, 9)]
    assert chunks.split_between_groups(labels, groups, 100) == [slice(0, 9)]
    assert chunks.split_between_groups(labels, groups, 2) is None, "a group of 3"
    assert chunks.split_between_groups(labels, torch.tensor([0, 0, 1, 1, 0, 2, 2, 2, 2]), 5) is None, (
        "0 is in two places"
    )
    labels[[0, 4, 8]] = IGNORE
    assert positions(chunks.split_between_groups(labels, groups, 3), 9) == [[1, 2, 3], [5, 6, 7]]
    assert chunks.split_between_groups(torch.full((9,), IGNORE), groups, 3) == []


def test_weights_may_depend_on_the_log_probabilities_of_their_chunk() -> None:
    hidden, head_weight, labels = inputs()
    factors = per_token_weights()

    def weigh_tokens(logprobs: Tensor, chunk: Chunk) -> Tensor:
        return factors[chunk] * logprobs

    total, statistics = head.weighted_sum(hidden, head_weight, labels, weigh_tokens, chunk_size=5)
    logprobs = naive_logprobs(hidden, head_weight, labels)
    expected = (factors * logprobs.detach() * logprobs).sum()
    torch.testing.assert_close(total, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(statistics.logprobs, logprobs.detach(), atol=1e-12, rtol=1e-12)
    ours = torch.autograd.grad(total, (hidden, head_weight))
    for a, b in zip(ours, torch.autograd.grad(expected, (hidden, head_weight))):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


# Ignored labels and missing gradients -------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [head.cross_entropy, head.token_logprobs])
@pytest.mark.parametrize("n", [N, 0])
def test_nothing_trained_gives_exactly_zero(function: Callable[..., Tensor], n: int) -> None:
    hidden, head_weight, _ = inputs(torch.float32, n=N)
    hidden = hidden[:n].detach().requires_grad_()
    out = function(hidden, head_weight, torch.full((n,), IGNORE), 7)
    out.sum().backward()
    for value in (out, hidden.grad, head_weight.grad):
        assert (value == 0).all()
    assert head_weight.grad.shape == head_weight.shape and hidden.grad.shape == hidden.shape


@pytest.mark.parametrize("function", [head.cross_entropy, head.token_logprobs])
@pytest.mark.parametrize("frozen", ["hidden", "head_weight"])
def test_a_frozen_input_gets_no_gradient_and_leaves_the_others_right(
    function: Callable[..., Tensor], frozen: str
) -> None:
    values = dict(zip(("hidden", "head_weight", "labels"), inputs()))
    values[frozen] = values[frozen].detach()
    trained = values["head_weight" if frozen == "hidden" else "hidden"]
    (ours,) = torch.autograd.grad(function(**values).sum(), trained)
    sign = -1 if function is head.cross_entropy else 1
    (expected,) = torch.autograd.grad(sign * naive_logprobs(**values).sum(), trained)
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("function", [head.cross_entropy, head.token_logprobs])
def test_without_gradients_no_gradient_work_is_done(
    function: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation runs under `no_grad` over a weight that requires one."""
    hidden, head_weight, labels = inputs()
    expected = function(hidden, head_weight, labels)
    monkeypatch.setattr(Tensor, "scatter_add_", lambda *_: pytest.fail("a gradient was formed"))
    with torch.no_grad():
        out = function(hidden, head_weight, labels)
    assert torch.equal(out, expected) and not out.requires_grad


# Precision ----------------------------------------------------------------------------------------------------------


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b).norm() / b.norm()).item()


def test_float32_is_accurate_over_many_tokens() -> None:
    hidden, head_weight, labels = inputs(torch.float32, n=2000)
    loss, expected = head.cross_entropy(hidden, head_weight, labels), naive_cross_entropy(hidden, head_weight, labels)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    ours = torch.autograd.grad(loss, (hidden, head_weight))
    theirs = torch.autograd.grad(expected, (hidden, head_weight))
    assert max(relative(a, b) for a, b in zip(ours, theirs)) < 1e-6


def test_bfloat16_logprobs_are_off_by_the_rounding_of_two_logits_and_no_more() -> None:
    """The matrix product rounds each logit to 8 bits, 2**-9 of it at worst; the softmax adds nothing.

    A softmax in bfloat16 would round -log p itself, here about 7, and miss the bound by far.
    """
    hidden, head_weight, labels = inputs(torch.bfloat16, n=200, d=16, v=1000)
    hidden, head_weight = (hidden.detach() / 4).requires_grad_(), head_weight.detach().requires_grad_()
    bound = 2 * 2**-9 * (hidden.double() @ head_weight.double().T).abs().max().item()
    logprobs, expected = (
        head.token_logprobs(hidden, head_weight, labels, 64),
        naive_logprobs(hidden, head_weight, labels),
    )
    assert logprobs.dtype == torch.float32
    assert (logprobs - expected).abs().max().item() < bound + 1e-5
    loss = head.cross_entropy(hidden, head_weight, labels, 64)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(-logprobs.double().sum().item(), rel=1e-6)


@pytest.mark.parametrize("function, sign", [(head.cross_entropy, -1), (head.token_logprobs, 1)])
def test_bfloat16_gradients_are_off_by_one_rounding(function: Callable[..., Tensor], sign: int) -> None:
    """Weight gradients add up over 32 chunks in float32: in bfloat16 they would drift by several roundings."""
    hidden, head_weight, labels = inputs(torch.bfloat16, n=512)
    ours = torch.autograd.grad(function(hidden, head_weight, labels, 16).sum(), (hidden, head_weight))
    theirs = torch.autograd.grad(sign * naive_logprobs(hidden, head_weight, labels).sum(), (hidden, head_weight))
    assert [x.dtype for x in ours] == [torch.bfloat16] * 2
    assert relative(ours[0], theirs[0].double()) < 2**-7
    assert relative(ours[1], theirs[1].double()) < 2**-8


@pytest.mark.parametrize("function", [head.cross_entropy, head.token_logprobs])
def test_autocast_computes_as_bfloat16_inputs_do_and_returns_float32_gradients(
    function: Callable[..., Tensor],
) -> None:
    hidden, head_weight, labels = inputs(torch.float32)
    low = [x.detach().bfloat16().requires_grad_() for x in (hidden, head_weight)]
    expected = function(*low, labels, 7)
    expected_gradients = torch.autograd.grad(expected.sum(), low)
    with torch.autocast("cpu", torch.bfloat16):
        out = function(hidden, head_weight, labels, 7)
        gradients = torch.autograd.grad(out.sum(), (hidden, head_weight))
    assert out.dtype == torch.float32 and torch.equal(out, expected)
    for ours, theirs in zip(gradients, expected_gradients):
        assert ours.dtype == torch.float32 and torch.equal(ours, theirs.float())


def test_a_backward_under_autocast_uses_the_precision_of_its_forward() -> None:
    hidden, head_weight, labels = inputs(torch.float32)
    expected = torch.autograd.grad(head.token_logprobs(hidden, head_weight, labels).sum(), (hidden, head_weight))
    logprobs = head.token_logprobs(hidden, head_weight, labels)
    with torch.autocast("cpu", torch.bfloat16):
        ours = torch.autograd.grad(logprobs.sum(), (hidden, head_weight))
    assert all(torch.equal(a, b) for a, b in zip(ours, expected))


def allocations(function: Callable[..., Tensor], n: int, d: int, v: int) -> Allocations:
    """Of forward and backward."""
    hidden, head_weight, labels = inputs(torch.float32, n, d, v)
    with Allocations() as made:
        function(hidden, head_weight, labels).sum().backward()
    return made


@pytest.mark.parametrize("function", [head.cross_entropy, head.token_logprobs])
def test_no_tensor_is_as_large_as_tokens_times_vocabulary(function: Callable[..., Tensor]) -> None:
    n, d, v, chunk = 600, 8, 500, 16
    allowed = max(chunk * v, v * d, n * d)
    assert allocations(partial(function, chunk_size=chunk), n, d, v).largest <= allowed
    naive = allocations(lambda h, w, y: F.cross_entropy(h @ w.T, y, reduction="sum"), n, d, v)
    assert naive.largest == n * v  # what is measured is really seen


@pytest.mark.parametrize("function", [head.cross_entropy, head.token_logprobs])
def test_peak_memory_grows_with_the_hidden_states_only(function: Callable[..., Tensor]) -> None:
    d, v, chunk = 8, 500, 16
    few, many = (allocations(partial(function, chunk_size=chunk), n, d, v).peak for n in (64, 640))
    per_token = (many - few) / (640 - 64)
    assert per_token <= 3 * d  # of v = 500 logits: none
    assert few <= 5 * chunk * v + 4 * v * d + 3 * 64 * d
