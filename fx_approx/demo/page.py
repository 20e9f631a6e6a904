"""The page of the demo: one file, without anything from the network."""

from __future__ import annotations

import html
from collections.abc import Sequence

from fx_approx.demo.training import Result, Trainer

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2937; --soft: #6b7280; --line: #d1d5db; --exact: #6b7280; --own: #2563eb; }
@media (prefers-color-scheme: dark) { :root { --ink: #e5e7eb; --soft: #9ca3af; --line: #374151; --own: #60a5fa; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 2.5rem; } .soft { color: var(--soft); } .pair { display: flex; flex-wrap: wrap; gap: 1.5rem; }
svg text { fill: var(--soft); font-size: 11px; } svg line { stroke: var(--line); }
.exact { stroke: var(--exact); fill: none; } .own { stroke: var(--own); fill: none; stroke-width: 1.6; }
table { border-collapse: collapse; font-size: 14px; display: block; overflow-x: auto; }
td, th { border-bottom: 1px solid var(--line); padding: .25rem .6rem; text-align: left; }
"""
_WIDTH, _HEIGHT, _LEFT, _BELOW = 420, 190, 46, 24


def page(images: str, where: str, results: Sequence[Result]) -> str:
    """The page of all results.

    Args:
        images: What the networks were trained on.
        where: Threads and versions.
        results: Of each network.
    """
    parts = [f"<h1>Exact training, and by a recipe</h1><p class='soft'>{_safe(images)}; {_safe(where)}</p>"]
    parts += [_case(one) for one in results]
    body = "\n".join(parts)
    head = f"<meta charset='utf-8'><meta name='viewport' content='width=device-width'><style>{_STYLE}</style>"
    return (
        f"<!doctype html><html lang='en'><head>{head}<title>fx_approx demo</title></head><body>{body}</body></html>\n"
    )


def _case(one: Result) -> str:
    ratio = one.step_ratio
    said = [f"<li>{_safe(choice.what)}: {_safe(choice.why)}</li>" for choice in one.recipe.choices]
    exact, own, shipped = one.accuracies
    facts = [f"Accuracy: {exact:.1f} % exact, {own:.1f} % by the recipe."]
    if ratio is not None:
        facts.append(f"A sampled step takes {ratio[0]:.2f} [{ratio[1]:.2f}, {ratio[2]:.2f}] of an exact one.")
        facts.append(f"The training took {one.training_ratio:.2f} of exact training, and {one.setup:.1f} s to set up.")
    (full, narrow), (slow, fast) = one.parameters, one.latency
    if shipped is not None and narrow is not None and fast is not None:
        facts.append(
            f"The network that ships has {narrow / full:.2f} of the weights, takes {fast / slow:.2f} of the time of a "
            f"batch, and has {shipped:.1f} %."
        )
    curves = _curves("loss", _smooth(one.exact.losses), _smooth(one.sampled.losses)) + _curves(
        "milliseconds of a step", _milliseconds(one.exact), _milliseconds(one.sampled)
    )
    columns = ["layer", "op", "k", "saved", "why"]
    layers = "" if one.recipe.exact else one.recipe.report().to_html(columns, whole=False)
    return (
        f"<h2>{_safe(one.name)}, {_safe(one.task)}</h2><ul>{''.join(said)}</ul><p>{' '.join(facts)}</p>"
        f"<div class='pair'>{curves}</div>{layers}"
    )


def _milliseconds(trainer: Trainer) -> list[float]:
    middle = sorted(trainer.seconds)[len(trainer.seconds) // 2]
    return [1000 * min(one, 4 * middle) for one in trainer.seconds]


def _smooth(values: Sequence[float]) -> list[float]:
    """Means over the last ten."""
    return [sum(values[max(0, n - 9) : n + 1]) / len(values[max(0, n - 9) : n + 1]) for n in range(len(values))]


def _curves(title: str, exact: Sequence[float], own: Sequence[float]) -> str:
    top = max((*exact, *own), default=1.0) or 1.0

    def line(values: Sequence[float], kind: str) -> str:
        across = (_WIDTH - _LEFT) / max(1, len(values) - 1)
        down = _HEIGHT - _BELOW
        points = " ".join(f"{_LEFT + across * n:.1f},{down - down * 0.92 * v / top:.1f}" for n, v in enumerate(values))
        return f"<polyline class='{kind}' points='{points}'/>"

    axes = (
        f"<line x1='{_LEFT}' y1='{_HEIGHT - _BELOW}' x2='{_WIDTH}' y2='{_HEIGHT - _BELOW}'/>"
        f"<line x1='{_LEFT}' y1='0' x2='{_LEFT}' y2='{_HEIGHT - _BELOW}'/>"
        f"<text x='{_LEFT - 4}' y='{0.08 * (_HEIGHT - _BELOW) + 4:.0f}' text-anchor='end'>{top:.3g}</text>"
        f"<text x='{_LEFT - 4}' y='{_HEIGHT - _BELOW}' text-anchor='end'>0</text>"
        f"<text x='{_LEFT}' y='{_HEIGHT - 6}'>step 1</text>"
        f"<text x='{_WIDTH}' y='{_HEIGHT - 6}' text-anchor='end'>{len(exact)}</text>"
    )
    caption = f"{title}; <span style='color:var(--exact)'>exact</span>, <span style='color:var(--own)'>recipe</span>"
    picture = f"<svg width='{_WIDTH}' height='{_HEIGHT}' role='img' aria-label='{_safe(title)}'>"
    lines = line(exact, "exact") + line(own, "own")
    return f"<figure><figcaption>{caption}</figcaption>{picture}{axes}{lines}</svg></figure>"


def _safe(text: str) -> str:
    return html.escape(str(text))
