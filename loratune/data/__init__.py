"""Rows in, `input_ids` and `labels` out: read → recognise → render → truncate → cache → report.

`read_datasets` reads and checks the rows of a run; `prepare` tokenizes the rows of one dataset split.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, islice
from pathlib import Path

import numpy as np

from loratune.codes import Code
from loratune.config import DataSection, Source
from loratune.config.sections import WEIGHT
from loratune.data import token_cache
from loratune.data.example_tokenizer import BATCH_ROWS, ExampleTokenizer, in_batches
from loratune.data.holding_out import random_mask
from loratune.data.remarks import first_examples, remark_on_arguments, remark_on_lost_characters
from loratune.data.rendering import Renderer, spans
from loratune.data.rendering.spans import TokenizedRow
from loratune.data.report import Report, total
from loratune.data.splits import DatasetSplit, RawDatasets, find_duplicates, find_leaks, read_datasets, read_source
from loratune.data.token_cache import ROWS, TokenCache, TokenCacheWriter
from loratune.errors import ConfigError, DataError, Problem
from loratune.events import reading

__all__ = [
    "ROWS", "DatasetSplit", "RawDatasets", "TokenizedDataset", "check_positions", "find_leaks", "first_examples",
    "mix_in", "open_tokenized", "prepare", "prepare_unrelated_text", "read_datasets", "read_source",
    "remark_on_arguments", "remark_on_lost_characters", "replay_numbers", "unrelated_kinds",
]  # fmt: skip

UNRELATED_TEXT = Path(__file__).parent / "general.jsonl"
"""Passages written for loratune, under its licence: prose, dialogue, code, French and German; `kind` says which."""
UNRELATED_TOKENS = 64
"""The most tokens of a passage that are read."""


@dataclass(frozen=True)
class TokenizedDataset:
    """A tokenized dataset split for the trainer: rows of `input_ids` and `labels`, memory-mapped from disk.

    An item is a row, both answers of a pair, or a block of a row that was split.
    """

    rows: TokenCache

    @property
    def rows_per_example(self) -> int:
        """How many rows make an item: the two answers of a pair, otherwise one."""
        return 2 if self.rows.side(0) == spans.CHOSEN else 1

    @property
    def is_unpaired(self) -> bool:
        """Whether rows are unpaired preferences."""
        return self.rows.side(0) in (spans.DESIRABLE, spans.UNDESIRABLE)

    @property
    def items(self) -> int:
        """How many items there are."""
        return len(self.rows) // self.rows_per_example

    def count_rows(self, items: Collection[int]) -> int:
        """The number of different rows that some items are blocks of; the number of items if no row was split."""
        owners = self.rows.owners
        return len(items) if owners is None else len(np.unique(owners[[*items]]))

    def item(self, number: int) -> tuple[TokenizedRow, ...]:
        """The rows of an item."""
        start = number * self.rows_per_example
        return tuple(map(self.rows.row, range(start, start + self.rows_per_example)))

    @property
    def report(self) -> Report:
        """Counts of all rows that were read: used, truncated, dropped."""
        return self.rows.report

    @property
    def fingerprint(self) -> str:
        """SHA-256 over every id and supervised span in order."""
        return self.rows.fingerprint

    def weighted(self, copies: Mapping[int, int]) -> dict[int, float]:
        """Number of an item → how often it counts in a mean: its copies, or with weights of rows these times its
        weight, scaled so that all rows together count as often. Items of weight 0 are left out, unless all have it.

        copies: number of an item → how often it occurs.
        """
        weights, owners = self.rows.weights, self.rows.owners
        numbers = [number for number in copies if weights is None or weights[number]]
        if weights is None or not numbers:
            return {number: float(count) for number, count in copies.items()}
        counts, factors = np.array([copies[number] for number in numbers]), weights[numbers]
        of_rows = numbers if owners is None else owners[numbers]
        _, rows, blocks = np.unique(of_rows, return_inverse=True, return_counts=True)
        of_row = counts / blocks[rows]
        factors = factors * (of_row.sum() / (of_row * factors).sum())
        return dict(zip(numbers, (counts * factors).tolist(), strict=True))

    def firsts(self, numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
        """Items, each with the number of the first of its copies among them, see `copies`; for a block, that of the
        same block of the first row."""
        owners, of_content, of_rows = self.rows.owners, dict[bytes, int](), dict[int, int]()
        for number in numbers:
            start, end = number, number + 1
            if owners is not None:
                start, end = (int(np.searchsorted(owners, owners[number], side)) for side in ("left", "right"))
            if start not in of_rows:
                rows = [row for item in range(start, end) for row in self.item(item)]
                content = repr([(row.ids, row.spans, row.side, row.weight) for row in rows])
                digest = hashlib.blake2b(content.encode(), digest_size=16).digest()
                of_rows[start] = of_content.setdefault(digest, start)
            yield number, of_rows[start] + number - start

    def copies(self) -> dict[int, list[int]]:
        """Groups of identical items: number of the first one → numbers of all of them, in order. Items are identical if
        their ids, supervised spans, weights and preferences are equal, and for blocks all blocks of their rows are."""
        copies: dict[int, list[int]] = {}
        for number, first in self.firsts(range(self.items)):
            copies.setdefault(first, []).append(number)
        return copies


def prepare(split: DatasetSplit, renderer: Renderer, section: DataSection, vocabulary_size: int) -> TokenizedDataset:
    """Tokenize every row of a dataset split, and truncate it to `max_length` or split it into blocks; or take the rows
    from the cache.

    Args:
        split: The rows.
        renderer: Tokenizes them.
        section: The data section of the configuration.
        vocabulary_size: Vocabulary size of the model; rows of ids are checked against it.

    Raises:
        DataError: The chat template refuses a row, or an id is not in the vocabulary, unless `invalid_rows` drops such
            rows; a row is longer than `max_length` where `truncation` is error, or split and the row has a prompt; no
            row has a supervised token; more rows are dropped than `max_dropped` allows.
        ModelError: As `Renderer.rows`.
        ResourceError: There is no room on the disk.
    """
    settings = section.model_dump(
        include={"loss_on", "max_length", "truncation", "stride", "invalid_rows", "reasoning"}
    )
    settings |= {"counts_prompts": True} if section.prompt_loss_weight else {}  # which refuses turns of weight 0
    parts = json.dumps([_code_digest(), split.digest, renderer.digest, vocabulary_size, settings], sort_keys=True)
    key = hashlib.sha256(parts.encode()).hexdigest()
    tokenizer = ExampleTokenizer(renderer, section, vocabulary_size)

    def write(writer: TokenCacheWriter) -> None:
        with reading(f"tokenizing {split.name}", split.size) as advance:
            for batch in in_batches(islice(split.examples(advance), writer.read, None)):
                writer.add(*tokenizer.tokenize(batch))

    rows = token_cache.load_or_write(key, write)
    rows.report = total([split.invalid or Report(), rows.report])
    rows.report.duplicates = find_duplicates(split)
    _check_report(rows.report, split, section)
    if rows.weights is not None and not rows.weights.any():
        what, fix = "all rows have the weight 0", f"remove {WEIGHT} from data.columns"
        raise DataError(Problem(Code.DATA_EMPTY, what, split.source, "data.columns", fix))
    return TokenizedDataset(rows)


def check_positions(rows: TokenizedDataset, section: DataSection, limit: int | None) -> None:
    """Check that rows fit into the model's context. limit: see `model.load.context_length`.

    Raises:
        ConfigError: A row is longer.
    """
    longest = int(rows.rows.lengths.max())
    if limit is not None and longest > limit:
        what = f"is {section.max_length}, and the longest row has {longest} tokens, but the model has {limit} positions"
        raise ConfigError(Problem(Code.DATA_TOO_LONG, what, key="data.max_length", fix=f"set it to {limit}"))


def prepare_unrelated_text(renderer: Renderer, vocabulary_size: int, longest: int) -> tuple[TokenizedDataset, str]:
    """Tokenize `UNRELATED_TEXT`, one passage per row, each truncated to `longest` tokens.

    Returns:
        The rows, and why a loss on them is meaningless, or an empty text. Raises as `prepare`.
    """
    source = Source(path=str(UNRELATED_TEXT))
    section = DataSection(train=source, max_length=longest, truncation="keep_completion", max_dropped=1.0)
    rows = prepare(read_source(section.train_sources[0], section), renderer, section, vocabulary_size)
    unknown = {renderer.tokenizer.unk_token_id} - {None, renderer.eos}
    count = sum(id in unknown for row in rows.rows.rows() for id in row.ids) if unknown else 0
    return (
        rows,
        "the tokenizer does not know all characters of the passages" if count > 0.01 * rows.report.tokens else "",
    )


def unrelated_kinds() -> dict[str, list[int]]:
    """Kind of passages → the numbers of their rows in `UNRELATED_TEXT`."""
    found: dict[str, list[int]] = {}
    for number, line in enumerate(UNRELATED_TEXT.read_text(encoding="utf-8").splitlines()):
        found.setdefault(json.loads(line)["kind"], []).append(number)
    return found


def replay_numbers(own: int, earlier: int, share: float, seed: int) -> list[int]:
    """Draw the rows of an earlier run that are mixed into a run at a given fraction.

    If there are too few, all are repeated equally often before the rest is drawn.

    Args:
        own: Rows of the run.
        earlier: Rows of the earlier run.
        share: The fraction of earlier rows in the mix, between 0 and 1; at least one row is used.
        seed: Random seed.

    Returns:
        Numbers of rows of the earlier run.
    """
    whole, rest = divmod(max(1, round(own * share / (1 - share))), earlier)
    drawn = np.flatnonzero(random_mask(earlier, rest, np.random.default_rng([seed, 2])))
    return [*range(earlier)] * whole + drawn.tolist()


def mix_in(own: TokenizedDataset, earlier: TokenizedDataset, numbers: Sequence[int]) -> TokenizedDataset:
    """Append some rows of another dataset to a dataset, in a new cache entry. Its blocks become rows.

    Args:
        own: The dataset, all of whose rows are used.
        earlier: The other dataset.
        numbers: Row numbers of the other dataset; a number may occur more than once.

    Raises:
        ResourceError: There is no room on the disk.
    """
    places = [own.rows.directory.name, own.fingerprint, earlier.fingerprint]
    parts = json.dumps([_code_digest(), places, list(numbers)])

    def write(writer: TokenCacheWriter) -> None:
        replayed = (replace(earlier.rows.row(number), block=0) for number in numbers)
        rows = islice(chain(own.rows.rows(), replayed), writer.read, None)
        while batch := list(islice(rows, BATCH_ROWS)):
            writer.add(_report(batch), batch)

    rows = token_cache.load_or_write(hashlib.sha256(parts.encode()).hexdigest(), write)
    rows.report = total([own.report, _report([earlier.rows.row(number) for number in numbers])])
    return TokenizedDataset(rows)


def _report(rows: Sequence[TokenizedRow]) -> Report:
    """The report on rows that are used unchanged."""
    lengths = Counter(len(row.ids) for row in rows)
    supervised = sum(row.supervised for row in rows)
    tokens, count = sum(len(row.ids) for row in rows), len(rows)
    return Report(rows=count, written=count, tokens=tokens, supervised=supervised, lengths=lengths)


def open_tokenized(directory: Path) -> TokenizedDataset | None:
    """Open rows that another process has tokenized; None if this process cannot open them."""
    rows = token_cache.open_trusted(directory)
    return TokenizedDataset(rows) if rows is not None else None


@cache
def _code_digest() -> str:
    """SHA-256 of the source of this package. It is part of the cache key, so a release never uses cached rows that it
    would tokenize differently."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _check_report(report: Report, split: DatasetSplit, section: DataSection) -> None:
    """Raises DataError: there is no supervised token, or more rows are dropped than `max_dropped` allows."""
    reasons = "; ".join(report.reasons())
    if not report.supervised:
        what = f"no row has anything to learn ({reasons})"
        fix = f"raise data.max_length to {report.longest}" if report.longest > section.max_length else ""
        raise DataError(Problem(Code.DATA_EMPTY, what, split.source, fix=fix))
    share = report.dropped_rows / report.rows
    if share > section.max_dropped:
        what = f"{share:.0%} of the {split.name} rows would be dropped ({reasons})"
        fix = f"correct the rows, or raise data.max_dropped above {section.max_dropped}"
        raise DataError(Problem(Code.DATA_TOO_MANY_DROPPED, what, split.source, "data.max_dropped", fix))
