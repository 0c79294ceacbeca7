"""The style of all pictures: legible 350 pixels wide, with a background of their own.

A picture with a background can be read on a light and on a dark page.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

__all__ = ["DARK", "LIGHT", "LINES", "MARKERS", "Theme", "drawing", "to_png"]

LINES, MARKERS = ("-", "--", ":", "-."), ("o", "s", "^", "D", "v", "P")


@dataclass(frozen=True)
class Theme:
    """The colours of a picture; `series` is for the colour-blind too (Okabe and Ito)."""

    paper: str
    ink: str
    faint: str
    series: tuple[str, ...]


LIGHT = Theme(
    "#ffffff", "#1c2024", "#7b838b",
    ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7B61A8", "#8C6D46"),
)  # fmt: skip
DARK = Theme(
    "#16191d", "#e4e7ea", "#8d959d",
    ("#4FA8DC", "#FF8A4C", "#2FC79A", "#E79BC5", "#F2B632", "#9AD3F5", "#B39DDB", "#C9A66B"),
)  # fmt: skip


@contextmanager
def drawing(theme: Theme = LIGHT, height: float = 4.0, width: float = 6.0) -> Iterator[Any]:
    """Yield a new matplotlib figure; what is drawn within the context has the style.

    The figure is 1,200 pixels wide at the default width. On a phone it is about 350 wide: its text
    is then 9 to 10 pixels high.

    Args:
        theme: The colours.
        height: In inches, 200 pixels each.
        width: In inches.
    """
    # Imported here because they are slow, and `--help` does not need them.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: Any = {
        "axes.axisbelow": True,
        "axes.edgecolor": theme.faint,
        "axes.facecolor": theme.paper,
        "axes.grid": True,
        "axes.labelcolor": theme.ink,
        "axes.labelsize": 12,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlecolor": theme.ink,
        "axes.titlelocation": "left",
        "axes.titlesize": 12,
        "figure.constrained_layout.use": True,
        "figure.dpi": 200,
        "figure.facecolor": theme.paper,
        "font.size": 11.5,
        "grid.alpha": 0.25,
        "grid.color": theme.faint,
        "legend.fontsize": 11,
        "legend.frameon": False,
        "savefig.facecolor": theme.paper,
        "text.color": theme.ink,
        "text.parse_math": False,  # a name may contain a $
        "xtick.color": theme.ink,
        "ytick.color": theme.ink,
    }
    with rc_context(style):
        yield Figure(figsize=(width, height))


def to_png(figure: Any) -> bytes:
    """Return a figure as PNG; call it within `drawing`."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
