"""The story of `loratune evaluate`: base and adapter on the same held-out rows."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from loratune import data
from loratune.commands import inference
from loratune.commands.inference import LoadedAdapter
from loratune.data import DatasetSplit, ProgressFactory, TokenizedDataset
from loratune.data.packing import BatchLayout
from loratune.data.rendering import TokenizedRow
from loratune.model import load
from loratune.training import scoring
from loratune.training.preflight import AdapterInfo
from loratune.training.tokenization import check_positions

_BATCH_TOKENS = 8192
"""Tokens whose logits are held at once: at 50,000 words of vocabulary, 1.6 GB in float32."""


@dataclass(frozen=True)
class Score:
    """How well one model does on the rows.

    loss: nats per learnt token; perplexity: e to the loss; exact_match: share of rows whose greedy completion is the
    expected one and then ends; label_accuracy: share whose completion begins with the expected text, whatever follows;
    both None where no row has a prompt; rows; tokens: learnt ones, over which the loss is the mean.
    """

    loss: float
    perplexity: float
    exact_match: float | None
    label_accuracy: float | None
    rows: int
    tokens: int


def evaluate(
    opened: AdapterInfo, part: DatasetSplit, watch: ProgressFactory, log: Callable[[str], None]
) -> tuple[dict[str, Score], list[str]]:
    """Score `base` and `adapter` on rows that are rendered as in training; and lines about what became of the rows.

    Raises AdapterError, ModelError, DataError; ConfigError: rows are longer than the model's context.
    """
    tuned = inference.load(opened, log)
    size = tuned.model.config.get_text_config().vocab_size
    rows = data.prepare(part, tuned.renderer, tuned.data, size, watch)
    check_positions(rows, tuned.data, load.context_length(tuned.model.config))
    with tuned.without_adapter():
        base = _score(tuned, rows)
    return {"base": base, "adapter": _score(tuned, rows)}, [*part.remarks(), *rows.report.losses()]


def _score(tuned: LoadedAdapter, prepared: TokenizedDataset) -> Score:
    rows, lengths = prepared.rows, prepared.rows.lengths
    size = max(1, min(inference.BATCH, _BATCH_TOKENS // int(lengths.max())))
    padded = BatchLayout(rows, lengths, "none", size, tuned.data.max_length, load.pad_id(tuned.tokenizer))
    loss = scoring.held_out_loss(tuned.model, padded)
    exact, starts = _matches(tuned, [row for row in rows.rows() if _asks(row, tuned)])
    return Score(loss.mean, math.exp(loss.mean), exact, starts, len(rows), loss.tokens)


def _asks(row: TokenizedRow, tuned: LoadedAdapter) -> bool:
    """Whether there is a prompt: more than the token that begins every row."""
    return row.prompt not in ((), (tuned.tokenizer.bos_token_id,))


def _matches(tuned: LoadedAdapter, rows: Sequence[TokenizedRow]) -> tuple[float | None, float | None]:
    """Shares of rows completed exactly, and begun right. Rows with completions of like length share a batch."""
    if not rows:
        return None, None
    exact = starts = 0
    for batch in _batches(rows, load.context_length(tuned.model.config)):
        longest = max(len(row.completion) for row in batch)
        for row, ids in zip(batch, tuned.complete([row.prompt for row in batch], longest), strict=True):
            exact += tuple(ids) == row.completion
            starts += tuned.text(ids).startswith(tuned.text(row.completion))
    return exact / len(rows), starts / len(rows)


def _batches(rows: Sequence[TokenizedRow], limit: int | None) -> Iterator[list[TokenizedRow]]:
    """Batches of rows with completions of like length. Their prompts are completed to the longest of these; none
    then goes beyond the model's context, if no row did. limit: see `model.context_length`."""
    batch: list[TokenizedRow] = []
    for row in sorted(rows, key=lambda row: len(row.completion)):
        longest_prompt = max(len(one.prompt) for one in (*batch, row))
        too_long = limit is not None and longest_prompt + len(row.completion) > limit
        if batch and (too_long or len(batch) == inference.BATCH):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
