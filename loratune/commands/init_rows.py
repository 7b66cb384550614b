"""What `loratune init` finds in the rows: their format, their lengths, and their answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loratune import data
from loratune.codes import Code
from loratune.commands import init_classes
from loratune.commands.init_classes import Choice, Classes
from loratune.config import DataSection
from loratune.config.keys import assignment, yaml_flow
from loratune.data import DatasetSplit, ProgressFactory, RawDatasets
from loratune.data.formats import FORMATS, JUDGED, PAIRS
from loratune.data.holding_out import random_mask
from loratune.data.packing import BatchLayout, Items
from loratune.data.rendering import Renderer
from loratune.data.sources import Row, open_source
from loratune.errors import DataError

MOST_ROWS = 20_000
"""Rows that are tokenized; of more, so many are drawn."""

LABEL_TOKENS = 16
"""Supervised tokens that a label has at most, in the median: long answers that are repeated are none."""

OBJECTIVES = {None: "sft", PAIRS: "dpo", JUDGED: "kto"}
"""What rows are → the objective that is proposed for them."""

_AS_CHAT: dict[tuple[str, ...], dict[str, str]] = {
    ("prompt_completion",): {"instruction": "prompt", "output": "completion"},
    ("preference",): {"instruction": "prompt"},
}
"""Formats of the files → the columns with which their texts go through the chat template."""
_MOST_GLUED = 0.9
"""In which share of the rows prompt and answer must run together."""
_BY_NAMES = "the fields fit no format as they are, and their names say what they hold"
_RUN_TOGETHER = "joined as text, prompt and answer would run together: so they go through the chat template"

_BATCH = 8
"""Rows of a batch whose beginnings are compared: the batch is chosen later, and much larger ones save hardly more."""

_NO_LIMIT = 2**31 - 1

_QUESTIONS = ("instruction", "question", "query", "prompt", "problem", "source")
_CONTEXTS = ("input", "context", "passage")
_CHOSEN = ("chosen", "preferred", "winner", "better", "chosen_response", "response_chosen", "response_j")
_REJECTED = ("rejected", "dispreferred", "loser", "worse", "rejected_response", "response_rejected", "response_k")
_TEXTS = ("content", "document", "body")
_CHATS = ("conversation", "dialogue", "dialog", "chat", "turns")
"""Names of fields, in lower case, that say what they hold."""


@dataclass(frozen=True)
class MeasuredRows:
    """The rows as the model's tokenizer reads them.

    Attributes:
        splits: All of them; the validation and test rows only where these are files of their own.
        columns: What `data.columns` must be for them to have a format, or the one that is meant.
        why_columns: The reason for these.
        all_lengths: (rows,), tokens of the rows of all splits that were tokenized.
        tokenized: The training rows that were tokenized.
        row_lengths: Their tokens, of each answer of a pair by itself.
        lengths: (rows,), their tokens; of pairs of answers, those of both.
        supervised: (rows,), the supervised tokens of these.
        saved: About the part of the tokens of batches that stands in the batch already, as rows begin alike.
        classes: The completions, where they are short and few.
        remarks: Lines on how the rows were read.
        together: How many answers a row has: two, if it is a pair.
    """

    splits: RawDatasets
    columns: dict[str, str]
    why_columns: str
    all_lengths: NDArray[np.int64]
    tokenized: Items
    row_lengths: NDArray[np.int64]
    lengths: NDArray[np.int64]
    supervised: NDArray[np.int64]
    saved: float
    classes: Classes
    remarks: list[str]
    together: int = 1

    @property
    def train(self) -> DatasetSplit:
        """The training rows."""
        return self.splits.train

    @property
    def held_out(self) -> int:
        """Rows of the validation files; 0 without any."""
        return len(self.splits.validation) if self.splits.validation else 0

    @property
    def is_sample(self) -> bool:
        """Whether only some of the training rows were tokenized."""
        return len(self.train) > MOST_ROWS


def measure(section: DataSection, renderer: Renderer, vocabulary: int, watch: ProgressFactory) -> MeasuredRows:
    """Read and check all rows, and tokenize them, or a sample of many, without cutting any.

    Args:
        section: Names the sources.
        renderer: What tokenizes them.
        vocabulary: How many tokens the model has.
        watch: Shows the passes over the rows.

    Raises:
        DataError, ModelError: As `data.read_datasets` and `data.prepare`; the fields of the rows fit no format, and
            their names do not say which they are either.
    """
    raw, columns, why, remarks = _read(section, chat=bool(renderer.tokenizer.chat_template), watch=watch)
    whole = section.model_copy(update={"columns": columns, "max_length": _NO_LIMIT})
    tokenized = [data.prepare(_sample(split), renderer, whole, vocabulary, watch).rows for split in raw.splits.values()]
    rows, kind = tokenized[0], raw.train.kind
    for split in raw.splits.values():
        split.check_kind(kind, OBJECTIVES[kind])
    together = 2 if kind == PAIRS else 1
    supervised = rows.supervised.reshape(-1, together).sum(1)
    is_short = kind is None and float(np.median(supervised)) <= LABEL_TOKENS
    classes = Classes.of(raw.train.examples(), len(raw.train), section.loss_on) if is_short else Classes()
    return MeasuredRows(
        splits=raw,
        columns=columns,
        why_columns=why,
        all_lengths=np.concatenate([split.lengths for split in tokenized]),
        tokenized=rows,
        row_lengths=rows.lengths,
        lengths=rows.lengths.reshape(-1, together).sum(1),
        supervised=supervised,
        together=together,
        saved=BatchLayout(rows, rows.lengths, "batch", _BATCH, _NO_LIMIT, 0, together).saving(),
        classes=classes,
        remarks=[*remarks, *raw.train.remarks(), *rows.report.reasons(), *classes.remarks()],
    )


def check_length(
    rows: MeasuredRows, section: DataSection, renderer: Renderer, vocabulary: int, watch: ProgressFactory
) -> list[str]:
    """Tokenize again with the `max_length` of a section, where it cuts rows.

    Returns:
        Lines on what it cuts.

    Raises:
        DataError: As `data.prepare`: more rows would have to be dropped than `max_dropped` allows.
    """
    if not (rows.all_lengths > section.max_length).any():
        return []
    return [
        f"{name}: {loss}"
        for name, split in rows.splits.splits.items()
        for loss in data.prepare(_sample(split), renderer, section, vocabulary, watch).report.losses()
    ]


def _sample(split: DatasetSplit) -> DatasetSplit:
    if len(split) <= MOST_ROWS or split.mask is not None:
        return split
    return replace(split, mask=random_mask(len(split), MOST_ROWS, np.random.default_rng(0)))


def _read(
    section: DataSection, *, chat: bool, watch: ProgressFactory
) -> tuple[RawDatasets, dict[str, str], str, Sequence[str]]:
    """All rows, the columns that they were read with, and why, and lines on other ways to read them.

    chat: whether the tokenizer has a chat template.
    """

    def read(columns: Mapping[str, str]) -> RawDatasets:
        return data.read_datasets(section.model_copy(update={"columns": columns}), 0, watch, divisible=True)

    try:
        raw = read(section.columns)
    except DataError as error:
        columns, choice = _columns_for(error, section, watch, chat=chat)
        return read(columns), columns, choice.why or _BY_NAMES, choice.remarks
    columns, choice = _other_columns(raw.train, section, watch, chat=chat)
    if columns:
        try:
            return read(columns), columns, choice.why or _RUN_TOGETHER, choice.remarks
        except DataError as error:  # as of rows that lack the field: then all are read as they are
            return (
                raw,
                section.columns,
                "",
                [f"read as they are, as not all fit data.columns {yaml_flow(columns)}: {error.problems[0]}"],
            )
    return raw, section.columns, "", choice.remarks


def _columns_for(
    error: DataError, section: DataSection, watch: ProgressFactory, *, chat: bool
) -> tuple[dict[str, str], Choice]:
    """Columns with which rows may be read whose fields fit no format, as an error says. Raises it if there are none."""
    problem = error.problems[0]
    unread = problem.code == Code.DATA_NO_QUESTION and problem.key == "data.columns"
    if section.columns or not (unread or problem.code == Code.DATA_FORMAT_UNKNOWN):
        raise error
    columns, choice = propose_columns(_first_fields(section), chat=chat), Choice()
    if not unread and columns.keys() <= {"text"}:
        choice = _choose(section, columns.get("text", ""), watch, chat=chat)
        columns = choice.columns or columns
    if columns:
        return columns, choice
    if unread:
        raise error
    known = ", or ".join(" + ".join(format.keys) for format in FORMATS)
    columns = dict.fromkeys(init_classes.question_and_answer(chat), "YOURS")
    fix = f"rows have {known}; say which is which: {assignment('data.columns', columns)}"
    fix += ", or with chosen and rejected where answers are compared"
    raise DataError([replace(problem, fix=fix) for problem in error.problems]) from None


def _choose(section: DataSection, text: str, watch: ProgressFactory, *, chat: bool) -> Choice:
    """As `init_classes.choose`, of the training rows."""
    parts = [part for source in section.train_sources for part in open_source(source)]
    with watch("looking for classes", sum(part.size for part in parts)) as advance:
        rows = (row for part in parts for row in part.rows(advance) if isinstance(row, Row))
        return init_classes.choose(rows, text, chat=chat)


def _first_fields(section: DataSection) -> dict[str, Any]:
    """The fields of the first row."""
    rows = (row for part in open_source(section.train_sources[0]) for row in part.rows())
    return next(row.values for row in rows if isinstance(row, Row))


def _other_columns(
    split: DatasetSplit, section: DataSection, watch: ProgressFactory, *, chat: bool
) -> tuple[dict[str, str], Choice]:
    """Better columns for rows that have a format as they are; empty where there are none."""
    if section.columns or section.format != "auto":
        return {}, Choice()
    if tuple(split.formats) == ("text",):
        fields = {name for file in split.index.files for name in file.parser.fields}
        choice = _choose(section, "text", watch, chat=chat) if len(fields) > 1 else Choice()
        return choice.columns, choice
    return (_columns_of_chat(split) if chat else {}), Choice()


def _columns_of_chat(split: DatasetSplit) -> dict[str, str]:
    """Columns that put rows of text through the chat template, where prompt and answer would run into one word as they
    stand; empty for all other rows."""
    columns = _AS_CHAT.get(tuple(split.formats), {})
    if not columns or any("prompt" not in file.parser.fields for file in split.index.files):
        return {}
    joints = split.joints
    return columns if joints.together >= _MOST_GLUED * joints.rows else {}


def propose_columns(fields: Mapping[str, Any], *, chat: bool) -> dict[str, str]:
    """`data.columns` for a row whose fields have names that say what they hold; empty where that is not clear.

    Args:
        fields: The row.
        chat: Whether questions and answers may become conversations; else they are joined as they stand.
    """

    def named(known: Sequence[str]) -> list[str]:
        return [name for word in known for name in fields if name.lower() == word]

    def texts(known: Sequence[str]) -> list[str]:
        return [name for name in named(known) if isinstance(fields[name], str)]

    questions, contexts, answers = texts(_QUESTIONS), texts(_CONTEXTS), texts(init_classes.ANSWERS)
    if not questions:
        questions, contexts = contexts, []
    columns: dict[str, str] = {}
    chats, chosen, rejected = named(_CHATS), named(_CHOSEN), named(_REJECTED)
    if len(chosen) == len(rejected) == 1:
        is_instruction = chat and isinstance(fields[chosen[0]], str)
        if len(questions) == 1:
            columns = {"instruction" if is_instruction else "prompt": questions[0]}
            columns |= {"input": contexts[0]} if is_instruction and len(contexts) == 1 else {}
        columns |= {"chosen": chosen[0], "rejected": rejected[0]}
    elif len(chats) == 1 and isinstance(turns := fields[chats[0]], list) and turns and isinstance(turns[0], dict):
        columns = {"messages" if "role" in turns[0] else "conversations": chats[0]}
    elif len(questions) == len(answers) == 1 and chat and len(contexts) <= 1:
        columns = {"instruction": questions[0], "output": answers[0]}
        columns |= {"input": contexts[0]} if contexts else {}
    elif len(questions) == len(answers) == 1 and not contexts:
        columns = {"prompt": questions[0], "completion": answers[0]}
    elif not questions and not answers and len(found := texts(_TEXTS)) == 1:
        columns = {"text": found[0]}
    return {ours: theirs for ours, theirs in columns.items() if ours != theirs}
