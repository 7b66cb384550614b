"""`loratune evaluate`: scores base and adapter on the same held-out rows."""

import math
from collections.abc import Callable, Iterator, Sequence

from loratune import data
from loratune.data import DatasetSplit, ProgressFactory, TokenizedDataset
from loratune.data.packing import BatchLayout
from loratune.data.rendering import TokenizedRow
from loratune.evaluation.results import Score
from loratune.inference import completion, loading
from loratune.inference.completion import LoadedAdapter
from loratune.model import load
from loratune.training import gain
from loratune.training.batching import check_positions
from loratune.training.preflight import AdapterInfo

_BATCH_TOKENS = 8192
"""Tokens of a batch, whose logits are in memory at once: 1.6 GB in float32 with a vocabulary of 50,000."""


def evaluate(
    adapter: AdapterInfo, split: DatasetSplit, watch: ProgressFactory, log: Callable[[str], None]
) -> tuple[dict[str, Score], list[str]]:
    """Score base and adapter on rows that are rendered as in training.

    Returns:
        The scores of `base` and `adapter`; and lines about rows that were truncated or dropped.

    Raises:
        AdapterError, ModelError, DataError: The adapter, its base or the rows cannot be used.
        ConfigError: Rows are longer than the model's context.
    """
    loaded = loading.load(adapter, log)
    vocabulary_size = loaded.model.config.get_text_config().vocab_size
    rows = data.prepare(split, loaded.renderer, loaded.data, vocabulary_size, watch)
    check_positions(rows, loaded.data, load.context_length(loaded.model.config))
    with loaded.without_adapter():
        base_score = _score(loaded, rows)
    return {"base": base_score, "adapter": _score(loaded, rows)}, [*split.remarks(), *rows.report.losses()]


def _score(loaded: LoadedAdapter, dataset: TokenizedDataset) -> Score:
    rows, lengths = dataset.rows, dataset.rows.lengths
    size = max(1, min(completion.BATCH, _BATCH_TOKENS // int(lengths.max())))
    batches = BatchLayout(rows, lengths, "none", size, loaded.data.max_length, load.pad_id(loaded.tokenizer))
    loss = gain.held_out_loss(loaded.model, batches)
    exact_match, label_accuracy = _accuracies(loaded, [row for row in rows.rows() if _has_prompt(row, loaded)])
    return Score(loss.mean, math.exp(loss.mean), exact_match, label_accuracy, len(rows), loss.tokens)


def _has_prompt(row: TokenizedRow, loaded: LoadedAdapter) -> bool:
    """Whether a row has a prompt: more than the token that begins every row."""
    return row.prompt not in ((), (loaded.tokenizer.bos_token_id,))


def _accuracies(loaded: LoadedAdapter, rows: Sequence[TokenizedRow]) -> tuple[float | None, float | None]:
    """Shares of rows whose completion is exactly the expected one, and begins with it."""
    if not rows:
        return None, None
    exact_matches = label_matches = 0
    for batch in _batches(rows, load.context_length(loaded.model.config)):
        longest = max(len(row.completion) for row in batch)
        for row, ids in zip(batch, loaded.complete([row.prompt for row in batch], longest), strict=True):
            exact_matches += tuple(ids) == row.completion
            label_matches += loaded.text(ids).startswith(loaded.text(row.completion))
    return exact_matches / len(rows), label_matches / len(rows)


def _batches(rows: Sequence[TokenizedRow], context_length: int | None) -> Iterator[list[TokenizedRow]]:
    """Batches of rows with completions of similar length.

    The prompts of a batch are all completed to the longest expected completion. So a batch takes another row only if
    its longest prompt and its longest completion fit in the context together.
    """
    batch: list[TokenizedRow] = []
    for row in sorted(rows, key=lambda row: len(row.completion)):
        longest_prompt = max(len(member.prompt) for member in (*batch, row))
        is_too_long = context_length is not None and longest_prompt + len(row.completion) > context_length
        if batch and (is_too_long or len(batch) == completion.BATCH):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
