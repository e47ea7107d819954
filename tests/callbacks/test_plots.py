from __future__ import annotations

import numpy as np

from callbacks.plots import _smooth
from nb_lightning.phases import LearningRate, Phase, PhasePlan


def test_curves_are_smoothed_inside_phases_only() -> None:
    """A loss that jumps at a boundary is not shown as if it had risen before."""
    phases = (Phase(name, 40, LearningRate(1e-3), {"a": 1.0}, 4, 1e4, 4, 1) for name in ("one", "two", "three"))
    x = np.arange(4.0, 81.0, 4)  # the third has not begun
    y = np.where(x <= 40, 1.0, 5.0)
    assert np.array_equal(_smooth(x, y, PhasePlan(tuple(phases))), y)
    rising = _smooth(x, x, PhasePlan((Phase("one", 80, LearningRate(1e-3), {"a": 1.0}, 4, 1e4, 4, 1),)))
    assert np.array_equal(rising[4:-4], x[4:-4]) and rising[0] == x[:5].mean()
