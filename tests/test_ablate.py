"""The runner of ablations: real runs of `train.py` on the tiny plan, and every mistake one line."""

from __future__ import annotations

import json
import subprocess
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from nb_lightning import ablate
from nb_lightning.config.compose import plan_of
from nb_lightning.model.transformer import ModelShape
from nb_lightning.run_folder import read_metrics
from tests.config.harness import composed
from tests.harness import TINY, TRACE, environment, read_trace

ARMS = {"slow": ["stage.phases.warmup.lr.end=1e-4"], "fast": [], "broken": ["stage.phases.warmup.mixture.docs=0.9"]}


@pytest.fixture
def tiny(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An ablation of the tiny plan, one arm of which cannot run."""
    monkeypatch.setenv("NB_ROOT", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    path = tmp_path / "tiny.yaml"
    common = [*TINY, *TRACE, f"paths.data_root={corpus}"]
    measure = {"kind": "perplexity", "sources": ["docs", "code"]}
    path.write_text(
        yaml.safe_dump({"question": "Why?", "common": common, "arms": ARMS, "measure": measure}, sort_keys=False)
    )
    return path


@pytest.mark.runs
def test_broken_runs_go_on_finished_ones_stay_and_the_table_is_of_their_numbers(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = {
        run.arm: run for run in ablate.plan_runs(str(tiny), ablate.read_ablation(str(tiny)), [3], [], str(tmp_path))
    }
    folder = runs["slow"].folder
    assert folder == tmp_path / "runs/ablation/tiny/slow-seed3"
    process = subprocess.Popen(runs["slow"].command, env=environment(), stdout=-3, stderr=-3)
    while not (folder / "trace.jsonl").exists() or len(read_trace(folder)) < 7:  # a checkpoint is at 5 of 20 steps
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()

    assert ablate.ablate(str(tiny), [3], 2, []) == ["broken-seed3"]
    starts = json.loads((folder / "manifest.json").read_text())["starts"]
    assert [start["tokens_seen"] > 0 for start in starts] == [False, True]
    assert sorted(read_trace(folder)) == list(range(20))
    last = {arm: read_metrics(runs[arm].folder)["val/perplexity/docs"][-1] for arm in ("slow", "fast")}
    assert {tokens for tokens, _ in last.values()} == {10240}
    values = {arm: value for arm, (_, value) in last.items()}
    report = (tmp_path / "ablation/tiny.md").read_text()
    assert f"| slow | {values['slow']:.3f} | – | {values['slow']:.3f} |  |  |" in report
    assert f"| {values['fast']:.3f} | {values['fast'] - values['slow']:+.3f} | – |" in report
    assert "failed: broken-seed3: exit status 1: error: stage.phases.warmup.mixture sums to 1.6" in report
    found = json.loads((tmp_path / "ablation/tiny.json").read_text())["measured"]
    assert found["docs"]["fast"]["difference"]["mean"] == pytest.approx(values["fast"] - values["slow"])

    capsys.readouterr()
    assert ablate.ablate(str(tiny), [3], 2, []) == ["broken-seed3"]  # nothing but what failed is run again
    assert "3 runs, 2 finished before" in capsys.readouterr().out
    assert len(json.loads((folder / "manifest.json").read_text())["starts"]) == 2
    with pytest.raises(ValueError, match=r"slow-seed3 was begun with other overrides .*remove or rename"):
        ablate.ablate(str(tiny), [3], 2, ["stage.optim.clip_norm=2"])


@pytest.mark.runs
def test_a_run_that_another_process_trains_is_left_alone(tiny: Path, tmp_path: Path) -> None:
    run = ablate.plan_runs(str(tiny), ablate.read_ablation(str(tiny)), [0], [], str(tmp_path))[0]
    run.folder.mkdir(parents=True)
    with subprocess.Popen(["flock", str(run.log), "sleep", "60"]) as other:
        while subprocess.run(["flock", "-n", str(run.log), "true"]).returncode == 0:
            assert other.poll() is None  # it has not got the lock yet
        assert "another process is training it" in str(ablate.train(run))
        other.terminate()


def test_the_dry_run_prints_every_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NB_ROOT", "/nowhere")
    with pytest.raises(SystemExit) as end:
        ablate.main(["fg_wsd", "--seeds", "4", "5", "--dry-run", "stage.total_tokens=1000"])
    lines = capsys.readouterr().out.splitlines()
    assert end.value.code == 0 and len(lines) == 4
    for line, name in zip(lines, ("fg_wsd-seed4", "vanilla_wsd-seed4", "fg_wsd-seed5", "vanilla_wsd-seed5")):
        assert f"paths.root=/nowhere paths.runs=/nowhere/runs/ablation/fg_wsd run_name={name} resume=true" in line
        assert "stage.total_tokens=1000" in line


@pytest.mark.parametrize(
    "text, message",
    [
        ("arms: {a: []}", "question Missing mandatory value"),
        ("{question: x, common: [], arms: {}, measure: {kind: accuracy, sources: [a]}}", "arms is empty"),
        ("{question: x, common: [], arms: {a: []}, measure: {kind: speed, sources: [a]}}", "allowed: accuracy, perp"),
        ("{question: x, common: [], arms: {a: []}, measur: 1}", "measur"),
    ],
)
def test_a_file_that_is_no_ablation(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        ablate.read_ablation(str(tmp_path / "x.yaml"))


def test_a_seed_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="--seeds 0 1 0: a seed is there twice"):
        ablate.ablate("dpd", [0, 1, 0], jobs=1, extra=[])


def test_an_unknown_name_lists_those_that_exist() -> None:
    with pytest.raises(ValueError, match=r"no ablation 'dqd'; there are .*fg_wsd"):
        ablate.read_ablation("dqd")


def test_a_run_is_read_before_its_first_step_and_at_its_end(tmp_path: Path) -> None:
    phases = {when: {"sources": {"sort": {"each": each}}} for when, each in (("before", [0, 0]), ("end", [0.5, 1]))}
    (tmp_path / "accuracy.json").write_text(json.dumps(phases))
    before, after = ablate.read_accuracy(tmp_path, "sort")
    assert after.tolist() == [0.5, 1] and before.tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"measure\.sources names 'maths'; .* measured sort"):
        ablate.read_accuracy(tmp_path, "maths")
    for version, values in enumerate(([5.0, 4.0], [3.0])):  # a run that was resumed once
        folder = tmp_path / f"metrics/version_{version}"
        folder.mkdir(parents=True)
        lines = [f"{2 * version + i},{value}" for i, value in enumerate(values)]
        (folder / "metrics.csv").write_text("\n".join(["tokens_seen,val/perplexity/docs", *lines]))
    assert ablate.read_perplexity(tmp_path, "docs").tolist() == [3.0]
    with pytest.raises(ValueError, match="logged no val/perplexity/code"):
        ablate.read_perplexity(tmp_path, "code")


@pytest.mark.runs
@pytest.mark.parametrize("name", ablate.shipped_ablations())
def test_every_arm_that_is_shipped_composes(name: str) -> None:
    for run in ablate.plan_runs(name, ablate.read_ablation(name), [0], [], "outputs"):
        composed(*run.overrides)


def test_both_plans_of_fg_wsd_see_as_many_tokens_of_every_source() -> None:
    seen: dict[str, dict[str, float]] = {}
    for run in ablate.plan_runs("fg_wsd", ablate.read_ablation("fg_wsd"), [0], [], "outputs"):
        plan = plan_of(composed(*run.overrides).stage).in_whole_steps()
        sources = {name for phase in plan.phases for name in phase.mixture}
        seen[run.arm] = {s: sum(p.tokens * p.mixture.get(s, 0) for p in plan.phases) for s in sources}
    for source, tokens in seen["fg_wsd"].items():
        assert seen["vanilla_wsd"][source] == pytest.approx(tokens, rel=0.005), source
    fg_wsd, vanilla = (sum(of_arm.values()) for of_arm in seen.values())
    assert fg_wsd == pytest.approx(vanilla)


def test_the_looped_arm_costs_as_many_flops() -> None:
    flops = {}
    for run in ablate.plan_runs("loops", ablate.read_ablation("loops"), [0], [], "outputs"):
        config = composed(*run.overrides)
        shape, plan = ModelShape(**asdict(config.model)), plan_of(config.stage).in_whole_steps()
        flops[run.arm] = sum(phase.tokens * shape.flops_per_token(phase.seq_len) for phase in plan.phases)
    plain, looped = flops.values()
    assert looped == pytest.approx(plain, rel=0.01)
