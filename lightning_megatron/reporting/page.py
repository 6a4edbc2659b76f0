"""One HTML page of a run; everything it shows is inside it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import fields
from html import escape
from typing import Any

from lightning_megatron.optim.config import OptimizerConfig
from lightning_megatron.optim.preview import learning_rates
from lightning_megatron.reporting.charts import data_uri, line_chart
from lightning_megatron.reporting.run import Run
from lightning_megatron.reporting.series import Series

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1f24; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2rem; }
p.path { color: #57606a; margin-top: 0; overflow-wrap: anywhere; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid #d8dee4; vertical-align: top; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); gap: 1rem; }
figure { margin: 0; } figure img { width: 100%; height: auto; } figcaption { color: #57606a; font-size: .85rem; }
pre { background: #f6f8fa; padding: 1rem; overflow-x: auto; font-size: 13px; }
"""
_TIMES = ("data_time", "schedule_time", "optimizer_time")
_PERPLEXITY_LIMIT = 30.0


def render(run: Run) -> str:
    """The page's HTML."""
    name = run.path.resolve().name
    sections = [
        f"<h1>{escape(name)}</h1>",
        f'<p class="path">{escape(str(run.path))}</p>',
        _section("summary", "Summary", _table(_summary(run))),
        _section("curves", "Curves", _charts(run)),
        _section("layout", "Layout", _table(_layout(run)) or "<p>No configuration or checkpoint tells it.</p>"),
        _section("checkpoints", "Checkpoints", _checkpoints(run)),
        _section("configuration", "Configuration", _configuration(run)),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(name)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


def _section(anchor: str, title: str, body: str) -> str:
    return f'<section id="{anchor}">\n<h2>{escape(title)}</h2>\n{body}\n</section>'


def _table(rows: Mapping[str, object]) -> str:
    if not rows:
        return ""
    body = "".join(
        f"<tr><th>{escape(str(key))}</th><td>{escape(str(value))}</td></tr>\n" for key, value in rows.items()
    )
    return f"<table>\n{body}</table>"


# ----------------------------------------------------------------------------------------------------------- summary


def _summary(run: Run) -> dict[str, str]:
    rows = {"optimizer steps": f"{run.steps:,}"}
    train = run.last("train_loss")
    if train is not None:
        rows["training loss"] = f"{train:.4f} in the last step logged"
    valid = run.series.get("val_loss")
    if valid:
        step, best = min(valid, key=lambda point: point[1] if math.isfinite(point[1]) else math.inf)
        perplexity = f", perplexity {math.exp(best):,.1f}" if best < _PERPLEXITY_LIMIT else ""
        rows["validation loss"] = f"{valid[-1][1]:.4f} at the end; best {best:.4f}{perplexity}, at step {step:,}"
    for column, label, pattern, reduce in (
        ("tokens_per_s", "throughput", "{:,.0f} tokens/s (median)", statistics.median),
        ("tflops_per_device", "per device", "{:,.1f} TFLOP/s (median)", statistics.median),
        ("mfu", "MFU", "{:.1%} (median)", statistics.median),
        ("step_time", "step time", "{:.3f} s (median)", statistics.median),
        ("memory/max", "memory of the fullest rank", "{:.2f} GiB", max),
    ):
        points = run.series.get(column)
        if points:
            rows[label] = pattern.format(reduce([value for _, value in points]))
    rows["values from"] = ", ".join(str(source.relative_to(run.path)) for source in run.sources)
    return rows


def _layout(run: Run) -> dict[str, object]:
    """What was asked for, and over it what the newest checkpoint says: with ``auto`` only that tells the sizes."""
    parallel = run.config.get("parallel")
    asked = parallel if isinstance(parallel, dict) else {}
    whole = [checkpoint.metadata for checkpoint in run.checkpoints if checkpoint.metadata]
    rows: dict[str, object] = {**asked, **(whole[-1].layout if whole else {})}
    rows = {key: value for key, value in rows.items() if value not in (None, False) and key != "_target_"}
    if whole:
        rows["world size"] = whole[-1].world_size
        rows["model"] = whole[-1].model.get("module", "?")
        rows["versions"] = ", ".join(f"{name} {number}" for name, number in whole[-1].versions.items())
    return rows


def _checkpoints(run: Run) -> str:
    if not run.checkpoints:
        return "<p>None.</p>"
    rows = "".join(
        f"<tr><td>{escape(str(checkpoint.path.relative_to(run.path)))}</td>"
        f"<td>{checkpoint.size / 2**20:,.1f} MiB</td>"
        f"<td>{'whole' if checkpoint.metadata else 'not whole'}</td></tr>\n"
        for checkpoint in run.checkpoints
    )
    return f"<table>\n<tr><th>directory</th><th>size</th><th>state</th></tr>\n{rows}</table>"


def _configuration(run: Run) -> str:
    return f"<pre>{escape(run.config_text)}</pre>" if run.config_text else "<p>None was saved.</p>"


# ------------------------------------------------------------------------------------------------------------ curves


def _charts(run: Run) -> str:
    figures = []
    for title, ylabel, names, stacked in (
        ("Loss", "loss", ("train_loss", "val_loss", "test_loss"), False),
        ("Throughput", "tokens/s", ("tokens_per_s",), False),
        ("MFU", "fraction of the peak", ("mfu",), False),
        ("Where a step's time goes", "seconds", _TIMES, True),
        ("Gradient norm", "norm", ("grad_norm",), False),
        ("Weight norm", "norm", ("param_norm",), False),
        ("Memory by rank", "GiB", tuple(name for name in run.series if name.startswith("memory/rank_")), False),
        ("Balance of experts", "load over mean", ("experts/max", "experts/min"), False),
    ):
        curves = {name: run.series[name] for name in names if name in run.series}
        if curves:
            figures.append(_figure(title, curves, ylabel, stacked=stacked))
    rates = _rates(run)
    if rates:
        figures.insert(1, _figure("Learning rate", rates, "learning rate"))
    return f'<div class="charts">\n{"".join(figures)}</div>'


def _rates(run: Run) -> dict[str, Series]:
    """The logged learning rate, beside the whole schedule if the configuration tells it."""
    rates: dict[str, Series] = {}
    planned = planned_rates(run.config)
    if planned:
        rates["schedule"] = planned
    logged = next((points for name, points in run.series.items() if name.startswith("lr-")), None)
    if logged:
        rates["logged"] = logged
    return rates


def planned_rates(config: Mapping[str, Any]) -> Series:
    """``(step, rate)`` of the schedule of a resolved configuration; empty if it does not tell."""
    optim, trainer = config.get("optim"), config.get("trainer")
    if not isinstance(optim, Mapping) or not isinstance(trainer, Mapping):
        return ()
    steps = trainer.get("max_steps") or -1
    known = {field.name for field in fields(OptimizerConfig)}
    if not isinstance(steps, int) or steps <= 0:
        return ()
    try:  # values of any type may stand in a file
        settings = OptimizerConfig(**{key: value for key, value in optim.items() if key in known})
        return tuple((step, float(rate)) for step, rate in learning_rates(settings, steps))
    except (TypeError, ValueError, ArithmeticError, KeyError):
        return ()


def _figure(title: str, curves: Mapping[str, Series], ylabel: str, *, stacked: bool = False) -> str:
    picture = data_uri(line_chart(curves, ylabel, stacked=stacked))
    caption = f"{title}: {_described(curves)}"
    return (
        f'<figure>\n<img alt="{escape(caption)}" src="{picture}">\n<figcaption>{escape(caption)}</figcaption>\n'
        "</figure>\n"
    )


def _described(curves: Mapping[str, Series]) -> str:
    return ", ".join(_last_values((name, points[-1][1]) for name, points in curves.items()))


def _last_values(values: Iterable[tuple[str, float]]) -> list[str]:
    return [f"{name} {value:.4g} at the end" for name, value in values]
