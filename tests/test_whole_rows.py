"""Attention of long rows by torch's kernel, and of the others in tiles: the same numbers as in tiles only."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from test_fused_ops import OVER
from test_kernels import adapted, normal, relative_rms, rows, step
from torch import Tensor

from loratune import kernels
from loratune.data.batches import flatten
from loratune.kernels import sublayers, upstream
from loratune.kernels.layout import Layout, Scoring
from loratune.lora import attach

SCALE = 0.3
GROUPS, HEADS, SIZE = 2, 3, 24
BRANCHES = (130, 64, (64, 40), 5, 90, (20, 70), (90, 3))
"""The rows of a batch. A tuple is a branch of the preceding row: the position where it begins, and its number of
tokens."""


def positions_of(branches: Any) -> Tensor:
    """The positions of rows and branches."""
    spans = [(0, branch) if isinstance(branch, int) else (branch[0], branch[0] + branch[1]) for branch in branches]
    return torch.cat([torch.arange(*span) for span in spans])


def attended(ops: Any, layout: Layout, states: Any, gradient: Tensor) -> list[Tensor]:
    """The result and gradients, as an attention layer computes them."""
    results = ops.attend(*states, layout, Scoring(SCALE))
    sublayers.attend_whole_rows(layout.rows, results, *states, SCALE)
    gradients = ops.attend_backward(gradient, results, states, layout, Scoring(SCALE))
    sublayers.attend_whole_rows_backward(layout.rows, gradients, gradient, results, states, SCALE)
    return [*results, *gradients]


def test_layout_excludes_long_rows_from_the_tiles() -> None:
    positions = positions_of((3, 7, 1, 5, (2, 4), 9))
    layout = Layout.of(positions, whole=5)
    assert layout.rows == ((3, 10), (11, 16), (20, 29))
    assert layout.tiles[:, [0, 1]].tolist() == [[0, 3], [10, 11], [16, 20]]
    assert Layout.of(positions, window=7, whole=5).rows == ((3, 10), (11, 16))
    assert Layout.of(positions).rows == Layout.of(positions, whole=10).rows == ()
    alone = Layout.of(torch.arange(9), whole=9)
    assert alone.rows == ((0, 9),) and alone.tiles.shape == (0, 6)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("branches", [BRANCHES, (200,)], ids=str)
@pytest.mark.parametrize("name", OVER)
def test_long_rows_match_the_results_of_tiles(name: str, branches: Any, window: int | None) -> None:
    """Alone, and together with rows in tiles and branches that attend to them."""
    choose, dtype = OVER[name]
    positions = positions_of(branches)
    tokens = len(positions)
    shapes = ((GROUPS, tokens, HEADS, SIZE), (GROUPS, tokens, SIZE), (GROUPS, tokens, SIZE))
    states = [normal(*shape, seed=seed).to(dtype) for seed, shape in enumerate(shapes)]
    gradient = normal(tokens, GROUPS * HEADS * SIZE, seed=3).to(dtype)
    layouts = Layout.of(positions, window), Layout.of(positions, window, whole=60)
    assert bool(layouts[1].rows) == (window is None or len(branches) > 1)
    pairs = zip(*(attended(choose(states[0]), layout, states, gradient) for layout in layouts), strict=True)
    for tiled, whole in pairs:
        difference = float((tiled.float() - whole.float()).norm()) / float(tiled.float().norm())
        assert difference < (1e-5 if dtype == torch.float32 else 0.01)


def test_step_matches_that_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients in float32, with rows in tiles and rows computed whole."""
    calls: list[tuple[int, ...]] = []

    def counted(compute: Callable[..., Any], query: Tensor, *arguments: Any, **options: Any) -> Any:
        calls.append(tuple(query.shape))
        return compute(query, *arguments, **options)

    model = adapted()
    batch = flatten(rows())
    loss, gradients = step(model, batch)
    lengths = [len(row["input_ids"]) for row in rows()]
    monkeypatch.setattr(sublayers, "fewest_tokens", lambda like: sorted(lengths)[1])
    for name in ("attend_to_rows", "attend_to_rows_backward"):
        monkeypatch.setattr(upstream, name, partial(counted, getattr(upstream, name)))
    with kernels.accelerated(model, attach.adapted_linear) as fallbacks:
        calls.clear()
        fast, others = step(model, batch)
    assert fallbacks == [] and len(calls) == 2 * (len(lengths) - 1) * model.config.num_hidden_layers
    assert fast == pytest.approx(loss, abs=1e-6) and relative_rms(gradients, others) < 1e-5
