"""A small curve of the loss in the terminal, drawn by uniplot."""

from collections.abc import Mapping, Sequence

from uniplot import plot_to_string

_WIDTH, _HEIGHT = 64, 7
_LEAST_POINTS = 3
_MARKS = (".", "o")
"""Of the loss of training, and of the held-out loss; a terminal of any encoding and without colours shows them."""
_PLAIN = str.maketrans({"─": "-", "│": "|", "┌": "+", "┐": "+", "└": "+", "┘": "+"})


def loss_plot(curve: Sequence[Mapping[str, float]], encoding: str) -> list[str]:
    """The lines of a plot of the losses over the steps; none where there are too few.

    Args:
        curve: The reports of a run, as `Outcome` has them.
        encoding: Of the stream that it is printed on, which may not have lines for a frame.
    """
    series = {"loss": _points(curve, "loss"), "held-out": _points(curve, "eval_loss")}
    if len(series["loss"]) < _LEAST_POINTS:
        return []
    series = {name: points for name, points in series.items() if points}
    text = plot_to_string(
        xs=[[step for step, _ in points] for points in series.values()],
        ys=[[loss for _, loss in points] for points in series.values()],
        lines=[name == "loss" for name in series],
        width=_WIDTH,
        height=_HEIGHT,
        color=False,
        character_set="ascii",
        force_ascii_characters=[*_MARKS],
    )
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        text = text.translate(_PLAIN)
    legend = ", ".join(f"{mark} {name}" for name, mark in zip(series, _MARKS, strict=False))
    return [f"  {legend} by step", *(f"  {line}".rstrip() for line in text.rstrip("\n").split("\n"))]


def _points(curve: Sequence[Mapping[str, float]], name: str) -> list[tuple[float, float]]:
    return [(entry["step"], entry[name]) for entry in curve if name in entry]
