"""Advice as plain data, as a table and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dovetail.advise.advice import Timing
from dovetail.advise.run import Advised, Tried
from dovetail.core import technique
from dovetail.host.units import format_size
from dovetail.show.plot import figure
from dovetail.show.table import table


def plain(tried: Sequence[Tried], advised: Sequence[Advised]) -> dict[str, Any]:
    """The result as in --json."""
    return {
        "settings": [_setting(one, tried) for one in tried],
        "workloads": [_workload(found, tried) for found in advised],
    }


def shown(found: Advised, tried: Sequence[Tried]) -> str:
    """A workload's table, the recommendation and its reason."""
    checked = found.checked is not None
    headers = [
        "setting",
        "loss",
        "prompts",
        "answers",
        "predicted",
        *(["measured"] if checked else []),
        "memory",
        "",
    ]
    rows = []
    for one in tried:
        timing = found.timings.get(one.name)
        if timing is None:
            rows.append([one.name, *[""] * (len(headers) - 2), "left out"])
            continue
        measured = [f"{timing.measured:.3g} s"] if checked and timing.measured is not None else []
        rows.append(
            [
                one.name,
                _loss(one, found.losses[one.name], tried),
                f"{timing.prompt_rate:.4g}/s",
                f"{timing.decode_rate:.4g}/s",
                f"{timing.predicted(found.workload):.3g} s",
                *measured,
                format_size(one.memory),
                _marks(one.name, found),
            ]
        )
    lines = [str(found.workload), table(headers, rows), f"{found.advice.recommended}: {found.advice.reason}"]
    lines += [f"{name}: {why}." for name, why in found.advice.slower.items()]
    if found.checked is not None:
        lines.append(_checked(found.advice.recommended, found.checked))
    return "\n".join(lines)


def draw(advised: Sequence[Advised], model: str) -> Any:
    """A Figure: for each workload the settings' predicted time and loss, the Pareto front joined by a line, the
    recommended one marked."""
    drawn = figure(5.2 * len(advised), 4.4)
    for axes, found in zip(drawn.subplots(1, len(advised), squeeze=False).flatten(), advised, strict=True):
        seconds = {name: timing.predicted(found.workload) for name, timing in found.timings.items()}
        losses = {name: 100 * loss for name, loss in found.losses.items()}
        front = found.advice.front
        axes.plot(
            [seconds[n] for n in front], [losses[n] for n in front], color="tab:orange", label="Pareto front"
        )
        axes.scatter(seconds.values(), [losses[n] for n in seconds], color="tab:blue", zorder=3)
        chosen = found.advice.recommended
        ring = {"s": 160, "facecolors": "none", "edgecolors": "tab:green", "linewidths": 2}
        axes.scatter([seconds[chosen]], [losses[chosen]], label="recommended", zorder=4, **ring)
        middle = (min(seconds.values()) + max(seconds.values())) / 2
        for i, (name, x) in enumerate(sorted(seconds.items(), key=lambda pair: pair[1])):
            left = x > middle  # names grow towards the middle, so that none is cut off, and avoid their neighbours
            place = {"xytext": (-8 if left else 8, (6, -13)[i % 2]), "ha": "right" if left else "left"}
            axes.annotate(name, (x, losses[name]), textcoords="offset points", fontsize=8, **place)
        axes.margins(0.12)
        axes.set_xlim(left=0)
        axes.set_title(str(found.workload), fontsize=9)
        axes.set_xlabel("predicted time (s)")
        axes.set_ylabel("loss: perplexity above the least rounded (%)")
        axes.grid(alpha=0.3)
        axes.legend(loc="best", fontsize=8)
    drawn.suptitle(model, fontsize=10)
    return drawn


def _marks(name: str, found: Advised) -> str:
    marks = [] if name != found.advice.recommended else ["recommended"]
    if name in found.advice.front:
        marks.append("on the front")
    return ", ".join(marks)


def _loss(one: Tried, loss: float, tried: Sequence[Tried]) -> str:
    error = _error(one, tried)
    return f"{loss:+.2%}" + ("" if not error else f" ± {100 * error:.2f}")


def _error(one: Tried, tried: Sequence[Tried]) -> float | None:
    reference = next(other.loss for other in tried if other.loss is not None)
    return None if one.loss is None else one.loss.error(reference)


def _checked(recommended: str, checked: dict[str, Any]) -> str:
    said = "as predicted, it is" if checked["best"] == recommended else f"{checked['best']} is"
    verdict = "within 5 % of it" if checked["meets"] else "MISSED: more than 5 % above it"
    more = (
        ""
        if checked["best"] == recommended
        else f"; {recommended} takes {checked['ratio']:.3f} times as long, {verdict}"
    )
    return f"checked: {said} the fastest with {checked['best_s']:.3g} s{more}"


def _setting(one: Tried, tried: Sequence[Tried]) -> dict[str, Any]:
    setting = one.candidate.setting
    found: dict[str, Any] = {"setting": one.name, "model": one.candidate.model, "use": list(setting.use)}
    if one.why is not None or one.loss is None:
        return {**found, "state": "refused", "why": one.why}
    reference = next(other.loss for other in tried if other.loss is not None)
    return {
        **found,
        "state": "idle" if technique.idle(one.activity) else "measured",
        "perplexity": one.loss.perplexity,
        "window_perplexity": list(one.loss.windows),
        "loss": one.loss.beyond(reference),
        "loss_error": one.loss.error(reference),
        "memory": one.memory,
        "activity": one.activity,
        "config": one.loaded["config"],
    }


def _workload(found: Advised, tried: Sequence[Tried]) -> dict[str, Any]:
    load, advice = found.workload, found.advice
    return {
        "workload": load.name,
        "requests": len(load.requests),
        "prompt_tokens": load.prompt_tokens,
        "output_tokens": load.output_tokens,
        "concurrency": load.concurrency,
        "settings": [_timing(name, timing, found) for name, timing in found.timings.items()],
        "refused": {one.name: why for one in tried if (why := one.why or one.refused.get(load.name))},
        "recommended": advice.recommended,
        "reason": advice.reason,
        "bound": advice.bound,
        "memory_share": advice.memory_share,
        "front": list(advice.front),
        "slower": dict(advice.slower),
        "check": found.checked,
    }


def _timing(name: str, timing: Timing, found: Advised) -> dict[str, Any]:
    return {
        "setting": name,
        "prompt_tokens_per_s": timing.prompt_rate,
        "decode_tokens_per_s": timing.decode_rate,
        "batch": timing.steps[0]["batch"],
        "bytes_per_step": timing.step_bytes,
        "memory_share": timing.memory_share(found.workload),
        "predicted_s": timing.predicted(found.workload),
        "measured_s": timing.measured,
        "loss": found.losses[name],
        "spread": {
            "prompt_tokens_per_s": [min(timing.prompt), max(timing.prompt)],
            "decode_tokens_per_s": [min(s["rate"] for s in timing.steps), max(s["rate"] for s in timing.steps)],
        },
    }
