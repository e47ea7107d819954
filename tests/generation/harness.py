"""Ragged prompts and models to decode with; statistics of samples."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace

import numpy as np
import torch

from nb_lightning.generation.decoder import Completion, Decoder
from nb_lightning.generation.sampling import Sampling
from nb_lightning.model.transformer import Transformer
from tests.model.harness import TINY, random_model

PROMPT_LENGTHS = (3, 11, 1, 7, 30, 2, 5, 19)
SAMPLED = Sampling(40, temperature=0.9, top_p=0.95, stop_ids=(5, 6))


def prompts(lengths: tuple[int, ...] = PROMPT_LENGTHS, seed: int = 0) -> list[list[int]]:
    rng = np.random.RandomState(seed)
    return [rng.randint(1, TINY.vocab_size, size=n).tolist() for n in lengths]


def model_of(**changes: object) -> Transformer:
    return random_model(replace(TINY, **changes)).eval()


def run_all(decoder: Decoder) -> dict[Hashable, Completion]:
    completions: dict[Hashable, Completion] = {}
    while decoder.busy:
        collect(decoder, completions)
    return completions


def collect(decoder: Decoder, completions: dict[Hashable, Completion]) -> None:
    for token in decoder.step():
        completion = completions.setdefault(token.key, Completion())
        assert completion.finish_reason == ""  # nothing comes after the end
        completion.ids.append(token.id)
        completion.logprobs.append(token.logprob)
        completion.finish_reason = token.finish_reason


def expected(logits: np.ndarray, how: Sampling) -> np.ndarray:
    """The distribution by the book, in float64: temperature, top-k, top-p, each renormalised."""
    p = np.exp((logits - logits.max()) / how.temperature)
    order = np.argsort(-logits, kind="stable")
    if how.top_k:
        p[order[how.top_k :]] = 0
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= how.top_p]] = 0
    return p / p.sum()


def p_value(counts: np.ndarray, p: np.ndarray) -> float:
    """Chi-square of counts against probabilities; cells that expect fewer than 5 are taken together."""
    assert counts[p == 0].sum() == 0  # what is cut off never comes
    wanted = p * counts.sum()
    small = wanted < 5
    observed, wanted = np.append(counts[~small], counts[small].sum()), np.append(wanted[~small], wanted[small].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    if len(wanted) == 1:
        return 1.0
    freedom = torch.tensor((len(wanted) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.float64)))
