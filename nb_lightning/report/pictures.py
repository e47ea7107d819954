"""The picture of the result: how often each stage's model is right on held-out tasks."""

from __future__ import annotations

from pathlib import Path

from nb_lightning.report.results import ALL, Results

COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")  # Tol, colour-blind safe


def plot_accuracy(results: Results, path: Path) -> None:
    """avg@k of each family, thin, and of all tasks, with its 95 % interval, over the phases of the recipe."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [m for m in results.measurements if m.run != "teacher"]
    if not shown:
        return
    figure, axis = plt.subplots(figsize=(10, 4.6), constrained_layout=True)
    for number, family in enumerate(results.families):
        points = [(x, s) for x, m in enumerate(shown) if (s := results.score(m, family)) is not None]
        x, y = [p[0] for p in points], [100 * p[1].mean for p in points]
        if family != ALL:
            color = COLORS[number % len(COLORS)]
            axis.plot(x, y, color=color, linewidth=1.3, marker="o", markersize=3.5, label=family.replace("_", " "))
            continue
        axis.plot(x, y, color="#222222", linewidth=2.6, marker="o", markersize=6, label="all", zorder=5)
        for place, score in points:
            low, high = score.interval or (score.mean, score.mean)
            axis.vlines(place, 100 * low, 100 * high, color="#222222", linewidth=1.6, zorder=5)
            label = f"{100 * score.mean:.0f}"
            axis.annotate(label, (place, 100 * high), (0, 6), textcoords="offset points", weight="bold", ha="center")
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
