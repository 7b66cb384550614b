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
        x_labels=False,
        y_labels=False,
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
    frame = [f"  {line}" for line in text.rstrip("\n").split("\n")]
    return [f"  {legend} by step", *_labelled(frame, [point for points in series.values() for point in points])]


def _labelled(frame: Sequence[str], points: Sequence[tuple[float, float]]) -> list[str]:
    """The frame with the highest and the lowest loss beside it, and the first and the last step below it.

    uniplot's own labels are as short as they can be told apart: 5.5 is `6`, where 5 is the other one.
    """
    steps, losses = zip(*points, strict=True)
    first, last = f"{min(steps):,}", f"{max(steps):,}"
    places = {1: max(losses), _HEIGHT: min(losses)} if len({*losses}) > 1 else {_HEIGHT // 2 + 1: losses[0]}
    labelled = [f"{line} {places[place]:.4f}" if place in places else line for place, line in enumerate(frame)]
    return [*labelled, f"   {first}{last:>{_WIDTH - len(first)}}"]


def _points(curve: Sequence[Mapping[str, float]], name: str) -> list[tuple[float, float]]:
    return [(entry["step"], entry[name]) for entry in curve if name in entry]
