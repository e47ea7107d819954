"""Exchange of Python objects between the ranks of a run. Without torch.distributed there is one rank, 0."""

from __future__ import annotations

from typing import TypeVar

from torch import distributed

T = TypeVar("T")


def rank_and_world_size() -> tuple[int, int]:
    """Return this process' rank and the number of ranks."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def gather_shares(share: list[T]) -> list[list[T]]:
    """Return the shares of all ranks, by rank. Every rank must call this."""
    _, world_size = rank_and_world_size()
    if world_size == 1:
        return [share]
    shares: list[list[T]] = [[] for _ in range(world_size)]
    distributed.all_gather_object(shares, share)
    return shares
