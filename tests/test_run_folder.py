"""The metrics that a run left in its folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np

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
