"""The prompted base: what the base answers if a prompt tells it the task, by examples or by words.

Its prompts end as those of the adapter do, so that its answers are scored in the same way.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loratune import data
from loratune.adapter.directory import AdapterDirectory
from loratune.codes import Code
from loratune.data import DatasetSplit
from loratune.data.formats import Conversation, Example, Message, Plain
from loratune.data.rendering import Renderer
from loratune.errors import ConfigError, DataError, Problem
from loratune.text import plural

FEW_SHOT = 8
"""How many examples are shown where answers are labels, unless others are asked for."""
PLACE, ALONE = "{prompt}", "nothing but its labels"
Ids = tuple[int, ...]


@dataclass(frozen=True)
class BasePrompts:
    """How the base is told the task.

    Attributes:
        few_shot: How many training rows it is shown before each question; None: `FEW_SHOT` where answers are labels; 0
            without words: the base is not prompted.
        words: A prompt with `{prompt}` in the place of the question; None: one that names the labels.
    """

    few_shot: int | None = None
    words: str | None = None

    @property
    def is_asked(self) -> bool:
        """Whether the user asks for it; where answers are labels, it is compared anyway."""
        return self.few_shot is not None or self.words is not None

    def check(self) -> None:
        """Raises ConfigError: the words have no place for the question, or fewer than no examples are asked for."""
        if self.few_shot is not None and self.few_shot < 0:
            raise ConfigError(Problem(Code.USAGE_BAD_VALUE, f"{self.few_shot} is less than 0", key="few_shot"))
        if self.words is not None and PLACE not in self.words:
            what, fix = f"has no {PLACE}", f"write {PLACE} where the question belongs"
            raise ConfigError(Problem(Code.USAGE_BAD_VALUE, what, key="base_prompt", fix=fix))

    def check_shown(self, shown: int) -> None:
        """Raises DataError: fewer training rows can be shown than the user asks for."""
        if self.few_shot is not None and shown < self.few_shot:
            what = f"{plural(self.few_shot, 'example')} asked for, and {shown:,} training rows have other prompts"
            raise DataError(Problem(Code.DATA_EMPTY, what, key="few_shot", fix="ask for fewer"))

    def variants(self, labels: Sequence[str]) -> dict[str, tuple[int, str]]:
        """Name → examples and words of each prompt to try. labels: those of the rows, if their answers are labels."""
        shots = self.few_shot or 0
        if self.is_asked:
            name = " and ".join(["its words"] * (self.words is not None) + [plural(shots, "example")] * bool(shots))
            return {name: (shots, self.words or PLACE)} if name else {}
        if not labels:
            return {}
        named = ", ".join(label.strip() for label in labels)
        return {
            f"{FEW_SHOT} examples": (FEW_SHOT, PLACE),
            "a prompt that names the labels": (0, f"Answer with one of: {named}.\n\n{PLACE}"),
        }


def questions(split: DatasetSplit, places: Sequence[str]) -> list[Example] | None:
    """The rows at some places, if each is a question with one answer, which is its last message; else None."""
    by_place = {one.where: one for one in split.examples()}
    found = [one for place in places if (one := by_place.get(place)) is not None and _is_question(one)]
    return found if len(found) == len({*places}) == len(places) else None


def _is_question(example: Example) -> bool:
    if isinstance(example, Conversation):
        last = len(example.messages) - 1
        return last > 0 and example.supervised_turns("assistant")[-1:] == (last,)
    return isinstance(example, Plain) and not example.whole


def training_examples(adapter: AdapterDirectory, scored: Sequence[Example], count: int) -> list[Example]:
    """Some rows that an adapter was trained on, none of them with a prompt that is scored; see `draw`.

    There may be fewer of them. Raises DataError: they cannot be read any more, or are not known.
    """
    if (run := adapter.run) is None:
        what, fix = "another program made the adapter, and its training rows are not known", "leave out `few_shot=...`"
        raise DataError(Problem(Code.DATA_NOT_FOUND, what, str(adapter.path), "few_shot", fix))
    asked = {_question(example) for example in scored}
    rows = data.read_datasets(run.data, run.training.seed, test=False).train
    found = [one for one in rows.examples() if _is_question(one) and _question(one) not in asked]
    return draw(found, count, run.training.seed)


def draw(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """Some examples in an order of chance, with each answer equally often as far as there are rows of it."""
    random = np.random.default_rng([seed, count])
    by_answer = defaultdict[str, list[Example]](list)
    for number in random.permutation(len(examples)).tolist():
        by_answer[_answer(examples[number])].append(examples[number])
    found: list[Example] = []
    for turn in range(max(map(len, by_answer.values()), default=0)):
        answers = [own[turn] for own in by_answer.values() if turn < len(own)]
        found += [answers[number] for number in random.permutation(len(answers)).tolist()]
        if len(found) >= count:
            break
    return found[:count]


def prompts(
    renderer: Renderer, rows: Sequence[Example], shown: Sequence[Example], words: str, system: str = ""
) -> Iterator[Ids]:
    """The prompts of rows with examples before the question, and words around it.

    Args:
        renderer: Renders them.
        rows: The rows, whose answers are left out.
        shown: The examples: earlier turns of a conversation, or texts before it.
        words: A text with `{prompt}`.
        system: The system message of conversations without one.

    Raises:
        DataError: The chat template refuses one.
    """
    before = "".join(f"{one.prompt}{one.completion}\n\n" for one in shown if isinstance(one, Plain))
    turns = [turn for one in shown if isinstance(one, Conversation) for turn in one.messages if not _is_system(turn)]
    for row in rows:
        if isinstance(row, Plain):
            yield renderer.prompt(before + words.replace(PLACE, row.prompt), row.where)
            continue
        assert isinstance(row, Conversation)
        asked = [*row.messages[:-1]]
        own = [turn for turn in asked if _is_system(turn)] or (
            [{"role": "system", "content": system}] if system else []
        )
        last = {**asked[-1], "content": words.replace(PLACE, asked[-1]["content"])}
        rest = [turn for turn in asked[:-1] if not _is_system(turn)]
        yield renderer.prompt([*own, *turns, *rest, last], row.where, row.tools, row.arguments)


def _is_system(turn: Message) -> bool:
    return turn["role"] in ("system", "developer")


def _question(example: Example) -> Any:
    """What identifies the question of an example."""
    if isinstance(example, Plain):
        return " ".join(example.prompt.split())
    if isinstance(example, Conversation):
        return tuple((turn["role"], " ".join(str(turn["content"]).split())) for turn in example.messages[:-1])
    return example.where


def _answer(example: Example) -> str:
    return example.completion if isinstance(example, Plain) else str(getattr(example, "messages", [{}])[-1])
