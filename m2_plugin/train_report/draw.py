"""Draw the curves of runs on common axes, in light or dark colours."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m2_plugin.pictures import LIGHT, LINES, MARKERS, Theme, drawing, to_png
from m2_plugin.train_report.readers import Series
from m2_plugin.train_report.runs import (
    AXES,
    GPU_RESERVED,
    TRAIN,
    Run,
    common_rate,
    default_span,
    loss_unit,
    memory_series,
    running_mean,
    tokenizers_differ,
)

__all__ = ["PANELS", "draw"]

DRAWN = 2000  # points of a line; a picture is 1,200 pixels wide
End = tuple[float, float, str]  # last x of a curve, its value there, its colour


class _Panel:
    """Axes, with a colour for each run and the chosen x axis."""

    def __init__(
        self,
        figure: Any,
        runs: Sequence[Run],
        axis: str,
        theme: Theme,
        smoothing: int | None = None,
    ):
        from matplotlib import colormaps

        self.figure, self.axes = figure, figure.add_subplot()
        self.runs, self.axis, self.theme, self.smoothing = runs, axis, theme, smoothing
        self.ends: list[End] = []
        self.colors: list[Any] = list(theme.series[: len(runs)])
        lengths = [sum(run.ends) - sum(wall for wall, _ in run.starts) for run in runs]
        # The quickstart takes minutes, a pretraining days.
        self.in_minutes = axis == "time" and max(lengths) < 2 * 3600
        if len(runs) > len(theme.series):
            self.colors = list(colormaps["turbo"](np.linspace(0.08, 0.92, len(runs))))

    @property
    def alone(self) -> bool:
        return len(self.runs) == 1

    def x(self, run: Run, series: Series) -> NDArray[np.float64] | None:
        """Return the x values of a curve."""
        x = run.x(series, self.axis)
        return x * 60 if x is not None and self.in_minutes else x

    def line(self, run: Run, series: Series, values: Any = None, **style: Any) -> bool:
        """Draw a curve; return false if the run has no values for the x axis."""
        x = self.x(run, series)
        if x is None:
            return False
        y = series.values if values is None else values
        self.axes.plot(*_thin(x, y), **style)
        return True

    def finish(self, ylabel: str, missing: str, title: str = "") -> None:
        """Label the axes; if nothing was drawn, name the callback that would log it."""
        axes, theme = self.axes, self.theme
        if not axes.lines:
            axes.set(xticks=[], yticks=[])
            axes.text(
                0.5, 0.5, f"not logged\n\n{missing}", transform=axes.transAxes,
                ha="center", va="center", color=theme.faint, fontsize=12,
            )  # fmt: skip
            axes.spines[:].set_visible(False)
            return
        if self.alone or title:
            axes.set_title(title or self.runs[0].name)
        label = AXES[self.axis][0]
        label = label.replace("hours", "minutes") if self.in_minutes else label
        axes.set(xlabel=label, ylabel=ylabel)
        axes.margins(x=0.02)
        if self.axis == "tokens":
            axes.xaxis.set_major_formatter(_engineering)
        else:
            axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.10g}")
        axes.locator_params(axis="x", nbins=6)  # long numbers would touch each other
        self._add_legend()
        if len(self.ends) <= 6:
            _annotate_ends(axes, self.ends)

    def _add_legend(self) -> None:
        labels = self.axes.get_legend_handles_labels()[1]
        if not labels:
            return
        if len(labels) <= 6 and max(map(len, labels)) <= 34:
            paper = self.theme.paper
            self.axes.legend(frameon=True, facecolor=paper, edgecolor="none", framealpha=0.9)
            return
        # It would cover the curves: add a line below them for each row of the legend.
        columns = 2 if max(map(len, labels)) <= 30 else 1
        rows = -(-len(labels) // columns)
        self.figure.set_figheight(self.figure.get_figheight() + 0.22 * rows)
        self.figure.legend(loc="outside lower left", ncols=columns)


def _annotate_ends(axes: Any, ends: Iterable[End]) -> None:
    """Write the final values to the right of the axes, without overlaps."""
    low, high = axes.get_ylim()
    below = -math.inf
    for x, value, color in sorted(ends, key=lambda end: end[1]):
        height = max(value, below + 0.05 * (high - low))  # a line of text is 5 % of the axis
        below = height
        axes.annotate(
            f"{value:.3f}",
            (x, value),
            xytext=(1.01, height),
            textcoords=("axes fraction", "data"),
            va="center",
            color=color,
        )


def _engineering(x: float, _: float) -> str:
    for size, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= size:
            return f"{x / size:g}{name}"
    return f"{x:g}"


def _thin(
    x: NDArray[np.float64], y: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Reduce a long curve to the lowest and highest point of each interval, to keep peaks."""
    if len(x) <= DRAWN:
        return x, y
    edges = np.linspace(0, len(x), DRAWN // 2 + 1).astype(int)
    keep = {0, len(x) - 1}
    for a, b in zip(edges[:-1], edges[1:], strict=True):
        keep |= {a + int(np.argmin(y[a:b])), a + int(np.argmax(y[a:b]))}
    index = np.array(sorted(keep))
    return x[index], y[index]


def _draw_loss(panel: _Panel) -> None:
    labels: list[str] = []  # of evaluations
    for run, color in zip(panel.runs, panel.colors, strict=True):
        unnamed = not _draw_train(panel, run, color)
        for label, series in run.evals().items():
            if label not in labels:
                labels.append(label)
            _draw_eval(panel, run, series, labels.index(label), color, unnamed)
            unnamed = False
    if panel.axes.lines:
        _name_evals(panel, labels)
        _draw_baselines(panel)
    unit = loss_unit(panel.runs)
    panel.finish(
        f"loss ({unit})" if unit else "loss",
        "Composer logs it to every logger;\nthe callback loss_curve writes it too.",
        "Different tokenizers: losses per token do not compare"
        if tokenizers_differ(panel.runs)
        else "",
    )


def _name_evals(panel: _Panel, labels: Sequence[str]) -> None:
    """Explain the curves of the evaluations in the legend.

    With several runs, a colour means a run: one grey entry explains the dashed lines.
    """
    for i, label in enumerate(labels):
        shade = panel.theme.series[(i + 1) % len(panel.theme.series)]
        panel.axes.plot(
            [], [], color=shade if panel.alone else panel.theme.faint, markersize=4, linewidth=1.2,
            linestyle="-" if panel.alone else "--", marker=MARKERS[i % len(MARKERS)],
            label="evaluation" + (f" ({label})" if label != "eval" else ""),
        )  # fmt: skip


def _draw_baselines(panel: _Panel) -> None:
    """Draw the losses of the callback `loss_curve`'s simple models, grey if all runs have them."""
    found: dict[tuple[str, str], list[int]] = {}  # name, value: the runs
    for i, run in enumerate(panel.runs):
        for tag in run.series:
            if tag.startswith("baseline/") and (known := run.get(tag)) is not None:
                name = tag.removeprefix("baseline/").replace("_", " ")
                found.setdefault((name, f"{known.values[-1]:.3f}"), []).append(i)
    names = list(dict.fromkeys(name for name, _ in found))
    for (name, value), owners in found.items():
        common = len(owners) == len(panel.runs)
        whose = "" if common else f" of {', '.join(panel.runs[i].name for i in owners)}"
        panel.axes.axhline(
            float(value),
            color=panel.theme.faint if common else panel.colors[owners[0]],
            linestyle=LINES[1:][names.index(name) % 3],
            linewidth=1.2,
            label=f"{name}{whose}: {value}",
        )


def _draw_train(panel: _Panel, run: Run, color: Any) -> bool:
    train = run.get(TRAIN)
    if train is None or (x := panel.x(run, train)) is None:
        return False
    smooth = running_mean(train.values, panel.smoothing or default_span(len(train)))
    # Several runs are paler, so that their means can be seen.
    panel.line(run, train, color=color, linewidth=0.6, alpha=0.4 if panel.alone else 0.25)
    name = "training, smoothed" if panel.alone else run.name
    panel.line(run, train, smooth, color=color, linewidth=1.6, label=name)
    panel.ends.append((x[-1], smooth[-1], color))
    return True


def _draw_eval(
    panel: _Panel, run: Run, series: Series, number: int, color: Any, unnamed: bool
) -> None:
    shade = panel.theme.series[(number + 1) % len(panel.theme.series)] if panel.alone else color
    drawn = panel.line(
        run, series, color=shade, linewidth=1.2, linestyle="-" if panel.alone else "--",
        marker=MARKERS[number % len(MARKERS)], markersize=4,
        markevery=max(1, min(len(series), DRAWN) // 60),
        label=run.name if unnamed and not panel.alone else None,
    )  # fmt: skip
    if drawn and panel.alone:
        panel.ends.append((0, series.values[-1], shade))


def _draw_learning_rate(panel: _Panel) -> None:
    groups: list[str] = []
    for run, color in zip(panel.runs, panel.colors, strict=True):
        for j, (group, series) in enumerate(run.learning_rates().items()):
            shade = panel.theme.series[j % len(panel.theme.series)] if panel.alone else color
            groups += [group] if group not in groups else []
            name = group if panel.alone else run.name if j == 0 else None
            panel.line(run, series, color=shade, linewidth=1.6, label=name,
                       linestyle=LINES[groups.index(group) % len(LINES)])  # fmt: skip
    if len(groups) > 1 and not panel.alone and panel.axes.lines:
        for group, line in zip(groups, LINES, strict=False):
            panel.axes.plot([], [], color=panel.theme.faint, linestyle=line, label=group)
    if panel.axes.lines:
        panel.axes.set_ylim(bottom=0)
        panel.axes.yaxis.set_major_formatter(lambda y, _: f"{y:.6g}")
    panel.finish("learning rate", "The callback lr_monitor logs it.")


def _draw_throughput(panel: _Panel) -> None:
    kind = common_rate(panel.runs)
    highest = 0.0
    for run, color in zip(panel.runs, panel.colors, strict=True):
        series, device = run.rate(kind), run.rate(kind, device=True)
        if series is None:
            continue
        median = float(np.median(series.values))
        name = f"median {median:,.4g}" if median < 1000 else f"median {median:,.0f}"
        if device is not None and (each := float(np.median(device.values))) < 0.99 * median:
            name += f", {each:,.4g} per device" if each < 1000 else f", {each:,.0f} per device"
        values = series.values
        if len(series) > DRAWN:  # thousands of values look like a band
            panel.line(run, series, color=color, linewidth=0.6, alpha=0.4)
            values = running_mean(values, default_span(len(series)))
        panel.line(run, series, values, color=color, linewidth=1.6,
                   label=name if panel.alone else f"{run.name}: {name}")  # fmt: skip
        # A single outlier must not flatten the rest.
        highest = max(highest, float(np.percentile(series.values, 99.5)))
    if panel.axes.lines:
        panel.axes.set_ylim(0, 1.15 * highest)
        panel.axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.10g}")
    panel.finish(f"{kind} per second", "The callback speed_monitor logs it.")


def _draw_memory(panel: _Panel) -> None:
    kinds = set()
    for run, color in zip(panel.runs, panel.colors, strict=True):
        series, kind = memory_series(run)
        if series is None:
            continue
        kinds.add(kind)
        what = "peak allocated" if kind == "GPU" else "in use, by all programs"
        highest = f"{what}: at most {series.values.max():.3g} GB"
        label = highest if panel.alone else f"{run.name}: at most {series.values.max():.3g} GB"
        panel.line(run, series, color=color, linewidth=1.6, label=label)
        reserved = run.get(GPU_RESERVED)
        if kind == "GPU" and reserved is not None and panel.alone:
            label = f"peak reserved: at most {reserved.values.max():.3g} GB"
            panel.line(run, reserved, color=color, linewidth=1.2, linestyle="--", label=label)
    if panel.axes.lines:
        panel.axes.set_ylim(0, 1.15 * panel.axes.get_ylim()[1])
    of = {"GPU": "peak GPU memory", "machine": "memory of the machine"}
    panel.finish(
        f"{of[kinds.pop()] if len(kinds) == 1 else 'memory'} (GB)",
        "The callback memory_monitor logs a GPU's,\nsystem_metrics_monitor that of the machine.",
    )


# File name: title on the page, and the function that draws it.
PANELS: dict[str, tuple[str, Callable[[_Panel], None]]] = {
    "loss": ("Loss", _draw_loss),
    "learning_rate": ("Learning rate", _draw_learning_rate),
    "throughput": ("Throughput", _draw_throughput),
    "memory": ("Memory", _draw_memory),
}


def draw(
    name: str,
    runs: Sequence[Run],
    axis: str = "batch",
    theme: Theme = LIGHT,
    smoothing: int | None = None,
) -> bytes:
    """Draw one of `PANELS`.

    Args:
        name: The name of the panel.
        runs: The runs, a colour each.
        axis: One of `AXES`; runs without it are left out.
        theme: The colours.
        smoothing: The span, in points, of the training loss's running mean; by default 1/50 of
            the points.

    Returns:
        A PNG.
    """
    with drawing(theme) as figure:
        PANELS[name][1](_Panel(figure, runs, axis, theme, smoothing))
        return to_png(figure)
