"""Turns examples into tokenized rows of at most `max_length` tokens: renders, encodes, and truncates or splits them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from loratune.codes import Code
from loratune.config import DataSection
from loratune.data import formats
from loratune.data.formats import Conversation, Example, Ids, Plain, Preference, Single, sides
from loratune.data.formats.reasoning import cut_problem, kind_of, reasoning_of
from loratune.data.remarks import size_of
from loratune.data.rendering import Renderer, spans, truncation
from loratune.data.rendering.spans import TokenizedRow
from loratune.data.report import Report
from loratune.data.sources.rows import reported
from loratune.errors import DataError, Problem

BATCH_ROWS, _BATCH_CHARACTERS = 1024, 4_000_000
"""The most examples, and characters, that are tokenized in one batch."""


@dataclass(frozen=True)
class ExampleTokenizer:
    """Turns examples into tokenized rows of at most `max_length` tokens: one for each answer, or several blocks."""

    renderer: Renderer
    section: DataSection
    vocabulary_size: int

    def tokenize(self, examples: Sequence[Example]) -> tuple[Report, list[TokenizedRow]]:
        """Returns the report on all examples, and the rows that are trained on. Raises as `prepare` does.

        If invalid rows are dropped, a batch with an invalid example is bisected until the example is alone.
        """
        try:
            return self._tokenize(examples)
        except DataError as error:
            problem = error.problems[0]
            if self.section.invalid_rows == "error" or problem.code == Code.DATA_TOO_LONG:
                raise
        if len(examples) == 1:
            report = Report(rows=1)
            report.drop_invalid(problem)
            return report, []
        middle = len(examples) // 2
        (report, rows), (more, others) = self.tokenize(examples[:middle]), self.tokenize(examples[middle:])
        report.extend(more)
        return report, rows + others

    def _tokenize(self, examples: Sequence[Example]) -> tuple[Report, list[TokenizedRow]]:
        report, kept = Report(rows=len(examples)), list[Example]()
        is_preference = any(isinstance(example, Preference) for example in examples)
        loss_on = "completion" if is_preference else self.section.loss_on
        for example in examples:
            if reason := formats.drop_reason(example, loss_on):
                report.drop(reason, example.where)
                continue
            kept.append(example)
            if isinstance(example, Conversation) and loss_on != "all":
                report.empty_answers += len(example.selected_turns(loss_on)) - len(example.supervised_turns(loss_on))
        if problems := [problem for example in kept if (problem := self._problem(example, loss_on))]:
            raise DataError(reported(problems))
        parts = [self._parts(example, loss_on) for example in kept]
        masked, singles = self.section.reasoning == "mask", [one for some in parts for one in some]
        whole = iter(self.renderer.rows(singles, loss_on, masks_reasoning=masked) if singles else [])
        rows = list[TokenizedRow]()
        for example, some in zip(kept, parts, strict=True):
            weight = 1.0 if isinstance(example, Preference) else example.weight
            last = len(some) - len(signs := _sides_of(example))
            made = [
                replace(next(whole), where=example.where, side=side, weight=weight) for side in (*[0] * last, *signs)
            ]
            is_split = max(len(row.ids) for row in made[last:]) > self.section.max_length
            is_text = isinstance(example, Plain) and example.whole
            is_split &= self.section.truncation_of(is_text=is_text) == "split"
            if own := self._split(made[last], report) if is_split else self._cut(made[last:], report):
                before = [row for one in made[:last] for row in self._cut([one], report, is_earlier=True)]
                rows += [*before, *own]
                self._count(example, before, own, report)
        return report, rows

    def _problem(self, example: Example, loss_on: str) -> Problem | None:
        """Returns why an example cannot be trained on; None if it can."""
        if isinstance(example, Ids):
            return formats.check_ids(example, self.vocabulary_size)
        if isinstance(example, formats.UnpairedPreference) and not example.desirable:
            return None
        return cut_problem(sides(example)[0], loss_on)

    def _parts(self, example: Example, loss_on: str) -> Sequence[Single]:
        """Returns what is rendered for an example: both answers of a pair, or the parts of a conversation."""
        return self.renderer.parts(example, loss_on) if isinstance(example, Conversation) else sides(example)

    def _count(
        self, example: Example, earlier: Sequence[TokenizedRow], own: Sequence[TokenizedRow], report: Report
    ) -> None:
        """Count what the user should see of an example that is trained on."""
        report.written += len(earlier) + len(own)
        report.own_rows += len(earlier)
        if isinstance(example, Conversation):
            report.add_kind(kind_of(example), report.written - 1)
            answers = example.supervised_turns(self.section.loss_on)
            have_reasoning = [bool(reasoning_of(example.messages[at])) for at in answers]
            if self.section.reasoning == "mask":
                report.masked += any(have_reasoning)
            elif self.renderer.template(example.arguments).empties_reasoning:
                report.empty_reasoning += have_reasoning.count(False)

    def _split(self, row: TokenizedRow, report: Report) -> list[TokenizedRow]:
        """Returns the blocks of a row that is longer than `max_length`. Raises DataError: it has a prompt."""
        length, stride = self.section.max_length, self.section.stride
        if row.answer is not None:
            what = f"the row has {len(row.ids)} tokens and a prompt, which each block of {length} would need"
            fix = "set data.truncation to auto or keep_completion, or raise data.max_length"
            raise DataError(Problem(Code.DATA_TOO_LONG, what, row.where, "data.truncation", fix))
        blocks = [block for block in truncation.split(row, length, stride) if block.supervised]
        if not blocks:
            report.drop(f"no block of max_length {length} has anything to learn", row.where)
            return []
        report.add_blocks(len(row.ids), blocks)
        return [replace(block, block=number) for number, block in enumerate(blocks)]

    def _cut(self, whole: list[TokenizedRow], report: Report, *, is_earlier: bool = False) -> list[TokenizedRow]:
        """Returns the truncated row, or the two rows of a pair; an empty list if they are dropped.

        is_earlier: whether the row is that of an earlier answer of an example whose last answer is trained on.
        """
        where, max_length = whole[0].where, self.section.max_length
        if len(whole) > 1 and whole[0].ids == whole[1].ids:
            report.drop("the chosen and the rejected answer have the same tokens", where)
            return []
        report.lengths.update(len(row.ids) for row in whole)
        rows = self._truncate(whole)
        if rows is None or not all(row.supervised for row in rows):
            if is_earlier:
                report.cut_answers += 1
                return []
            what = "an answer" if whole[0].side else "the answer"
            how = "longer than" if self.section.truncation == "drop" else f"{what} does not fit in"
            report.drop(f"{how} max_length {max_length}", where)
            return []
        report.truncated += any(len(row.ids) > max_length for row in whole)
        report.cut_answers += sum(len(row.spans) for row in whole) - sum(len(row.spans) for row in rows)
        report.tokens += sum(len(row.ids) for row in rows)
        report.supervised += sum(row.supervised for row in rows)
        return rows

    def _truncate(self, whole: list[TokenizedRow]) -> list[TokenizedRow] | None:
        """Returns the rows, truncated as `truncation` sets, or None if they are dropped."""
        section, bos = self.section, self.renderer.tokenizer.bos_token_id
        longest = max(len(row.ids) for row in whole)
        if longest <= section.max_length:
            return whole
        if section.truncation == "error":
            what = f"the row has {longest} tokens, more than data.max_length {section.max_length}"
            fix = "raise data.max_length, or set data.truncation to auto or drop"
            raise DataError(Problem(Code.DATA_TOO_LONG, what, whole[0].where, fix=fix))
        if section.truncation == "drop":
            return None
        if whole[0].side:
            return truncation.truncate_sides(whole, section.max_length, bos)
        row = truncation.truncate(whole[0], section.max_length, bos)
        return [row] if row else None


def _sides_of(example: Example) -> tuple[int, ...]:
    """Returns the `TokenizedRow.side` of each row of an example."""
    if isinstance(example, formats.PreferencePair):
        return spans.CHOSEN, spans.REJECTED
    if isinstance(example, formats.UnpairedPreference):
        return (spans.DESIRABLE if example.desirable else spans.UNDESIRABLE,)
    return (0,)


def in_batches(examples: Iterator[Example]) -> Iterator[list[Example]]:
    """Yields examples in batches limited by rows and by characters; fingerprints depend on the batch borders."""
    batch: list[Example] = []
    characters = 0
    for example in examples:
        batch.append(example)
        characters += size_of(example)
        if len(batch) >= BATCH_ROWS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
