"""The first pass over the data: every row of every file is read, checked and added to an index.

The index has seven numbers per row (56 bytes): hashes of its content, prompt, completion, group and system message,
and its line.
"""

import difflib
import hashlib
import json
import math
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from loratune.codes import Code
from loratune.config import DataSection, Source
from loratune.data import formats
from loratune.data.formats import Conversation, Example, Ids, Message, Plain, Preference, UnpairedPreference, sides
from loratune.data.formats.recognition import Parser
from loratune.data.report import Report
from loratune.data.sources import GivenRows, RowSource, format_error, no_rows_error, open_source
from loratune.data.sources.rows import MAX_PROBLEMS, Row, Unreadable, line_of, place_parts, reported, to_json_line
from loratune.errors import DataError, Problem
from loratune.events import Advance, reading

RowMask: TypeAlias = NDArray[np.bool_]
"""(rows,) bool: the selected rows."""

COLUMNS = 7
EXACT, FOLDED, LINE, PROMPT, COMPLETION, GROUP, SYSTEM = range(COLUMNS)
"""The columns of the index: a hash of the content, a hash of the content with white space folded, the line or row, and
hashes of the prompt, the completion, the value of `group_by` and the system message. For a row without a prompt, or
without a value to group by, that hash is replaced by the folded hash of the content; without a system message, by 0.
"""

CONTENT_HASH = "blake2b-64 of content_key, 1"
"""Name and version of the content hash, stored with the hashes. Raise the number whenever the hashes change."""


@dataclass(frozen=True)
class IndexedFile:
    """One file of rows, or one split of a hub dataset.

    Attributes:
        source: The source of its rows.
        parser: Converts its rows to examples.
        start: The number of its first row among the rows of all files.
        rows: The number of its rows.
        first: The place of its first row.
    """

    source: RowSource
    parser: Parser
    start: int
    rows: int
    first: str


@dataclass(frozen=True)
class RowIndex:
    """All rows of some sources.

    Attributes:
        files: The files that have rows.
        counts: The number of rows of each source.
        columns: (rows, 7); for the columns see `EXACT`.
        invalid: Report on the invalid rows that were dropped; None if such rows are an error.
        empty: The names of files without rows, unless only a slice is read.
    """

    files: tuple[IndexedFile, ...]
    counts: tuple[int, ...]
    columns: NDArray[np.int64]
    invalid: Report | None = None
    empty: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.columns)

    def where(self, number: int) -> str:
        """The place of a row, by its number among all rows."""
        file = next(file for file in self.files if number < file.start + file.rows)
        before, _, behind = place_parts(file.first)
        return f"{before}{self.columns[number, LINE]}{behind}"

    def examples(self, mask: RowMask, advance: Advance) -> Iterator[Example]:
        """Read the rows of a mask once more, in order, as examples. advance: see `FileSlice.rows`.

        Raises:
            DataError: A file has changed since it was indexed.
        """
        for file in self.files:
            lines = self.columns[file.start : file.start + file.rows, LINE]
            wanted, found = mask[file.start : file.start + file.rows], 0
            if not wanted.any():
                advance(file.source.size)
                continue
            for row in file.source.rows(advance):
                if found == file.rows or isinstance(row, Problem) or int(line_of(row.where)) != lines[found]:
                    if self.invalid is None:
                        raise _changed_error(file)
                    continue
                found += 1
                if wanted[found - 1]:
                    try:
                        yield file.parser(row)
                    except formats.RowError:
                        raise _changed_error(file) from None
            if found < file.rows:
                raise _changed_error(file)


def _changed_error(file: IndexedFile) -> DataError:
    what, fix = "the file has changed while it was being read", "start again"
    return DataError(Problem(Code.DATA_UNREADABLE, what, file.source.name, fix=fix))


