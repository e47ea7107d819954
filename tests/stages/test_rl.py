"""`train.py stage=rl` from end to end, and the stage's numbers against naive ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nb_lightning.checkpoints.folders import CheckpointWeights
from nb_lightning.model.transformer import Transformer
from nb_lightning.rewards import ifeval
from nb_lightning.rollouts.groups import Group
from nb_lightning.stages.rl import RLStage
from tests.dpd_harness import random_model
from tests.harness import curve
from tests.rl_harness import END, HEAT, POLICY, make, run_here, run_rl, steps_logged

pytestmark = pytest.mark.runs

STILL = ("stage.phases.stem.lr.start=0", "stage.phases.code.lr.start=0")
ALL_PROMPTS = ("callbacks.on_policy_filter=null",)
SAME = ("train/loss", "optim/grad_norm", "rl/reward", "rl/truncated", "rl/completion_tokens", "train/tokens")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def unbroken(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_here(made, tmp_path_factory.mktemp("unbroken"))


def policy() -> Transformer:
    """What `rl_harness.make` writes."""
    model = random_model(POLICY, 3)
    model.head.weight.data.mul_(HEAT)
    model.head.weight.data[END] *= 6
    return model


def weights(run: Path) -> dict[str, Tensor]:
    last = CheckpointWeights(sorted((run / "checkpoints").iterdir())[-1])
    return {name: last.read(name) for name, _ in policy().named_parameters()}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[list[Group]]:
    """The groups of every step."""
    found: list[list[Group]] = []
    real = RLStage.roll_out

    def roll_out(self: RLStage, step: int) -> Any:
        groups, waited = real(self, step)
        found.append(groups)
        return groups, waited

    monkeypatch.setattr(RLStage, "roll_out", roll_out)
    return found


# What is computed ---------------------------------------------------------------------------------------------------


def naive_logprobs(model: Transformer, prompt: list[int], ids: list[int]) -> Tensor:
    """[len(ids)], each completion alone, with all logits."""
    tokens = torch.tensor([[*prompt, *ids]])
    logits = model(tokens[:, :-1], head=lambda hidden, weight: hidden @ weight.T)
    logprobs = logits.log_softmax(-1).gather(2, tokens[:, 1:, None])[0, :, 0]
    return logprobs[len(prompt) - 1 :]


def naive_loss(
    model: Transformer, groups: list[Group], knobs: dict[str, Any], old: list[list[Tensor]] | None = None
) -> Tensor:
    """GRPO of one step, completion by completion."""
    terms, lengths = [], []
    for g, group in enumerate(groups):
        rewards = torch.tensor(group.rewards, dtype=torch.float64)
        advantages = rewards - rewards.mean()
        if knobs.get("scale_advantages", True):
            advantages = advantages / (rewards.std() + 1e-4)
        for j, completion in enumerate(group.attempts.completions):
            if completion.finish_reason == "length" and knobs.get("mask_truncated", True):
                continue
            logprobs = naive_logprobs(model, list(group.prompt), completion.ids)
            before = logprobs.detach() if old is None else old[g][j]
            ratio = (logprobs - before).exp()
            clipped = ratio.clamp(1 - knobs.get("clip_low", 0.2), 1 + knobs.get("clip_high", 0.2))
            terms.append(-torch.minimum(ratio * advantages[j], clipped * advantages[j]))
            lengths.append(len(completion.ids))
    kind = knobs.get("normalisation", "token")
    if kind == "token":
        return torch.cat(terms).sum() / sum(lengths)
    if kind == "sequence":
        return torch.stack([term.mean() for term in terms]).mean()
    return torch.stack([term.sum() / 24 for term in terms]).mean()


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"mask_truncated": False},
        {"normalisation": "sequence"},
        {"normalisation": "constant", "scale_advantages": False, "mask_truncated": False},
    ],
    ids=str,
)
def test_a_step_is_the_formula(made: Path, tmp_path: Path, seen: list[list[Group]], knobs: dict[str, Any]) -> None:
    """Loss and gradient of the first step, in float64, completion by completion."""
    words = [f"stage.{name}={value}" for name, value in knobs.items()]
    run = run_here(made, tmp_path, *words, *STILL)
    model = policy().double()
    for step in (0, 1, 4):  # the weights stay; the last is of the second phase, with another RoPE base
        model.rope.theta = 1e5 if step < 4 else 2e5
        model.zero_grad()
        loss = naive_loss(model, seen[step], knobs)
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        assert curve(run, "train/loss")[step] == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)
        assert curve(run, "optim/grad_norm")[step] == pytest.approx(norm.item(), rel=1e-4)
    assert any(any(group.truncated) for group in seen[0]) and not all(all(group.truncated) for group in seen[0])


def test_the_sampler_and_the_trainer_agree(unbroken: Path) -> None:
    """At every step: within 1e-4 nats in float32, and with the policy that has just been updated."""
    assert 0 < max(curve(unbroken, "train/rollout_gap")) < 1e-4
    assert curve(unbroken, "train/clipped_low") == curve(unbroken, "train/clipped_high") == [0.0] * 7


def test_several_updates_use_the_ratios_of_the_rollout(made: Path, tmp_path: Path, seen: list[list[Group]]) -> None:
    """Two updates: the second against the log-probabilities at the weights that sampled, as a naive loop does it."""
    words = ("stage.updates_per_rollout=2", "stage.clip_low=0.1", "stage.clip_high=0.3", "stage.optim.clip_norm=1e9")
    one_step = ("stage.phases.stem.steps=1", "stage.phases.code.steps=1", "stage.phases.code.lr.start=0")
    run = run_here(made, tmp_path, *words, *one_step)
    model = policy().double()
    optimizer = torch.optim.AdamW(model.parameters(), 0.005, (0.9, 0.95), 1e-8, 0.0)
    with torch.no_grad():
        old = [[naive_logprobs(model, list(g.prompt), c.ids) for c in g.attempts.completions] for g in seen[0]]
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = naive_loss(model, seen[0], {"clip_low": 0.1, "clip_high": 0.3}, old)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert curve(run, "train/loss")[0] == pytest.approx(sum(losses) / 2, rel=1e-3)
    assert losses[1] < losses[0] and curve(run, "train/clipped_high")[0] > 0
    found = weights(run)
    moved = torch.cat([(p.detach() - q).flatten() for p, q in zip(model.parameters(), policy().parameters())])
    ours = torch.cat([(found[name] - q).flatten() for name, q in policy().named_parameters()])
    assert (moved - ours).norm() < 0.02 * moved.norm()  # Adam takes the sign of gradients that are next to nothing


def test_the_kl_term_starts_at_zero_and_grows(made: Path, tmp_path: Path) -> None:
    run = run_here(made, tmp_path, "stage.kl_weight=0.5", *ALL_PROMPTS)
    kl = curve(run, "train/ref_kl")
    assert kl[0] == pytest.approx(0, abs=1e-6) and all(value > 1e-4 for value in kl[1:4])


def test_bf16_mixed_has_the_gradients_of_float32(made: Path, tmp_path: Path, unbroken: Path) -> None:
    """Autocast's copies of weights, made while sampling without a graph, must not take the gradient."""
    run = run_here(made, tmp_path, "trainer.precision=bf16-mixed", "stage.mask_truncated=false", *STILL)
    exact = run_here(made, tmp_path / "exact", "stage.mask_truncated=false", *STILL)
    assert curve(run, "train/rollout_gap")[0] < 0.02
    first, wanted = steps_logged(run)[0], steps_logged(exact)[0]
    if first["rl/sampled_tokens"] == wanted["rl/sampled_tokens"]:
        assert first["optim/grad_norm"] == pytest.approx(wanted["optim/grad_norm"], rel=0.05)
    assert min(curve(run, "optim/grad_norm")) > 0.1


