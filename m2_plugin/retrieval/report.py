"""The table and the picture of a retrieval evaluation."""

from collections.abc import Mapping
from typing import Any

from m2_plugin.pictures import LIGHT, drawing, to_png

__all__ = ["MEAN", "draw", "table"]

MEAN = "mean of the data sets"

Results = Mapping[str, Mapping[str, Mapping[str, float]]]  # data set → system → measure → value


def table(results: Mapping[str, Any]) -> str:
    """Return the table for a terminal, with notes on what was measured.

    Args:
        results: The content of `results.json`.
    """
    found: Results = results["results"]
    lines = [["", *next(iter(next(iter(found.values())).values()))]]
    for name, systems in found.items():
        for system, values in systems.items():
            lines.append([f"{name}, {system}", *(f"{value:.4f}" for value in values.values())])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = "".join(
        f"{line[0]:<{widths[0]}}  "
        + "  ".join(f"{cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True))
        + "\n"
        for line in lines
    )
    return f"{text}\n{_notes(results)}\n"


def _notes(results: Mapping[str, Any]) -> str:
    notes = (
        f"{results['queries']:,} queries, {results['documents']:,} documents; the best "
        f"{results['top_k']:,} of each query are scored. Similarity: {results['similarity']}."
    )
    if results["max_length"]:
        notes += f" The model reads the first {results['max_length']:,} tokens of a text."
    if not results["own_id_is_a_hit"]:
        notes += " A document with the query's own id is no hit (BEIR's rule)."
    for kind in ("query", "document"):
        if prompt := results[f"{kind}_prompt"]:
            notes += f" Prompt of a {kind}: {prompt!r}."
    return notes


def draw(results: Results) -> bytes:
    """Draw a bar for each system and measure; of several data sets, the first measure of each.

    Returns:
        A PNG.
    """
    first = next(iter(results.values()))
    systems, names = list(first), list(next(iter(first.values())))
    if len(results) == 1:
        title, groups = next(iter(results)), {n: [first[s][n] for s in systems] for n in names}
    else:
        title = names[0]
        groups = {d: [found[s][title] for s in systems] for d, found in results.items()}
    thick = 0.8 / len(systems)
    with drawing(height=1.2 + 0.28 * len(systems) * len(groups)) as figure:
        axes = figure.add_subplot()
        for i, system in enumerate(systems):
            heights = [group + (i - (len(systems) - 1) / 2) * thick for group in range(len(groups))]
            values = [values[i] for values in groups.values()]
            bars = axes.barh(heights, values, thick * 0.92, color=LIGHT.series[i], label=system)
            axes.bar_label(bars, fmt="%.3f", padding=3)
        axes.set_yticks(range(len(groups)), list(groups))
        axes.invert_yaxis()
        axes.set_xlim(0, 1.15)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
        axes.grid(axis="y", visible=False)
        axes.set_title(title)
        figure.legend(loc="outside upper right", ncols=len(systems))
        return to_png(figure)
