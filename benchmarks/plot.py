"""The plot for the docs: the ratio of each row with a target, beside that target, as an SVG file."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw(document: dict[str, Any], file: Path) -> None:
    """Rows as bars on a common scale: what was measured over what it may be. Raises: ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "benchmarks", "svg.fonttype": "none", "font.size": 9}
    from matplotlib import pyplot

    rows = [row for row in document["rows"] if row["target"] and (row["cores"] == "one" or row["at_least"])]
    figure, axes = pyplot.subplots(figsize=(9, 0.8 + 0.3 * len(rows)), layout="constrained")
    for place, row in enumerate(reversed(rows)):
        # A share that is to be kept is turned round, so that less is better in all of them.
        scale = (
            (lambda value, row=row: row["target"] / value)
            if row["at_least"]
            else (lambda value, row=row: value / row["target"])
        )
        value, ends = scale(row["ratio"]), sorted((scale(row["low"]), scale(row["high"])))
        axes.barh(place, value, color="#44b78b" if row["met"] else "#d98880", height=0.7)
        axes.plot(ends, [place, place], color="#222222", linewidth=1)
        axes.text(max(value, ends[1]) + 0.03, place, f"{row['ratio']:.2f} of {row['target']:.2f}", va="center")
    axes.axvline(1.0, color="#092e20", linewidth=1)
    axes.set_yticks(range(len(rows)), [row["what"] for row in reversed(rows)])
    axes.set_xlim(left=0)
    axes.margins(x=0.2, y=0.01)
    axes.set_xlabel("measured / at most (a thin line: the quartiles of the rounds; green: met)")
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)