def test_it_learns(made: Path, tmp_path: Path) -> None:
    """Some words are easily had: twenty steps make half as many more."""
    words = ("stage.phases.stem.mixture.words=1", "stage.phases.stem.mixture.digits=0", "stage.phases.stem.steps=20")
    words += ("stage.phases.stem.prompts=16", "stage.phases.code.steps=1", "stage.mask_truncated=false")
    run = run_here(made, tmp_path, *words, *ALL_PROMPTS, "stage.phases.stem.lr.start=0.01", "stage.micro_batch_size=16")
    rewards = curve(run, "rl/reward")
    assert sum(rewards[15:20]) > 1.5 * sum(rewards[:5])


# However the steps are cut up ---------------------------------------------------------------------------------------


def same(a: Path, b: Path, rel: float = 1e-4) -> None:
    for name in SAME:
        assert curve(a, name) == pytest.approx(curve(b, name), rel=rel, abs=1e-5), name


def test_accumulation_changes_nothing(made: Path, tmp_path: Path, unbroken: Path) -> None:
    same(run_here(made, tmp_path, "stage.micro_batch_size=1", "stage.max_batch=3"), unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_train_like_one(made: Path, tmp_path: Path, unbroken: Path, strategy: str) -> None:
    run_rl(made, tmp_path, f"trainer.strategy={strategy}", "stage.micro_batch_size=2", ranks=2)
    run = tmp_path / "runs/rl"
    same(run, unbroken)
    assert (run / "on_policy_filter.json").read_text() == (unbroken / "on_policy_filter.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_replace_groups_together(made: Path, tmp_path: Path, strategy: str) -> None:
    """One rank may need another round and the other none."""
    words = ("stage.extra_rounds=3", *ALL_PROMPTS)
    run_rl(made, tmp_path, f"trainer.strategy={strategy}", "stage.micro_batch_size=2", *words, ranks=2)
    alone = run_here(made, tmp_path / "alone", *words)
    same(tmp_path / "runs/rl", alone)
    assert curve(tmp_path / "runs/rl", "rl/replaced") == curve(alone, "rl/replaced")


# Resuming -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [2, 6])
def test_resumed_in_each_phase_to_the_last_bit(made: Path, tmp_path: Path, unbroken: Path, step: int) -> None:
    """The same rollouts, losses and weights; and what the filter kept is not asked again."""
    run = tmp_path / "runs/rl"
    shutil.copytree(unbroken, run)
    for path in (run / "checkpoints").iterdir():
        if path.name[:13] > f"step-{step:08d}":
            shutil.rmtree(path)
    filtered = (run / "on_policy_filter.json").stat().st_mtime_ns
    run_here(made, tmp_path, "resume=true")
    whole = steps_logged(unbroken)[step:]
    for name in (*SAME, "rl/reward_std", "train/entropy", "train/rollout_gap"):
        assert curve(run, name, version=1) == [row[name] for row in whole], name
    before, after = weights(unbroken), weights(run)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (run / "rollouts.jsonl").read_text() == (unbroken / "rollouts.jsonl").read_text()
    again = (run / "on_policy_filter.json").stat().st_mtime_ns != filtered
    assert again == (step == 2)  # the second phase had not been filtered yet


# Groups without signal, and verifiers that fail ---------------------------------------------------------------------


def test_groups_without_signal_are_replaced(made: Path, tmp_path: Path, seen: list[list[Group]]) -> None:
    run = run_here(made, tmp_path, "stage.extra_rounds=4", "stage.micro_batch_size=2", *STILL, *ALL_PROMPTS)
    for step, groups in enumerate(seen):
        trained = [group for group in groups if group.is_trained]
        assert len(trained) == (4 if step < 4 else 6)
        sources = [group.attempts.task.source for group in trained]
        assert step >= 4 or sorted(sources) == ["digits", "digits", "words", "words"]  # the mixture holds
        assert all(not group.has_signal for group in groups if not group.is_trained)
        if step == 0:
            loss = naive_loss(policy().double(), trained, {})
            assert curve(run, "train/loss")[0] == pytest.approx(loss.item(), rel=1e-4)
        drawn = [tuple(c.ids) for group in groups for c in group.attempts.completions]
        assert len(set(drawn)) > 0.9 * len(drawn)  # the same prompt again is answered anew
    replaced = [sum(not group.is_trained for group in groups) for groups in seen]
    assert curve(run, "rl/replaced") == replaced and sum(replaced) > 5


def test_a_failing_verifier_costs_rewards_and_a_counter(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    real = ifeval.IFEval.score

    def score(self: Any, prompt: str, completions: Any, reference: Any) -> Any:
        calls.append(prompt)
        if prompt.startswith("w"):
            raise RuntimeError("broken")
        return real(self, prompt, completions, reference)

    monkeypatch.setattr(ifeval.IFEval, "score", score)
    run = run_here(made, tmp_path, *ALL_PROMPTS)
    text = (run / "metrics/version_0/metrics.csv").read_text()
    assert "rl/status/verifier_error" in text and len(steps_logged(run)) == 7
    assert all(row["rl/pass_rate"] < 0.6 for row in steps_logged(run))


def test_a_run_writes_rollouts_manifest_and_times(unbroken: Path) -> None:
    lines = [json.loads(line) for line in (unbroken / "rollouts.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines} == set(range(7)) and len(lines) == 7 * 2 * 4
    assert {line["source"] for line in lines} == {"words", "digits"}
    assert all(line["reward"] in (0, 1) and line["prompt"][0] in "wd" for line in lines)
    manifest = json.loads((unbroken / "manifest.json").read_text())
    assert manifest["finished"] and manifest["data"]["words"]["tasks"] == 12
    steps = steps_logged(unbroken)
    assert all(row["perf/sampling_sec"] > 0 and row["perf/training_sec"] > 0 for row in steps)
    assert [row["tokens_seen"] for row in steps] == [1536, 3072, 4608, 6144, 9216, 12288, 15360]


# Bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, message",
    [
        (("stage.group_size=1",), "stage.group_size is 1"),
        (("stage.clip_low=1.5",), "stage.clip_low is 1.5"),
        (("stage.normalisation=mean",), "stage.normalisation is 'mean'; allowed: token, sequence, constant"),
        (("stage.phases.stem.seq_len=24",), "stage.phases.stem.seq_len is 24"),
        (("stage.phases.stem.prompts=0",), "stage.phases.stem.prompts is 0"),
        (("stage.phases.stem.seq_len=40",), "none of its 12 prompts leaves room"),
        (("data.sources.words=/nowhere.jsonl",), "data.sources.words: tasks file /nowhere.jsonl cannot be read"),
        (("trainer.strategy=ddp", "trainer.devices=4"), "stage.phases.code.prompts is 6"),
        (("init_from=null",), "stage=rl needs init_from"),
    ],
    ids=str,
)
def test_bad_input_is_one_error(made: Path, tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_here(made, tmp_path, *words)


def test_an_unknown_verifier_is_an_error_before_anything_is_sampled(made: Path, tmp_path: Path) -> None:
    sources = tmp_path / "bad.jsonl"
    sources.write_text((made / "words.jsonl").read_text().replace('"ifeval"', '"nobody"'))
    with pytest.raises(ValueError, match="no verifier is called 'nobody'"):
        run_here(made, tmp_path, f"data.sources.words={sources}")
    assert not (tmp_path / "runs/rl/checkpoints").exists()
