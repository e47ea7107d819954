"""Draw two pictures in the run folder: `plan.png`, what was planned, and `curves.png`, what happened."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np

from callbacks.progress import human
from nb_lightning.phase_callback import StageModule
from nb_lightning.phases import PhasePlan
from nb_lightning.plotting import COLORS, pyplot
from nb_lightning.run_folder import CURVES_PICTURE, PLAN_PICTURE, read_metrics


@dataclass(frozen=True)
class _UpperPanels:
    """What the upper two panels show: one metric of all sources together, one metric of each source.

    Attributes:
        source_prefix: with a source's name it is the name of that source's metric.
        marker: of the points of the right panel; without one, its lines are smoothed.
    """

    metric: str
    title: str
    source_prefix: str
    source_title: str
    marker: str = "o"


UPPER_PANELS = (  # the first whose source metrics were logged is drawn
    _UpperPanels("train/loss", "training loss (nats per token)", "val/perplexity/", "held-out perplexity"),
    _UpperPanels("train/loss", "training loss", "val/margin/", "held-out reward margin"),
    _UpperPanels("train/loss", "training loss", "val/accuracy/", "held-out comparisons judged rightly"),
    _UpperPanels("rl/reward", "mean reward of a step's completions", "rl/reward/", "mean reward of each source", ""),
)


class Plots(pl.Callback):
    """Draws both pictures when training ends, finished or stopped; `train.py dry_run=true` draws the plan too."""

    def on_train_end(self, trainer: pl.Trainer, module: StageModule) -> None:
        self._draw(trainer, module)

    def on_exception(self, trainer: pl.Trainer, module: StageModule, exception: BaseException) -> None:
        if module.tokens_seen > 0:
            self._draw(trainer, module)

    def _draw(self, trainer: pl.Trainer, module: StageModule) -> None:
        if not trainer.is_global_zero:
            return
        run = Path(trainer.default_root_dir)
        for logger in trainer.loggers:
            logger.save()
        plot_plan(module.plan, run / PLAN_PICTURE)
        plot_curves(module.plan, read_metrics(run), run / CURVES_PICTURE)


def plot_plan(plan: PhasePlan, path: Path) -> None:
    """Draw the learning rate over tokens above the stacked mixture, labelled with context and RoPE base."""
    plt = pyplot()
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(10, 5.6), sharex=True, height_ratios=(3, 2), constrained_layout=True
    )
    tokens, rates = [], []
    for index, phase in enumerate(plan.phases):
        start = plan.start_of(index)
        progress = np.linspace(0, 1, 100)
        tokens.append(start + progress * phase.tokens)
        rates.append([phase.lr.at(x) for x in progress])
    top.plot(np.concatenate(tokens), np.concatenate(rates), color="#222222", linewidth=2)
    top.set_ylabel("learning rate")
    top.set_ylim(0, max(map(max, rates)) * 1.35)
    names = _sources(plan)
    edges = np.repeat([0, *plan.ends], 2)[1:-1]
    shares = [np.repeat([phase.mixture.get(name, 0.0) for phase in plan.phases], 2) for name in names]
    colors = [COLORS[i % len(COLORS)] for i in range(len(names))]
    bottom.stackplot(edges, shares, labels=names, colors=colors, alpha=0.85, linewidth=0)
    bottom.set_ylabel("mixture")
    bottom.set_ylim(0, 1)
    bottom.set_xlim(0, plan.total_tokens)
    bottom.legend(loc="upper center", bbox_to_anchor=(0.5, -0.28), ncols=min(len(names), 6), frameon=False)
    _mark_phases(plan, (top, bottom), labelled=top)
    _token_axis(bottom)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_curves(plan: PhasePlan, metrics: dict[str, np.ndarray], path: Path) -> None:
    """Draw loss (in RL the reward), the sources' held-out metrics, their shares of the tokens, and the gradient norm.

    Args:
        metrics: {name: [n, 2] of (tokens_seen, value)}.
    """
    upper = next(
        (panels for panels in UPPER_PANELS if any(name.startswith(panels.source_prefix) for name in metrics)),
        UPPER_PANELS[0],
    )
    plt = pyplot()
    figure, axes = plt.subplots(2, 2, figsize=(12, 7), sharex=True, constrained_layout=True)
    (loss, held_out), (shares, norm) = axes
    loss.set_title(upper.title, fontsize=10, loc="left")
    held_out.set_title(upper.source_title, fontsize=10, loc="left")
    shares.set_title("share of each source in the steps since the point before", fontsize=10, loc="left")
    norm.set_title("gradient norm before clipping", fontsize=10, loc="left")
    for axis, name in ((loss, upper.metric), (norm, "optim/grad_norm")):
        if name in metrics:
            x, y = metrics[name].T
            axis.plot(x, y, color=COLORS[0], alpha=0.35, linewidth=1)
            axis.plot(x, _smooth(x, y, plan), color=COLORS[0], linewidth=1.8)
    if upper.metric == "train/loss" and len(metrics.get("train/loss", ())) > 20:
        loss.set_ylim(top=np.quantile(metrics["train/loss"][:, 1], 0.98) * 1.1)
    norm.set_yscale("log")
    shares.set_ylim(-0.03, 1.03)
    for axis, prefix, marker in ((held_out, upper.source_prefix, upper.marker), (shares, "data/share/", "")):
        for i, name in enumerate(_sources(plan)):
            if f"{prefix}{name}" in metrics:
                x, y = metrics[f"{prefix}{name}"].T
                y = y if marker or axis is shares else _smooth(x, y, plan)
                axis.plot(x, y, marker=marker, markersize=4, color=COLORS[i % len(COLORS)], label=name)
        if axis.lines:
            axis.legend(frameon=False, fontsize=8)
    if held_out.lines and upper is UPPER_PANELS[0]:
        held_out.set_yscale("log")
    _mark_phases(plan, axes.flat, labelled=None)
    for axis in axes[1]:
        _token_axis(axis)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _sources(plan: PhasePlan) -> list[str]:
    """List the sources in the order of their first use, so that a source has one colour in both pictures."""
    return list(dict.fromkeys(name for phase in plan.phases for name in phase.mixture))


def _smooth(x: np.ndarray, y: np.ndarray, plan: PhasePlan, window: int = 9) -> np.ndarray:
    """Average over a centred window of points, within each phase, so that a jump at a boundary stays one."""
    smooth = []
    for values in np.split(y, np.searchsorted(x, plan.ends[:-1], side="right")):
        total = np.concatenate([[0.0], np.cumsum(values)])
        i = np.arange(len(values))
        low, high = np.maximum(i - window // 2, 0), np.minimum(i + window // 2 + 1, len(values))
        smooth.append((total[high] - total[low]) / (high - low))
    return np.concatenate(smooth)


def _mark_phases(plan: PhasePlan, axes: Any, labelled: Any) -> None:
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        for end in plan.ends[:-1]:
            axis.axvline(end, color="#888888", linestyle=":", linewidth=1)
    if labelled is None:
        return
    for index, phase in enumerate(plan.phases):
        if phase.tokens < 0.12 * plan.total_tokens:  # too narrow to write in
            continue
        middle = plan.start_of(index) + phase.tokens / 2
        facts = f"{human(phase.tokens)} tokens\n{phase.seq_len} ctx · θ {phase.rope_theta:g}"
        text = f"{phase.name.replace('_', ' ')}\n{facts}"
        labelled.text(middle, labelled.get_ylim()[1] * 0.98, text, ha="center", va="top", fontsize=8)


def _token_axis(axis: Any) -> None:
    axis.xaxis.set_major_formatter(lambda value, _: human(value))
    axis.set_xlabel("tokens seen")
    axis.set_xlim(left=0)
