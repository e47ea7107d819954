"""Phases: the one object every stage is a plan of.

A `Phase` says what holds while it lasts: learning rate, data mixture, context length, RoPE base and batch size. A
`PhasePlan` puts phases in a row and answers, as pure functions of `tokens_seen` (cumulative tokens over all ranks),
which phase it is and what holds there. Nothing here knows a model, a GPU or a file.

Source: Nanbeige4-3B report, section "Training recipe" (FG-WSD): warmup, diversity-enriched stable, high-quality
stable, decay with long context.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import cached_property
from itertools import accumulate, zip_longest
from typing import Any

SHAPES = ("linear", "cosine", "one_minus_sqrt", "exponential")
MIXTURE_DECIMALS = 4
_NEW_RUN = "resume with the same plan, or start a new run from its weights with init_from="


@dataclass(frozen=True)
class LearningRate:
    """A learning rate over one phase, from `start` to `end`; `end=None` keeps it at `start`."""

    start: float
    end: float | None = None
    shape: str = "linear"

    def at(self, progress: float) -> float:
        """Learning rate at `progress` in [0, 1] of the phase; exactly `start` at 0 and `end` at 1."""
        if self.end is None or progress <= 0:
            return self.start
        if progress >= 1:
            return self.end
        start, end = self.start, self.end
        if self.shape == "linear":
            return start + (end - start) * progress
        if self.shape == "cosine":
            return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
        if self.shape == "one_minus_sqrt":
            return end + (start - end) * (1 - math.sqrt(progress))
        assert self.shape == "exponential", self.shape
        return start * (end / start) ** progress


@dataclass(frozen=True)
class Phase:
    """What holds between two boundaries.

    Attributes:
        tokens: length, in tokens over all ranks.
        mixture: probability of each source; sums to 1.
        seq_len: tokens per row.
        rope_theta: RoPE base frequency; raising it with `seq_len` is ABF.
        global_batch_tokens: tokens per optimizer step over all ranks.
        micro_batch_size: rows per rank per forward.
    """

    name: str
    tokens: int
    lr: LearningRate
    mixture: Mapping[str, float]
    seq_len: int
    rope_theta: float
    global_batch_tokens: int
    micro_batch_size: int

    @property
    def rows_per_step(self) -> int:
        return self.global_batch_tokens // self.seq_len

    @property
    def steps(self) -> int:
        return self.tokens // self.global_batch_tokens


@dataclass(frozen=True)
class PhasePlan:
    """Phases in a row. `tokens_seen` in [start, end) of a phase belongs to that phase."""

    phases: tuple[Phase, ...]

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """`tokens_seen` at the end of each phase."""
        return tuple(accumulate(phase.tokens for phase in self.phases))

    @property
    def total_tokens(self) -> int:
        return self.ends[-1] if self.ends else 0

    @property
    def total_steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    def index_at(self, tokens_seen: int) -> int:
        """Index of the phase that holds at `tokens_seen`; the last one at and past the end."""
        return min(bisect.bisect_right(self.ends, tokens_seen), len(self.phases) - 1)

    def phase_at(self, tokens_seen: int) -> Phase:
        return self.phases[self.index_at(tokens_seen)]

    def begun(self, tokens_seen: int) -> tuple[Phase, ...]:
        """Return the phases that some of the first `tokens_seen` tokens belong to."""
        return self.phases[: self.index_at(tokens_seen - 1) + 1] if tokens_seen > 0 else ()

    def start_of(self, index: int) -> int:
        """`tokens_seen` at which phase `index` begins."""
        return self.ends[index] - self.phases[index].tokens

    def lr_at(self, tokens_seen: int) -> float:
        index = self.index_at(tokens_seen)
        phase = self.phases[index]
        return phase.lr.at((tokens_seen - self.start_of(index)) / phase.tokens)

    def lr_of_step(self, tokens_seen: int) -> float:
        """Learning rate of the optimizer step that begins at `tokens_seen`: the rate where the step *ends*.

        So no step is spent at the 0 a warmup starts from, and the last step of a decay has its final rate.
        """
        index = self.index_at(tokens_seen)
        phase = self.phases[index]
        return phase.lr.at((tokens_seen + phase.global_batch_tokens - self.start_of(index)) / phase.tokens)

    def mixture_at(self, tokens_seen: int) -> Mapping[str, float]:
        return self.phase_at(tokens_seen).mixture

    def scaled(self, total_tokens: int) -> PhasePlan:
        """Stretch the plan over `total_tokens`: every phase keeps its share, boundaries rounded to whole tokens."""
        if self.total_tokens <= 0:
            return self  # nothing to keep a share of; `validate` names what is wrong
        factor = Fraction(total_tokens, self.total_tokens)
        ends = [round(end * factor) for end in self.ends]
        return PhasePlan(tuple(replace(p, tokens=b - a) for p, a, b in zip(self.phases, [0, *ends], ends)))

    def in_whole_steps(self) -> PhasePlan:
        """Round the plan to how it runs: each phase lasts a whole number of optimizer steps, at least one.

        Learning rate, mixture, context and RoPE base then change at one and the same token, and every step is full.
        A boundary moves by at most half a step of the phase that it ends: the next phase makes up for what rounding
        took from one. `dry_run=true` prints planned and realised tokens side by side.
        """
        phases: list[Phase] = []
        start = 0
        for phase, end in zip(self.phases, self.ends):
            steps = max(1, round(Fraction(end - start, phase.global_batch_tokens)))
            phases.append(replace(phase, tokens=steps * phase.global_batch_tokens))
            start += phases[-1].tokens
        return PhasePlan(tuple(phases))

    def step_at(self, tokens_seen: int) -> int:
        """Return the number of whole optimizer steps before `tokens_seen` (for a plan in whole steps)."""
        index = self.index_at(tokens_seen)
        steps = sum(phase.steps for phase in self.phases[:index])
        return steps + (tokens_seen - self.start_of(index)) // self.phases[index].global_batch_tokens

    def tokens_at(self, step: int) -> int:
        """Return `tokens_seen` before optimizer step `step` (for a plan in whole steps); the inverse of `step_at`."""
        tokens = 0
        for phase in self.phases:
            if step <= phase.steps:
                return tokens + step * phase.global_batch_tokens
            step -= phase.steps
            tokens += phase.tokens
        return tokens

    def require_same_past(self, saved: list[dict[str, Any]], tokens_seen: int) -> None:
        """Refuse to continue a run whose steps so far were made under another plan.

        Phases not yet begun may differ: several decays can grow from one stable checkpoint.

        Args:
            saved: the phases of the checkpoint's plan, as `dataclasses.asdict` gives them.
            tokens_seen: the checkpoint's clock.

        Raises:
            ValueError: a phase begun before `tokens_seen` differs; names the first field that does.
        """
        start = 0
        for old, phase in zip_longest(saved, self.phases):
            if start >= tokens_seen:
                return
            if old is None or phase is None:
                extra = asdict(phase) if phase else old  # the longer plan's
                assert extra is not None
                raise ValueError(
                    f"the checkpoint has {tokens_seen} tokens under another plan (phase {extra['name']!r}); {_NEW_RUN}"
                )
            for key, value in asdict(phase).items():
                if key != "micro_batch_size" and old[key] != value:  # how a step is cut up changes no sum
                    raise ValueError(
                        f"stage.phases.{phase.name}.{key} is {value}, but the checkpoint's {tokens_seen} tokens "
                        f"were trained with {old[key]}; {_NEW_RUN}"
                    )
            start += old["tokens"]

    def validate(self, path: str, sources: Mapping[str, object], world_size: int = 1, whole_rows: bool = True) -> None:
        """Raise `ValueError` naming the YAML key below `path` for a plan that cannot run.

        Args:
            whole_rows: a step is a whole number of micro-batches on each rank.
        """
        if not self.phases:
            raise ValueError(f"{path} is empty: a stage needs at least one phase")
        for phase in self.phases:
            _validate_phase(phase, f"{path}.{phase.name}", sources)
            if whole_rows:
                _validate_rows(phase, f"{path}.{phase.name}", world_size)


def exact(weight: float) -> Fraction:
    """Return the decimal that a YAML float was written as: 0.1 is 1/10, not 3602879701896397/2**55."""
    return Fraction(repr(float(weight)))


def _validate_phase(phase: Phase, path: str, sources: Mapping[str, object]) -> None:
    for key in ("tokens", "seq_len", "global_batch_tokens", "micro_batch_size", "rope_theta"):
        if not 0 < getattr(phase, key) < math.inf:
            raise ValueError(f"{path}.{key} is {getattr(phase, key)}; it must be positive and finite")
    _validate_lr(phase.lr, f"{path}.lr")
    _validate_mixture(phase.mixture, f"{path}.mixture", sources)


def _validate_rows(phase: Phase, path: str, world_size: int) -> None:
    rows = phase.micro_batch_size * world_size
    if phase.global_batch_tokens % (phase.seq_len * rows):
        per_rank = (
            f"seq_len {phase.seq_len} x micro_batch_size {phase.micro_batch_size} x {world_size} data-parallel rank(s)"
        )
        step = phase.seq_len * rows
        near = max(1, round(phase.global_batch_tokens / step)) * step
        raise ValueError(
            f"{path}.global_batch_tokens {phase.global_batch_tokens} is not a multiple of {step} ({per_rank}); "
            f"the nearest one is {near}"
        )


def _validate_lr(lr: LearningRate, path: str) -> None:
    if lr.shape not in SHAPES:
        raise ValueError(f"{path}.shape is {lr.shape!r}; allowed: {', '.join(SHAPES)}")
    for key in ("start", "end"):
        value = getattr(lr, key)
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{path}.{key} is {value}; it must be finite and not negative")
    if lr.shape == "exponential" and lr.end is not None and not (lr.start > 0 and lr.end > 0):
        raise ValueError(f"{path} is exponential from {lr.start} to {lr.end}; both must be above 0")


def _validate_mixture(mixture: Mapping[str, float], path: str, sources: Mapping[str, object]) -> None:
    for name, weight in mixture.items():
        if name not in sources:
            raise ValueError(f"{path} names {name!r}; known sources (data.sources) are: {', '.join(sources) or 'none'}")
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"{path}.{name} is {weight}; a weight is finite and not negative")
        if (exact(weight) * 10**MIXTURE_DECIMALS).denominator != 1:
            raise ValueError(f"{path}.{name} is {weight}; weights are met exactly, to {MIXTURE_DECIMALS} decimals")
    total = sum((exact(weight) for weight in mixture.values()), Fraction(0))
    if total != 1:
        raise ValueError(f"{path} sums to {float(total):g}, not 1")
