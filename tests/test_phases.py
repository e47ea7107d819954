"""A plan's answers at exact token counts, what scaling and rounding keep, and one clear error for each mistake."""

from __future__ import annotations

import math
import random
from dataclasses import asdict, replace
from fractions import Fraction

import pytest

from nb_lightning.config.compose import plan_of
from nb_lightning.phases import LearningRate, Phase, PhasePlan, exact
from tests.config.harness import composed

TRILLION = 10**12


def shipped(model: str) -> PhasePlan:
    """The pretraining plan of conf/plan/pretrain/<model>.yaml, composed as train.py composes it."""
    return plan_of(composed("stage=pretrain", f"model={model}").stage)


@pytest.fixture(scope="module")
def paper() -> PhasePlan:
    return shipped("nanbeige4_3b")


@pytest.fixture(scope="module")
def demo() -> PhasePlan:
    return shipped("demo")


def phase(name: str = "warmup", tokens: int = 4096, **changes: object) -> Phase:
    whole = Phase(name, tokens, LearningRate(1e-3), {"docs": 1.0}, 16, 1e4, 64, 2)
    return replace(whole, **changes)


def random_plan(seed: int, batches: tuple[int, ...] = (64, 128, 192, 320)) -> PhasePlan:
    """Up to six phases of at least four steps, with batches that differ between phases."""
    rng = random.Random(seed)
    parts = []
    for i in range(rng.randint(1, 6)):
        batch = rng.choice(batches)
        parts.append(phase(f"p{i}", rng.randint(4 * batch, 400 * batch), global_batch_tokens=batch))
    return PhasePlan(tuple(parts))


