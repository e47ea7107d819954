"""What all pictures share: matplotlib without a screen, and one palette."""

from __future__ import annotations

from typing import Any

# Paul Tol's "bright", with grey as the seventh, and one of his "muted": colour-blind safe.
COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#994455")
GREY = COLORS[6]


def pyplot() -> Any:
    """Import matplotlib's pyplot with the backend that only writes files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
