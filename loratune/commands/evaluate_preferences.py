"""`loratune evaluate` on answers that are compared: what base and adapter prefer."""

import numpy as np
import torch

from loratune import data
from loratune.data import DatasetSplit, ProgressFactory
from loratune.data.formats import PAIRS
from loratune.evaluation import scoring
from loratune.inference import loading
from loratune.inference.completion import Log
from loratune.model import load
from loratune.training.batching import check_positions
from loratune.training.objectives import AnswerScores, Formula
from loratune.training.preference_figures import PreferenceFigures, Side, Values
from loratune.training.preflight import AdapterInfo


def evaluate(
    adapter: AdapterInfo, split: DatasetSplit, watch: ProgressFactory, count: ProgressFactory, log: Log
) -> PreferenceFigures:
    """The log-probabilities of base and adapter on the same answers, and the rewards that follow from them.

    Rewards are those of the adapter's objective, and DPO's where it has none; the reference is the base. Copies of
    rows count each.

    Args:
        adapter: The adapter.
        split: Rows of one kind, pairs of answers or answers that are good or bad.
        watch: Shows passes over data, in bytes.
        count: Shows passes over rows.
        log: Takes lines about the adapter.

    Raises:
        AdapterError, ModelError, DataError: The adapter, the base or the rows cannot be used.
        ConfigError: Rows are longer than the model's context.
    """
    split.check_kind(split.kind, "dpo" if split.kind == PAIRS else "kto")
    (loaded,) = loading.load_all([adapter], log)
    config = loaded.model.config
    dataset = data.prepare(split, loaded.renderer, loaded.data, int(config.get_text_config().vocab_size), watch)
    check_positions(dataset, loaded.data, load.context_length(config))
    for line in (*split.remarks(), *dataset.report.losses()):
        log(line)
    numbers = range(len(dataset.rows))
    with count("scoring answers", 2 * len(numbers)) as advance:
        with loaded.without_adapter():
            before = -scoring.losses(loaded, dataset, numbers, advance)
        after = -scoring.losses(loaded, dataset, numbers, advance)
    sides, tokens = np.asarray(dataset.rows.sides), dataset.rows.supervised.astype(np.float64)
    rewards = _rewards(adapter, after, tokens, before)
    good, bad = (Side(tokens[which], before[which], after[which], rewards[which]) for which in (sides > 0, sides < 0))
    return PreferenceFigures("held-out", dataset.together == 2, good, bad)


def _rewards(adapter: AdapterInfo, *columns: Values) -> Values:
    """Rewards of answers, from their log-probabilities, tokens and reference."""
    run = adapter.run
    is_compared = run is not None and run.training.objective != "sft"
    formula = Formula.of(run.training.objective, run.preferences) if run and is_compared else Formula("dpo", 1.0)
    rewards: Values = formula.rewards(AnswerScores(*map(torch.from_numpy, columns))).numpy()
    return rewards
