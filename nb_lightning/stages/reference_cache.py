"""The cache of the reference's log-probabilities in DPD: computed once, and refused where it does not fit.

The reference is the policy before the first step. Its log-probabilities depend on the pairs, the weights and how text
became tokens, and on nothing that training changes. The file (safetensors) holds a digest of each, and of the
log-probabilities.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from nb_lightning.files import atomic_write

NAME = "ref_logprobs"


class StaleCache(ValueError):
    """A cache that is damaged, or that was written for another run."""


@dataclass(frozen=True)
class ReferenceKey:
    """Digests of everything that the numbers depend on.

    Attributes:
        data: digest of the pairs, in order.
        model: digest of the reference's weights and of how they compute (`DPDStage`).
        template: digest of tokenizer and chat template together.
    """

    data: str
    model: str
    template: str


def write_reference(path: Path, logprobs: Tensor, key: ReferenceKey) -> None:
    """Write `logprobs` [P, 2] float32 nats: chosen and rejected of each pair, in the order of the data.

    The write is atomic.
    """
    logprobs = logprobs.detach().float().cpu().contiguous()
    metadata = {**asdict(key), "sha256": hashlib.sha256(_bytes(logprobs)).hexdigest()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(save({NAME: logprobs}, metadata))


def read_reference(path: Path, key: ReferenceKey, pairs: int) -> Tensor:
    """Read the cache written for `key`: [P, 2] float32 nats.

    Raises:
        FileNotFoundError: there is no cache.
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
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
