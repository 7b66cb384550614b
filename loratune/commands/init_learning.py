"""The settings of learning that `loratune init` writes: the one place where rate, epochs and rows of a step are chosen.

What decides them are counts and the width of the model; what decides the rest of a config is in `init_choices`.
"""

from collections.abc import Iterator

from loratune.config import TrainingSection

_STEPS = 200
"""About how many optimizer steps a run should have at least: few rows are repeated, in small steps, until it has."""
_LEAST_ROWS, _MOST_ROWS = 8, 32
"""Rows of an optimizer step."""
_MOST_EPOCHS, _MOST_UNWATCHED_EPOCHS = 10, 5
"""Epochs at most; the second without validation rows, as nothing tells then from which step on more of them harm."""
_NARROW, _NARROW_RATE = 1024, 1e-3
"""Hidden size of small models, and their learning rate. SmolLM2-135M (hidden size 576) had a lower held-out loss and
more exact matches at it than at the default, on 2,000 rows of a spelling task; wider models have not been compared."""


def rows_per_step(rows: int) -> int:
    """Rows of an optimizer step for so many training rows: a power of two."""
    wanted = min(max(rows // _STEPS, _LEAST_ROWS), _MOST_ROWS)
    return 1 << (wanted.bit_length() - 1)


def learning(rows: int, step: int, hidden_size: int, *, validated: bool) -> Iterator[tuple[str, float, str]]:
    """Keys of the training section with their values, and why they have them.

    Args:
        rows: Rows that are trained on.
        step: How many of them an optimizer step takes.
        hidden_size: Of the model.
        validated: Whether there are rows to evaluate on.
    """
    default = TrainingSection().learning_rate
    rate, why = default, "the default; it was not compared with others on a model as wide"
    if hidden_size <= _NARROW:
        rate, why = _NARROW_RATE, f"SmolLM2-135M has a lower held-out loss at it than at the default, {default:g}"
    yield "learning_rate", rate, why
    steps = -(-rows // step)
    most = _MOST_EPOCHS if validated else _MOST_UNWATCHED_EPOCHS
    epochs = min(most, max(1, round(_STEPS / steps)))
    why = f"{steps:,} step{'s' if steps > 1 else ''} in each, of {min(step, rows)} rows"
    if epochs > 1 and validated:
        why += "; the best of them is kept, by the held-out loss"
    yield "num_train_epochs", epochs, why
