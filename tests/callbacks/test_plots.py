from __future__ import annotations

from pathlib import Path

import numpy as np

from callbacks.plots import _smooth
from nb_lightning.phases import LearningRate, Phase, PhasePlan
from nb_lightning.run_folder import read_metrics


def test_metrics_of_a_restarted_run_are_one_curve(tmp_path: Path) -> None:
    first, second = (tmp_path / "metrics" / f"version_{n}" for n in (0, 1))
    first.mkdir(parents=True), second.mkdir()
    (first / "metrics.csv").write_text(
        "step,tokens_seen,train/loss,val/perplexity/a\n0,10,3.0,\n1,20,2.0,\n1,20,,9.0\n2,30,1.5,\n"
    )
    (second / "metrics.csv").write_text("step,tokens_seen,train/loss\n2,30,1.6\n3,40,1.0\n")
    metrics = read_metrics(tmp_path)
    assert np.array_equal(metrics["train/loss"], [[10, 3.0], [20, 2.0], [30, 1.6], [40, 1.0]])
    assert np.array_equal(metrics["val/perplexity/a"], [[20, 9.0]])


def test_curves_are_smoothed_inside_phases_only() -> None:
    """A loss that jumps at a boundary is not shown as if it had risen before."""
    phases = (Phase(name, 40, LearningRate(1e-3), {"a": 1.0}, 4, 1e4, 4, 1) for name in ("one", "two", "three"))
    x = np.arange(4.0, 81.0, 4)  # the third has not begun
    y = np.where(x <= 40, 1.0, 5.0)
    assert np.array_equal(_smooth(x, y, PhasePlan(tuple(phases))), y)
    rising = _smooth(x, x, PhasePlan((Phase("one", 80, LearningRate(1e-3), {"a": 1.0}, 4, 1e4, 4, 1),)))
    assert np.array_equal(rising[4:-4], x[4:-4]) and rising[0] == x[:5].mean()