# Learning rate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tokens_seen, lr",
    [
        (0, 0.0),
        (TRILLION // 20, 2.25e-4),  # half of the warmup
        (TRILLION // 10, 4.5e-4),
        (TRILLION // 10 + 1, 4.5e-4),
        (125 * TRILLION // 10, 4.5e-4),  # from diversity-enriched to high-quality stable
        (19 * TRILLION - 1, 4.5e-4),
        (19 * TRILLION, 4.5e-4),
        (21 * TRILLION, (4.5e-4 + 1.5e-6) / 2),
        (23 * TRILLION, 1.5e-6),
        (24 * TRILLION, 1.5e-6),
    ],
)
def test_the_papers_learning_rate(paper: PhasePlan, tokens_seen: int, lr: float) -> None:
    assert paper.lr_at(tokens_seen) == pytest.approx(lr, rel=1e-12, abs=0)


def test_the_papers_plateau_is_exact_all_through(paper: PhasePlan) -> None:
    rng = random.Random(0)
    seen = [rng.randrange(TRILLION // 10, 19 * TRILLION + 1) for _ in range(200)]
    assert {paper.lr_at(tokens_seen) for tokens_seen in seen} == {4.5e-4}
    assert (paper.lr_at(0), paper.lr_at(23 * TRILLION)) == (0.0, 1.5e-6)


def test_the_papers_phases(paper: PhasePlan) -> None:
    names = ["warmup", "diversity_enriched_stable", "high_quality_stable", "decay"]
    assert [p.name for p in paper.phases] == names
    assert [end / TRILLION for end in paper.ends] == [0.1, 12.5, 19.0, 23.0]
    assert [p.seq_len for p in paper.phases] == [4096, 4096, 4096, 65536]


@pytest.mark.parametrize(
    "tokens_seen, lr",
    [
        (0, 0.0),
        (45_000, 1e-3),
        (90_000, 2e-3),
        (1_650_000, 2e-3),
        (2_497_500, 2e-3),
        (2_748_750, (2e-3 + 1e-5) / 2),
        (3_000_000, 1e-5),
    ],
)
def test_the_demos_learning_rate(demo: PhasePlan, tokens_seen: int, lr: float) -> None:
    assert demo.lr_at(tokens_seen) == pytest.approx(lr, rel=1e-12, abs=0)


@pytest.mark.parametrize(
    "shape, at_quarters",
    [
        ("linear", [1.0, 0.7525, 0.505, 0.2575, 0.01]),
        ("cosine", [1.0, 0.01 + 0.99 * (2 + math.sqrt(2)) / 4, 0.505, 0.01 + 0.99 * (2 - math.sqrt(2)) / 4, 0.01]),
        ("one_minus_sqrt", [1.0, 0.505, 1 - 0.99 / math.sqrt(2), 1 - 0.99 * math.sqrt(3) / 2, 0.01]),
        ("exponential", [1.0, 10**-0.5, 0.1, 10**-1.5, 0.01]),
    ],
)
def test_decay_shapes_from_1_to_a_hundredth(shape: str, at_quarters: list[float]) -> None:
    lr = LearningRate(1.0, 0.01, shape)
    assert [lr.at(i / 4) for i in range(5)] == pytest.approx(at_quarters, rel=1e-12)
    assert (lr.at(0), lr.at(1)) == (1.0, 0.01)


@pytest.mark.parametrize("shape", ["linear", "cosine", "one_minus_sqrt", "exponential"])
def test_without_an_end_the_rate_stays(shape: str) -> None:
    assert {LearningRate(0.3, None, shape).at(i / 7) for i in range(8)} == {0.3}


def test_a_step_has_the_rate_where_it_ends() -> None:
    plan = PhasePlan(
        (
            phase("warmup", 4 * 64, lr=LearningRate(0.0, 1.0)),
            phase("decay", 2 * 64, lr=LearningRate(1.0, 0.5)),
        )
    )
    assert [plan.lr_of_step(64 * i) for i in range(6)] == [0.25, 0.5, 0.75, 1.0, 0.75, 0.5]


# Phases and the clock -----------------------------------------------------------------------------------------------


def test_a_boundary_belongs_to_the_next_phase() -> None:
    one = phase("one", 100, mixture={"docs": 1.0})
    two = phase("two", 50, mixture={"code": 1.0}, lr=LearningRate(7.0))
    plan = PhasePlan((one, two))
    assert [plan.phase_at(n).name for n in (0, 99, 100, 149, 150, 10**9)] == ["one", "one", "two", "two", "two", "two"]
    assert (plan.mixture_at(99), plan.mixture_at(100)) == ({"docs": 1.0}, {"code": 1.0})
    assert plan.lr_at(100) == 7.0
    assert (plan.start_of(0), plan.start_of(1), plan.total_tokens) == (0, 100, 150)


@pytest.mark.parametrize("seed", range(30))
def test_scaled_keeps_each_boundarys_share(seed: int) -> None:
    plan = random_plan(seed)
    total = random.Random(seed).randint(100, 10 * plan.total_tokens)
    scaled = plan.scaled(total)
    assert scaled.total_tokens == total
    for before, after in zip(plan.ends, scaled.ends):
        assert abs(after - Fraction(before * total, plan.total_tokens)) <= Fraction(1, 2)
    assert [replace(p, tokens=0) for p in scaled.phases] == [replace(p, tokens=0) for p in plan.phases]


def test_the_papers_plan_scaled_down_keeps_its_proportions(paper: PhasePlan) -> None:
    assert paper.scaled(2_300_000).ends == (10_000, 1_250_000, 1_900_000, 2_300_000)


@pytest.mark.parametrize("seed", range(30))
def test_in_whole_steps_moves_a_boundary_by_at_most_half_a_step(seed: int) -> None:
    plan = random_plan(seed)
    whole = plan.in_whole_steps()
    for p, planned, realised in zip(whole.phases, plan.ends, whole.ends):
        assert p.tokens % p.global_batch_tokens == 0
        assert abs(realised - planned) <= p.global_batch_tokens / 2
    assert whole.in_whole_steps() == whole


def test_in_whole_steps_leaves_a_tiny_phase_one_step_and_takes_it_back_later() -> None:
    plan = PhasePlan((phase("warmup", 10), phase("stable", 64 * 10)))
    assert [p.steps for p in plan.in_whole_steps().phases] == [1, 9]


@pytest.mark.parametrize("model", ["demo", "nanbeige4_3b"])
def test_the_shipped_plans_in_whole_steps(model: str) -> None:
    plan = shipped(model)
    whole = plan.in_whole_steps()
    half_a_step = plan.phases[0].global_batch_tokens / 2
    assert max(abs(a - b) for a, b in zip(plan.ends, whole.ends)) <= half_a_step
    last = whole.phases[-1]
    assert whole.lr_of_step(0) > 0
    assert whole.lr_of_step(whole.total_tokens - last.global_batch_tokens) == last.lr.end


@pytest.mark.parametrize("seed", range(20))
def test_step_at_and_tokens_at_are_inverses(seed: int) -> None:
    plan = random_plan(seed).in_whole_steps()
    tokens, step = 0, 0
    for p in plan.phases:  # walk the run as training does
        for _ in range(p.steps):
            assert plan.tokens_at(step) == tokens
            assert plan.step_at(tokens) == plan.step_at(tokens + p.global_batch_tokens - 1) == step
            tokens, step = tokens + p.global_batch_tokens, step + 1
    assert (plan.total_steps, plan.total_tokens) == (step, tokens)
    assert (plan.step_at(tokens), plan.tokens_at(step)) == (step, tokens)


# Resuming -----------------------------------------------------------------------------------------------------------

OLD = PhasePlan((phase("stable", 6400), phase("decay", 640)))


def saved(plan: PhasePlan) -> list[dict[str, object]]:
    return [asdict(p) for p in plan.phases]


def test_a_checkpoint_resumes_under_its_own_plan() -> None:
    for tokens_seen in (0, 64, 6400, 6464, 7040):
        OLD.require_same_past(saved(OLD), tokens_seen)


def test_several_decays_grow_from_one_stable_checkpoint() -> None:
    new = PhasePlan((OLD.phases[0], phase("long_decay", 1280), phase("more", 640)))
    new.require_same_past(saved(OLD), 6400)


@pytest.mark.parametrize(
    "new, key",
    [
        (PhasePlan((phase("stable", 6464), OLD.phases[1])), "tokens is 6464, but .* trained with 6400"),
        (PhasePlan((phase("stable", 6400, seq_len=32), OLD.phases[1])), "seq_len is 32, but .* trained with 16"),
        (PhasePlan((phase("stable", 6400, mixture={"docs": 0.5, "code": 0.5}), OLD.phases[1])), "mixture is"),
        (PhasePlan((phase("stable", 6400, lr=LearningRate(1e-3, 1e-4)), OLD.phases[1])), "lr is"),
    ],
)
def test_a_begun_phase_cannot_change(new: PhasePlan, key: str) -> None:
    with pytest.raises(ValueError, match=rf"^stage\.phases\.stable\.{key}"):
        new.require_same_past(saved(OLD), 64)


def test_a_begun_phase_cannot_vanish() -> None:
    with pytest.raises(ValueError, match="the checkpoint has 6464 tokens under another plan \\(phase 'decay'\\)"):
        PhasePlan(OLD.phases[:1]).require_same_past(saved(OLD), 6464)


# Validation ---------------------------------------------------------------------------------------------------------

SOURCES = {"docs": "a", "code": "b", "maths": "c"}
SHAPE_NAMES = "linear, cosine, one_minus_sqrt, exponential"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mixture": {"docs": 0.5, "code": 0.7}}, "mixture sums to 1.2, not 1"),
        ({"mixture": {"docs": 0.9999}}, "mixture sums to 0.9999, not 1"),
        ({"mixture": {}}, "mixture sums to 0, not 1"),
        (
            {"mixture": {"docs": 0.5, "web": 0.5}},
            "mixture names 'web'; known sources (data.sources) are: docs, code, maths",
        ),
        ({"mixture": {"docs": 1.5, "code": -0.5}}, "mixture.code is -0.5; a weight is finite and not negative"),
        ({"mixture": {"docs": math.nan}}, "mixture.docs is nan; a weight is finite and not negative"),
        (
            {"mixture": {"docs": 0.33333, "code": 0.66667}},
            "mixture.docs is 0.33333; weights are met exactly, to 4 decimals",
        ),
        ({"lr": LearningRate(1.0, 0.1, "sine")}, f"lr.shape is 'sine'; allowed: {SHAPE_NAMES}"),
        ({"lr": LearningRate(-1.0)}, "lr.start is -1.0; it must be finite and not negative"),
        ({"lr": LearningRate(1.0, math.inf)}, "lr.end is inf; it must be finite and not negative"),
        (
            {"lr": LearningRate(1.0, 0.0, "exponential")},
            "lr is exponential from 1.0 to 0.0; both must be above 0",
        ),
        ({"tokens": 0}, "tokens is 0; it must be positive and finite"),
        ({"seq_len": -1}, "seq_len is -1; it must be positive and finite"),
        ({"global_batch_tokens": 0}, "global_batch_tokens is 0; it must be positive and finite"),
        ({"micro_batch_size": 0}, "micro_batch_size is 0; it must be positive and finite"),
        ({"rope_theta": 0.0}, "rope_theta is 0.0; it must be positive and finite"),
        ({"rope_theta": math.nan}, "rope_theta is nan; it must be positive and finite"),
        ({"rope_theta": math.inf}, "rope_theta is inf; it must be positive and finite"),
        (
            {"global_batch_tokens": 370},
            "global_batch_tokens 370 is not a multiple of 96 "
            "(seq_len 16 x micro_batch_size 2 x 3 data-parallel rank(s)); the nearest one is 384",
        ),
        (
            {"global_batch_tokens": 16},
            "global_batch_tokens 16 is not a multiple of 96 "
            "(seq_len 16 x micro_batch_size 2 x 3 data-parallel rank(s)); the nearest one is 96",
        ),
    ],
)
def test_every_mistake_names_its_key(changes: dict[str, object], message: str) -> None:
    good = phase("stable", global_batch_tokens=192)
    bad = replace(good, name="decay", **changes)
    with pytest.raises(ValueError) as error:
        PhasePlan((good, bad)).validate("stage.phases", SOURCES, world_size=3)
    assert str(error.value) == f"stage.phases.decay.{message}"


def test_the_same_plan_passes_on_fewer_ranks() -> None:
    PhasePlan((phase(),)).validate("stage.phases", SOURCES, world_size=2)
    with pytest.raises(ValueError, match="not a multiple"):
        PhasePlan((phase(),)).validate("stage.phases", SOURCES, world_size=4)


def test_no_sources_are_named_as_none() -> None:
    with pytest.raises(ValueError, match=r"known sources \(data.sources\) are: none$"):
        PhasePlan((phase(),)).validate("stage.phases", {})


@pytest.mark.parametrize("plan", [PhasePlan(()), PhasePlan(()).scaled(1000)])
def test_an_empty_plan(plan: PhasePlan) -> None:
    with pytest.raises(ValueError, match=r"^stage\.phases is empty: a stage needs at least one phase$"):
        plan.validate("stage.phases", SOURCES)


def test_a_plan_without_tokens_is_refused_even_when_scaled() -> None:
    with pytest.raises(ValueError, match=r"^stage\.phases\.warmup\.tokens is 0"):
        PhasePlan((phase(tokens=0),)).scaled(1000).validate("stage.phases", SOURCES)


@pytest.mark.parametrize("weights", [[0.1] * 10, [0.27, 0.09, 0.06, 0.08, 0.36, 0.14], [0.0001, 0.9999], [0.0, 1.0]])
def test_weights_sum_as_the_decimals_they_were_written_as(weights: list[float]) -> None:
    names = {f"s{i}": weight for i, weight in enumerate(weights)}
    PhasePlan((phase(mixture=names),)).validate("stage.phases", names)


def test_exact_reads_the_written_decimal() -> None:
    assert (exact(0.1), exact(1), exact(1e-4)) == (Fraction(1, 10), 1, Fraction(1, 10_000))
