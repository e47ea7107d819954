"""Log-probabilities of the frozen reference, computed once and kept in a file that knows what they belong to.

The reference of DPD is the policy as it was before the first step, so its log-probabilities depend on the pairs, the
weights and how text became tokens, and on nothing that training changes. The file (safetensors) carries a digest of
each, and of its own numbers; anything that does not fit is refused, never used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from nb_lightning.files import atomic_write

NAME = "ref_logprobs"


class StaleCache(ValueError):
    """A cache of something else than what it is asked for."""


@dataclass(frozen=True)
class ReferenceKey:
    """Digests of all that the numbers depend on.

    Attributes:
        data: of the pairs, in order.
        model: of the reference's weights, see `weights_digest`.
        template: of tokenizer and chat template together.
    """

    data: str
    model: str
    template: str


def weights_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, shapes, types and bytes of e.g. `model.named_parameters()`, in any order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def write_reference(path: Path, logprobs: Tensor, key: ReferenceKey) -> None:
    """Keep `logprobs` [P, 2] float32, chosen and rejected of each pair in the order of the data.

    The file appears whole or not at all.
    """
    logprobs = logprobs.detach().float().cpu().contiguous()
    metadata = {**asdict(key), "sha256": hashlib.sha256(_bytes(logprobs)).hexdigest()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(save({NAME: logprobs}, metadata))


def read_reference(path: Path, key: ReferenceKey, pairs: int) -> Tensor:
    """The [P, 2] float32 nats of a cache written for `key`.

    Raises:
        FileNotFoundError: there is none.
        StaleCache: it is damaged, or was written for other data, weights or templates; says which.
    """
    if not path.exists():
        raise FileNotFoundError(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata, logprobs = file.metadata() or {}, file.get_tensor(NAME)
    except (SafetensorError, OSError) as error:
        raise StaleCache(f"{path} is not a reference cache or is damaged ({error}); delete it") from error
    changed = [f.name for f in fields(key) if metadata.get(f.name) != getattr(key, f.name)]
    if changed:
        raise StaleCache(
            f"the reference log-probabilities in {path} were computed with another {' and another '.join(changed)} "
            "than this run has; delete the file to compute them anew"
        )
    if hashlib.sha256(_bytes(logprobs)).hexdigest() != metadata.get("sha256"):
        raise StaleCache(f"{path} is damaged: its numbers are not those that were written; delete it")
    if logprobs.shape != (pairs, 2):
        raise StaleCache(f"{path} holds {logprobs.shape[0]:,} pairs, the data {pairs:,}; delete it")
    return logprobs


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
