"""The picture of the result: how often each stage's model is right on held-out tasks."""

from __future__ import annotations

from pathlib import Path

from nb_lightning.plotting import COLORS, pyplot
from nb_lightning.report.results import ALL, Results


def plot_accuracy(results: Results, path: Path) -> None:
    """Draw avg@k over the phases of the recipe: thin lines for families, a thick one with 95 % intervals for all.

    Draws nothing where only the teacher was measured.
    """
    shown = [m for m in results.measurements if m.run != "teacher"]
    if not shown:
        return
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(10, 4.6), constrained_layout=True)
    for number, family in enumerate(results.families):
        points = [(x, a) for x, m in enumerate(shown) if (a := results.accuracy(m, family)) is not None]
        places, percents = [x for x, _ in points], [100 * accuracy.mean for _, accuracy in points]
        if family != ALL:
            color = COLORS[number % len(COLORS)]
            label = family.replace("_", " ")
            axis.plot(places, percents, color=color, linewidth=1.3, marker="o", markersize=3.5, label=label)
            continue
        axis.plot(places, percents, color="#222222", linewidth=2.6, marker="o", markersize=6, label="all", zorder=5)
        for x, accuracy in points:
            low, high = accuracy.interval or (accuracy.mean, accuracy.mean)
            axis.vlines(x, 100 * low, 100 * high, color="#222222", linewidth=1.6, zorder=5)
            label = f"{100 * accuracy.mean:.0f}"
            axis.annotate(label, (x, 100 * high), (0, 6), textcoords="offset points", weight="bold", ha="center")
    axis.set_xticks(range(len(shown)), [m.title.replace(": ", "\n") for m in shown])
    axis.set_xlim(-0.3, len(shown) - 0.6)
    axis.set_ylim(-3, 103)
    axis.set_ylabel(f"held-out tasks right, avg@{shown[0].k} in %")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#dddddd", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
