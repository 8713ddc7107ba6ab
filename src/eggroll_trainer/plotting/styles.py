"""Colours and lines that can be distinguished on light and dark pages, in print, and by colour-blind readers."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

Style = Literal["light", "dark", "print"]
STYLES: tuple[str, ...] = get_args(Style)

# Solid, dashed, dash-dotted, dotted, long dashes, dash-dot-dotted: lines differ even without colours.
LINES: tuple[Any, ...] = (
    "-",
    (0, (5, 2)),
    (0, (6, 2, 1, 2)),
    (0, (1, 1.5)),
    (0, (10, 3)),
    (0, (4, 1.5, 1, 1.5, 1, 1.5)),
)


class Look(NamedTuple):
    """The colours of a style.

    Attributes:
        page: Colour of the background.
        ink: Colour of text and axes.
        grid: Colour of the grid.
        lines: Colours of curves, in their order.
    """

    page: str
    ink: str
    grid: str
    lines: tuple[str, ...]


# Based on the palette of Okabe and Ito. Colours were moved to maximise the smallest distance between two of them for
# readers without red or green receptors, with a contrast of at least 3 to the page.
LOOKS: dict[str, Look] = {
    "light": Look("#ffffff", "#1a1a1a", "#d9d9d9", ("#0072b2", "#d55e00", "#049f4e", "#761f64", "#4f3600", "#000000")),
    "dark": Look("#14171c", "#e8e8e8", "#3a3f47", ("#56b4e9", "#ff9a4d", "#2cff93", "#cd7198", "#c0b600", "#f9f6f6")),
    "print": Look("#ffffff", "#000000", "#cccccc", ("#000000", "#5a5a5a", "#000000", "#5a5a5a", "#000000", "#5a5a5a")),
}


def parameters(style: str) -> dict[str, Any]:
    """Return matplotlib's parameters for a style.

    Raises:
        ValueError: There is no such style.
    """
    if style not in LOOKS:
        raise ValueError(f"style must be one of {', '.join(map(repr, STYLES))}, got {style!r}")
    look = LOOKS[style]
    faces = ("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor")
    inks = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "axes.titlecolor")
    return {
        **dict.fromkeys(faces, look.page),
        **dict.fromkeys(inks, look.ink),
        "grid.color": look.grid,
        "legend.edgecolor": look.grid,
        # In points of the printed size, as a figure is as wide as a page's text.
        "font.size": 9,
        "axes.titlesize": 9,
        "lines.linewidth": 1.6,
        # Keep text as text, so that it can be searched.
        "svg.fonttype": "none",
        "savefig.dpi": 150,
    }
