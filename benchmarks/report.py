"""Tables and plots of results."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def markdown(results: dict[str, Any]) -> str:
    """Return a page with the surroundings and a table for each suite."""
    around = results["surroundings"]
    versions = ", ".join(f"{name} {version}" for name, version in around["versions"].items())
    where = around["accelerator"] or f"{around['cores']} cores of {around['processor']}, {around['threads']} threads"
    lines = [
        # For the site: guides come first in its search.
        *("---", "search:", "  exclude: true", "---", ""),
        f"# Benchmarks of {around['date']}",
        "",
        f"    {around['command']}",
        "",
        f"{where}; {around['system']}, Python {around['python']}, {versions}; commit {around['commit']}.",
        "",
    ]
    for table in results["suites"].values():
        lines += [f"## {table['title']}", "", table["text"], "", markdown_table(table), ""]
    return "\n".join(lines)


def markdown_table(table: dict[str, Any]) -> str:
    """Return the rows of a suite as a Markdown table."""
    columns = table["columns"]
    rows = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    rows += [f"| {' | '.join(str(row.get(column, '')) for column in columns)} |" for row in table["rows"]]
    return "\n".join(rows)


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw the suites' times, one picture each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tables = [table for table in results["suites"].values() if table["bars"]]
    if not tables:
        return
    figure, axes = plt.subplots(
        len(tables), 1, figsize=(11, sum(1 + 0.3 * len(t["bars"]) for t in tables)), layout="constrained",
        height_ratios=[1 + 0.3 * len(t["bars"]) for t in tables], squeeze=False,
    )  # fmt: skip
    for axis, table in zip(axes[:, 0], tables, strict=True):
        names, values = list(table["bars"]), list(table["bars"].values())
        bars = axis.barh(names, values, color=["#4878a8" if "inference" not in name else "#999999" for name in names])
        axis.bar_label(bars, [f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in values], padding=3)
        axis.set_title(table["title"], fontsize="medium")
        axis.set(xlabel=table["unit"], xscale=table["scale"])
        axis.invert_yaxis()
        axis.margins(x=0.15)
    figure.savefig(path, dpi=110)
    plt.close(figure)
