"""Curves as SVG, drawn by matplotlib without a display."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping

from lightning_megatron.reporting.series import Series, finite

_COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
_FEW = 60  # points that are drawn one by one


def line_chart(curves: Mapping[str, Series], ylabel: str, *, title: str = "", stacked: bool = False) -> bytes:
    """An SVG of one curve each, over optimizer steps; ``stacked`` fills what lies between them."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    drawn = {name: finite(points) for name, points in curves.items() if finite(points)}
    if stacked and len({tuple(step for step, _ in points) for points in drawn.values()}) == 1:
        steps = [step for step, _ in next(iter(drawn.values()))]
        heights = [[value for _, value in points] for points in drawn.values()]
        axes.stackplot(steps, heights, labels=list(drawn), colors=_COLORS[: len(drawn)])
    else:
        for (name, points), color in zip(drawn.items(), _COLORS * len(drawn), strict=False):
            marker = "o" if len(points) <= _FEW and len(drawn) > 1 else ""
            axes.plot(*zip(*points, strict=True), label=name, color=color, linewidth=1.2, marker=marker, markersize=3)
    axes.set(xlabel="optimizer step", ylabel=ylabel)
    if title:
        axes.set_title(title)
    axes.grid(alpha=0.25)
    if len(drawn) > 1:
        axes.legend()
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "lightning_megatron", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def data_uri(svg: bytes) -> str:
    """The picture inside an attribute."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()
