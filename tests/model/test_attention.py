"""Every backend against a dense float64 mask, nothing leaking between documents, and clear refusals."""

from __future__ import annotations

import random
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nb_lightning.model.attention import BACKENDS, AttentionMask, resolve_backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

# Document lengths over B = 2 rows of T = 12: some of one token, some a whole row.
PACKINGS = [[12, 12], [5, 7, 12], [1, 1, 10, 3, 9], [1] * 24, [4, 8, 11, 1]]
B, T, E = 2, 12, 16


def qkv(H: int, K: int, dtype: torch.dtype, seed: int = 0, device: torch.device = CPU) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, T, heads, E) for heads in (H, K, K)]
    return [torch.randn(s, dtype=torch.float64, generator=generator).to(device, dtype) for s in shapes]


def cu_seqlens(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def dense(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """Softmax attention in float64 under a mask written token by token over the flattened rows."""
    n, H, K = B * T, q.shape[2], k.shape[2]
    document = [d for d, length in enumerate(lengths) for _ in range(length)]
    allowed = torch.tensor([[document[i] == document[j] and j <= i for j in range(n)] for i in range(n)])
    q, k, v = (x.reshape(n, -1, E).double() for x in (q, k, v))
    heads = []
    for h in range(H):
        group = h // (H // K)
        scores = q[:, h] @ k[:, group].T / E**0.5
        heads.append(scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v[:, group])
    return torch.stack(heads, dim=1).view(B, T, H, E)


def attend(backend: str, q: Tensor, k: Tensor, v: Tensor, lengths: list[int] | None) -> Tensor:
    mask = AttentionMask(backend, None if lengths is None else cu_seqlens(lengths).to(q.device))
    return mask.attend(q, k, v, mask)


# Against the dense mask ---------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("backend", ["sdpa", "flex"])
@pytest.mark.parametrize("lengths", [None, *PACKINGS])
@pytest.mark.parametrize("H, K", [(4, 4), (4, 2), (3, 1)])
def test_values_equal_the_dense_mask(backend: str, lengths: list[int] | None, H: int, K: int) -> None:
    q, k, v = qkv(H, K, torch.float32)
    out = attend(backend, q, k, v, lengths)
    assert out.shape == (B, T, H, E) and out.dtype == torch.float32
    torch.testing.assert_close(out.double(), dense(q, k, v, lengths or [T] * B), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("lengths", [None, *PACKINGS])
@pytest.mark.parametrize("H, K", [(4, 2), (3, 1)])
def test_sdpa_gradients_equal_the_dense_mask(lengths: list[int] | None, H: int, K: int) -> None:
    inputs = [x.requires_grad_() for x in qkv(H, K, torch.float64)]
    upstream = torch.randn(B, T, H, E, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad((attend("sdpa", *inputs, lengths) * upstream).sum(), inputs)
    expected = torch.autograd.grad((dense(*inputs, lengths or [T] * B) * upstream).sum(), inputs)
    for a, b in zip(ours, expected):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_reads_boundaries_that_are_not_multiples_of_its_blocks() -> None:
    """Documents over several 128-token blocks; sdpa, held to the dense mask above, is the reference."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 300, heads, E, generator=generator) for heads in (4, 2, 2))
    lengths = [1, 127, 129, 43, 300]
    torch.testing.assert_close(attend("flex", q, k, v, lengths), attend("sdpa", q, k, v, lengths), atol=2e-6, rtol=1e-5)


# Leakage ------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("backend", ["sdpa", "flex"])
@pytest.mark.parametrize("changed", [0, 4, 5, 11, 12, 23])
def test_a_token_reaches_only_its_document_and_only_forwards(backend: str, changed: int) -> None:
    lengths = [5, 7, 11, 1]
    q, k, v = qkv(4, 2, torch.float32)
    before = attend(backend, q, k, v, lengths).view(B * T, -1)
    for x in (q, k, v):
        x.view(B * T, -1)[changed] += 1000
    after = attend(backend, q, k, v, lengths).view(B * T, -1)
    ends = cu_seqlens(lengths).tolist()
    end = next(e for e in ends if e > changed)
    reached = [i for i in range(B * T) if not torch.equal(before[i], after[i])]
    assert reached == list(range(changed, end))


# Memory -------------------------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        found = [x.numel() for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, Tensor)]
        self.elements = max(self.elements, *found, 0)
        return out


def test_the_flex_mask_needs_no_square_of_the_tokens() -> None:
    n = 2048
    with LargestTensor() as largest:
        _ = AttentionMask("flex", torch.tensor([0, 700, n], dtype=torch.int32)).flex_mask
    assert largest.elements <= n * n / 128


@pytest.mark.parametrize("seed", range(20))
def test_flex_skips_hidden_blocks_and_masks_only_those_seen_in_part(seed: int) -> None:
    rng = random.Random(seed)
    n = rng.choice([1024, rng.randrange(2, 1024)])
    inside = [rng.choice([rng.randrange(0, n, 128), rng.randrange(n)]) for _ in range(rng.randint(0, 6))]
    edges = torch.tensor(sorted({0, n, *inside}), dtype=torch.int32)
    document = torch.bucketize(torch.arange(n), edges, right=True)
    allowed = (document[:, None] == document) & torch.ones(n, n, dtype=torch.bool).tril()
    missing = -n % 128  # no key is there, and no query asks for one
    seen = F.pad(allowed, (0, missing, 0, missing), value=False).unflatten(0, (-1, 128)).unflatten(2, (-1, 128))
    whole = F.pad(F.pad(allowed, (0, missing), value=False), (0, 0, 0, missing), value=True)
    seen, whole = seen.amax((1, 3)), whole.unflatten(0, (-1, 128)).unflatten(2, (-1, 128)).amin((1, 3))

    mask = AttentionMask("flex", edges).flex_mask
    assert listed(mask.full_kv_num_blocks, mask.full_kv_indices) == whole.nonzero().tolist()
    assert listed(mask.kv_num_blocks, mask.kv_indices) == (seen & ~whole).nonzero().tolist()


def listed(numbers: Tensor, indices: Tensor) -> list[list[int]]:
    """[query block, key block] of each entry."""
    rows = zip(numbers[0, 0].tolist(), indices[0, 0].tolist())
    return [[i, j] for i, (number, order) in enumerate(rows) for j in sorted(order[:number])]


# Choosing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, device, packed, backend",
    [
        ("auto", CPU, True, "sdpa"),
        ("auto", CPU, False, "sdpa"),
        ("auto", CUDA, True, "flex"),
        ("auto", CUDA, False, "sdpa"),
        ("sdpa", CPU, True, "sdpa"),
        ("sdpa", CUDA, True, "sdpa"),
        ("flex", CUDA, True, "flex"),
    ],
)
def test_auto_means_flex_for_packed_rows_on_cuda_and_sdpa_elsewhere(
    name: str, device: torch.device, packed: bool, backend: str
) -> None:
    assert resolve_backend(name, device, packed) == backend


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError) as error:
        resolve_backend("flash", CPU, True)
    assert str(error.value) == f"trainer.attention is 'flash'; allowed: {', '.join(BACKENDS)}"


@pytest.mark.parametrize("name", ["flex", "xformers"])
def test_a_cuda_backend_is_refused_on_cpu(name: str) -> None:
    with pytest.raises(ValueError) as error:
        resolve_backend(name, CPU, True)
    wanted = f"trainer.attention={name} needs a CUDA device, this run is on cpu; use auto or sdpa"
    assert str(error.value) == wanted


def test_a_missing_xformers_is_named_with_its_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    q, k, v = qkv(2, 2, torch.float32)
    with pytest.raises(ValueError, match=r"does not import .*; pip install 'nb_lightning\[xformers\]'"):
        attend("xformers", q, k, v, [12, 12])


# CUDA ---------------------------------------------------------------------------------------------------------------


def cuda_backends() -> list[object]:
    absent = pytest.mark.skipif(not _xformers_works(), reason="xformers does not work here")
    return ["sdpa", "flex", pytest.param("xformers", marks=absent)]


def _xformers_works() -> bool:
    if not torch.cuda.is_available():
        return False
    try:
        return resolve_backend("xformers", CUDA, True) == "xformers"
    except ValueError:
        return False


@needs_cuda
@pytest.mark.parametrize("backend", cuda_backends())
@pytest.mark.parametrize("lengths", [None, *PACKINGS])
@pytest.mark.parametrize("H, K", [(4, 4), (4, 2)])
def test_cuda_values_and_gradients_equal_the_dense_mask(
    backend: str, lengths: list[int] | None, H: int, K: int
) -> None:
    """bfloat16: 8 bits of mantissa, so 2 % of values of order 1."""
    inputs = [x.requires_grad_() for x in qkv(H, K, torch.bfloat16, device=CUDA)]
    wide = [x.detach().cpu().double().requires_grad_() for x in inputs]
    upstream = torch.randn(B, T, H, E, generator=torch.Generator().manual_seed(1)).bfloat16()
    out, expected = attend(backend, *inputs, lengths), dense(*wide, lengths or [T] * B)
    torch.testing.assert_close(out.detach().cpu().double(), expected.detach(), atol=0.02, rtol=0.02)
    ours = torch.autograd.grad((out * upstream.to(CUDA)).sum(), inputs)
    theirs = torch.autograd.grad((expected * upstream.double()).sum(), wide)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.cpu().double(), b, atol=0.05, rtol=0.05)
