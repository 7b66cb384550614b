"""Plots the loss curve in the terminal, with uniplot."""

from collections.abc import Mapping, Sequence

_WIDTH, _HEIGHT = 64, 7
_LEAST_POINTS = 3
_MARKS = {"loss": ".", "held-out": "o"}
"""ASCII characters, which any terminal can show, also without colours."""
_PLAIN = str.maketrans({"─": "-", "│": "|", "┌": "+", "┐": "+", "└": "+", "┘": "+"})


def loss_plot(curve: Sequence[Mapping[str, float]], encoding: str) -> list[str]:
    """The lines of a plot of the losses by step; empty if there are too few points.

    Args:
        curve: The reports of a run: `step` with `loss` or `eval_loss`.
        encoding: The encoding of the output stream, which may lack box-drawing characters.
    """
    series = {
        name: [(entry["step"], entry[key]) for entry in curve if key in entry]
        for name, key in (("loss", "loss"), ("held-out", "eval_loss"))
    }
    if len(series["loss"]) < _LEAST_POINTS:
        return []
    from uniplot import plot_to_string  # it imports numpy

    series = {name: points for name, points in series.items() if points}
    text = plot_to_string(
        xs=[[step for step, _ in points] for points in series.values()],
        ys=[[loss for _, loss in points] for points in series.values()],
        lines=[name == "loss" for name in series],
        x_labels=False,
        y_labels=False,
        width=_WIDTH,
        height=_HEIGHT,
        color=False,
        character_set="ascii",
        force_ascii_characters=[*_MARKS.values()],
    )
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        text = text.translate(_PLAIN)
    # uniplot rounds its own labels as far as they still differ: 5.5 may become `6`.
    steps, losses = zip(*(point for points in series.values() for point in points), strict=True)
    first, last = f"{min(steps):,}", f"{max(steps):,}"
    labels = {1: max(losses), _HEIGHT: min(losses)} if len({*losses}) > 1 else {_HEIGHT // 2 + 1: losses[0]}
    frame = [
        f"  {line} {labels[place]:.4f}" if place in labels else f"  {line}"
        for place, line in enumerate(text.rstrip("\n").split("\n"))
    ]
    legend = ", ".join(f"{_MARKS[name]} {name}" for name in series)
    return [f"  {legend} by step", *frame, f"   {first}{last:>{_WIDTH - len(first)}}"]