def index_rows(sources: Sequence[Source | GivenRows], section: DataSection, group_by: str | None = None) -> RowIndex:
    """Read and check every row of the sources.

    Args:
        sources: Where the rows are read from.
        section: How the rows are read.
        group_by: The field that the rows will be grouped by.

    Raises:
        DataError: As `open_source` and `Parser`; up to 10 rows do not fit their format (with a note that there may be
            more), unless such rows are dropped; a source has no rows; or no row has a value of `group_by`.
    """
    parts_by_source = [(source, open_source(source, section.sample_by)) for source in sources]
    indexer = _Indexer(section, group_by, Report() if section.invalid_rows == "drop" else None)
    files, counts, empty, invalid = list[IndexedFile](), list[int](), list[str](), indexer.invalid
    with reading("reading", sum(part.size for _, parts in parts_by_source for part in parts)) as advance:
        for source, parts in parts_by_source:
            try:
                indexed = [indexer.add_file(part, advance) for part in parts]
            except DataError as error:
                raise format_error(error.problems, source, section.sample_by) from None
            found = [file for file in indexed if file]
            counts.append(sum(file.rows for file in found))
            if not counts[-1]:
                raise no_rows_error(source, "; ".join(invalid.reasons()) if invalid else "")
            files += found
            empty += [part.name for part, file in zip(parts, indexed, strict=True) if not (file or source.split)]
    columns = np.frombuffer(indexer.numbers, dtype=np.int64).reshape(-1, COLUMNS)
    if group_by is not None and bool((columns[:, GROUP] == columns[:, FOLDED]).all()):
        raise _no_groups_error(files, group_by)
    return RowIndex(tuple(files), tuple(counts), columns, invalid, tuple(empty))


def _no_groups_error(files: Sequence[IndexedFile], name: str) -> DataError:
    names = {field for file in files for field in file.parser.fields}
    what, fix = f"`{name}` is null in every row", "name another field, or leave the setting out"
    if name not in names:
        what = f"no row has a field `{name}`; the fields are {formats.quote(names)}"
        near = difflib.get_close_matches(name, sorted(names), n=1, cutoff=0.5)
        fix = f"did you mean `{near[0]}`?" if near else fix
    return DataError(Problem(Code.DATA_FORMAT, what, files[0].source.name, "data.group_by", fix))


@dataclass(frozen=True)
class _Indexer:
    """Adds the rows of files to `numbers`. invalid: collects invalid rows; None: they are an error."""

    section: DataSection
    group_by: str | None
    invalid: Report | None
    numbers: "array[int]" = field(default_factory=lambda: array("q"))

    def add_file(self, source: RowSource, advance: Advance) -> IndexedFile | None:
        """Index one file; None if it has no rows."""
        start, parser, first = len(self.numbers) // COLUMNS, None, ""
        problems: list[Problem] = []
        try:
            for row in source.rows(advance):
                problem = row if isinstance(row, Problem) else None
                if isinstance(row, Row):
                    if parser is None:
                        parser, first = Parser(row, self.section), row.where
                    try:
                        self._add(parser(row), row)
                    except formats.RowError as error:
                        problem = error.at(row.where)
                if problem and self.invalid is not None:
                    self.invalid.rows += 1
                    self.invalid.drop_invalid(problem)
                elif problem:
                    problems.append(problem)
                    if len(problems) == MAX_PROBLEMS:
                        break
        except DataError as error:
            problems += error.problems
        if problems:
            raise DataError(reported(problems, source.name))
        return (
            None if parser is None else IndexedFile(source, parser, start, len(self.numbers) // COLUMNS - start, first)
        )

    def _add(self, example: Example, row: Row) -> None:
        """Add a row. Raises RowError: its value of `group_by` cannot be read."""
        loss_on = self.section.loss_on
        exact, folded = _hash(content_key(example)), _hash(content_key(example, folded=True))
        prompt = prompt_key(example, loss_on)
        group = group_key(row.values, self.group_by) if self.group_by is not None else None
        prompt_hash, group_hash = (folded if key is None else _hash(key) for key in (prompt, group))
        completion = _hash(completion_key(example, loss_on))
        system = _hash(text.encode()) if (text := formats.system_message(example)) else 0
        self.numbers.extend((exact, folded, int(line_of(row.where)), prompt_hash, completion, group_hash, system))


def _hash(content: bytes) -> int:
    """64 bits of BLAKE2b as a signed integer, the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


def group_key(fields: Mapping[str, Any], name: str) -> bytes | None:
    """The value of a field, as JSON: objects are equal in any order of their fields, and 1 equals 1.0.

    Args:
        fields: A row, under the names of the data.
        name: The name of the field.

    Returns:
        The key; None if the field is missing, null or NaN.

    Raises:
        RowError: The value cannot be read.
    """
    value = fields.get(name)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, Unreadable):
        raise formats.type_error(f"`{name}`", "a value to group by", value)
    try:
        if not isinstance(value, str | int):
            value = json.loads(to_json_line({name: value}), parse_float=_number)[name]
        return json.dumps(value, sort_keys=True).encode()
    except RecursionError:
        raise formats.RowError(f"`{name}` is nested too deeply") from None


def _number(written: str) -> float | int:
    number = float(written)
    return int(number) if number.is_integer() else number


# Keys: bytes that are equal for two rows if and only if their contents, prompts or completions are equal

_SEPARATOR = "\ud800"
"""Separates the texts of a key; no text of a row contains it."""
_WHITE_SPACE, _PIECE = re.compile(r"\s"), 1 << 20
"""Where a long text can be divided, and into pieces of about how many characters."""
_OTHER_SIDE = "\ud801".encode(errors="surrogatepass")
"""Separates the keys of preferred answers and others."""


def content_key(example: Example, folded: bool = False) -> bytes:
    """The content of an example.

    It depends on which answer is preferred, but not on which parts are supervised.

    Args:
        example: Any example.
        folded: Whether white space is folded: runs become one space, and texts are stripped.
    """
    if isinstance(example, Preference):
        kind = f"{example.desirable}".encode() if isinstance(example, UnpairedPreference) else b"pair"
        return _OTHER_SIDE.join([*(content_key(side, folded) for side in sides(example)), kind])
    if isinstance(example, Ids):
        return _join_ids(example.ids)
    if isinstance(example, Plain):
        return _join([example.prompt, example.completion], folded)
    return _join(_text_parts(example.messages, _settings(example)), folded)


def prompt_key(example: Example, loss_on: str) -> bytes | None:
    """The prompt of an example: everything before the first supervised part, with white space folded.

    Args:
        example: Any example.
        loss_on: As in the configuration; `all` is treated as `completion`.

    Returns:
        The key; None if the prompt is empty or white space.
    """
    if isinstance(example, Preference):
        return prompt_key(sides(example)[0], "completion")
    if isinstance(example, Plain):
        return _join([example.prompt, ""], folded=True) if example.prompt.strip() else None
    first = _first_supervised(example, loss_on)
    if first == 0:
        return None
    if isinstance(example, Ids):
        return _join_ids(example.ids[:first])
    return _join(_text_parts(example.messages[:first], _settings(example)), folded=True)


def completion_key(example: Example, loss_on: str) -> bytes:
    """The part of an example that is not in `prompt_key`, with white space folded."""
    if isinstance(example, Preference):
        return _OTHER_SIDE.join(completion_key(side, "completion") for side in sides(example))
    if isinstance(example, Plain):
        return _join([example.completion, ""], folded=True)
    first = _first_supervised(example, loss_on)
    if isinstance(example, Ids):
        return _join_ids(example.ids[first:])
    return _join(_text_parts(example.messages[first:], ()), folded=True)


def _first_supervised(example: Conversation | Ids, loss_on: str) -> int:
    """The number of the first supervised message or token."""
    if isinstance(example, Conversation):
        turns = example.selected_turns("completion" if loss_on == "all" else loss_on)
        return min(turns, default=len(example.messages))
    if example.labels is None:
        return 0
    return next(number for number, label in enumerate(example.labels) if label != formats.IGNORED)


def _join_ids(ids: Sequence[int]) -> bytes:
    return repr(tuple(ids)).encode()


def _join(texts: Iterable[str], folded: bool) -> bytes:
    if folded:
        texts = (" ".join(filter(None, _folded_pieces(text))) for text in texts)
    return _SEPARATOR.join(texts).encode(errors="surrogatepass")


def _settings(chat: Conversation) -> tuple[Any, ...]:
    """What a row gives to the template besides its messages."""
    return (*chat.tools, dict(chat.arguments)) if chat.arguments else chat.tools


def _folded_pieces(text: str) -> Iterator[str]:
    """The text with single spaces between words, in pieces: a list of all words takes ten times its memory."""
    start = 0
    while start < len(text):
        border = _WHITE_SPACE.search(text, start + _PIECE)
        end = border.start() if border else len(text)
        yield " ".join(text[start:end].split())
        start = end


def _text_parts(messages: Sequence[Message], settings: Sequence[Any]) -> Iterator[str]:
    yield ""  # at least three texts, where a Plain has two
    for message in messages:
        yield message["role"]
        yield message["content"]
        if len(message) > 2:
            yield json.dumps({name: message[name] for name in message if name != "content"}, sort_keys=True)
    if settings:
        yield json.dumps(settings, sort_keys=True)
