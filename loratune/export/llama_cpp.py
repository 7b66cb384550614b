"""A GGUF file run in llama.cpp, and its answers compared with those of the adapter on its base."""

import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loratune.codes import Code
from loratune.errors import AdapterError, Problem
from loratune.events import counting
from loratune.system.containers import threads

PACKAGE = "xllamacpp"
SHARE = (0.9, 1.1)
"""How much of the adapter's effect on the log-probabilities must be there: all of it, up to the rounding of llama.cpp,
which computes with fewer bits. A scale that is lost shows as a factor of 2 and more."""
ROUNDING = 0.05
"""A mean difference of a log-probability, in nats, that counts as rounding, however small the adapter's effect."""
_PROGRAM = Path(__file__).with_name("llama_cpp_process.py")
_ERROR = re.compile(r"\w+(Error|Exception)\b")


@dataclass(frozen=True)
class ScoredAnswer:
    """A prompt, and the adapter's answer to it.

    Attributes:
        request: A text under `prompt`, or `messages` with `tools`, as llama.cpp takes it; empty if there are only ids.
        prompt: The ids of the rendered prompt.
        answer: The ids of the adapter's likeliest answer.
        adapted: The log-probability of each of them.
        base: The same by the base alone.
        second: For each, the log-probability of the likeliest other token.
    """

    request: Mapping[str, Any]
    prompt: Sequence[int]
    answer: Sequence[int]
    adapted: Sequence[float]
    base: Sequence[float]
    second: Sequence[float]


@dataclass(frozen=True)
class LlamaCppResult:
    """How llama.cpp answers, compared with the adapter.

    Attributes:
        answers: How many answers were compared.
        tokens: How many tokens they have.
        mean: The mean difference of their log-probabilities.
        largest: The largest one.
        share: The share of the adapter's effect on them that llama.cpp shows.
        exact: Greedy answers that are equal.
        ties: Greedy answers that differ where two tokens are equally likely, up to the largest difference.
        counts: Rendered prompts whose tokens were counted; all counts are equal.
    """

    answers: int
    tokens: int
    mean: float
    largest: float
    share: float
    exact: int
    ties: int
    counts: int

    def as_json(self) -> dict[str, Any]:
        """All metrics by name."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.answers} answers of {self.tokens} tokens: log-probabilities within {self.mean:.3f} on average and "
            f"{self.largest:.3f} at most, {self.share:.1%} of the adapter's effect; greedy {self.exact} equal, "
            f"{self.ties} ties; {self.counts} rendered prompts of equal length"
        )


def is_installed() -> bool:
    """Whether llama.cpp can be run."""
    return find_spec(PACKAGE) is not None


def compare(
    model: Path, adapter: Path | None, template: str | None, questions: Sequence[ScoredAnswer], ends: Collection[int]
) -> LlamaCppResult:
    """Run a GGUF file.

    Args:
        model: The model.
        adapter: A GGUF file of an adapter for it.
        template: A chat template in place of the model's own.
        questions: The prompts, with the adapter's answers.
        ends: The tokens that end an answer.

    Raises:
        AdapterError: llama.cpp fails; it does not compute what the adapter computes; or it renders or tokenizes a
            prompt differently.
    """
    given = [{"request": dict(q.request), "prompt": [*q.prompt], "answer": [*q.answer]} for q in questions]
    request = {"model": str(model), "adapter": str(adapter) if adapter else None, "template": template}
    answers = _run({**request, "questions": given, "threads": threads()})
    for question, answer in zip(questions, answers, strict=True):
        if answer["count"] not in (None, len(question.prompt)):
            what = f"llama.cpp makes {answer['count']} tokens of a prompt that has {len(question.prompt)}: "
            raise AdapterError(Problem(Code.EXPORT_DIFFERS, what + json.dumps(dict(question.request))[:80]))
    pairs = [
        (found - base, adapted - base)
        for question, answer in zip(questions, answers, strict=True)
        for found, adapted, base in zip(answer["logprobs"], question.adapted, question.base, strict=True)
    ]
    differences = [abs(found - adapted) for found, adapted in pairs]
    mean, largest = sum(differences) / len(pairs), max(differences)
    effect = sum(adapted * adapted for _, adapted in pairs)
    share = sum(found * adapted for found, adapted in pairs) / effect if effect else math.nan
    if not mean <= ROUNDING and not SHARE[0] <= share <= SHARE[1]:
        what = f"in llama.cpp it has {share:.1%} of its effect: log-probabilities differ by {mean:.3f} on average"
        raise AdapterError(Problem(Code.EXPORT_DIFFERS, what, str(model)))
    equal = [_is_greedy(*pair, largest, ends) for pair in zip(questions, answers, strict=True)]
    counts = sum(answer["count"] is not None for answer in answers)
    return LlamaCppResult(len(answers), len(pairs), mean, largest, share, sum(equal), len(equal) - sum(equal), counts)


def _is_greedy(question: ScoredAnswer, answer: Mapping[str, Any], largest: float, ends: Collection[int]) -> bool:
    """Whether the greedy answer is that of the adapter; if not, they differ at a tie.

    Raises AdapterError: they differ where the adapter prefers its own token by more than rounding explains, which is
    twice the largest difference.
    """
    expected = [None if token in ends else token for token in question.answer]
    found = [*answer["greedy"], None]  # None: the answer ends
    at = next((at for at, pair in enumerate(zip(expected, found, strict=False)) if pair[0] != pair[1]), None)
    if at is None:
        return True
    gap = question.adapted[at] - question.second[at]
    if not gap <= 2 * largest:
        what = f"in llama.cpp the answer to {json.dumps(dict(question.request))[:80]} differs at token {at + 1}, which "
        what += f"the adapter prefers to any other by {gap:.3f} nats, and rounding explains {2 * largest:.3f}"
        raise AdapterError(Problem(Code.EXPORT_DIFFERS, what))
    return False


def _run(request: Mapping[str, Any]) -> list[dict[str, Any]]:
    """llama.cpp's answers, see `llama_cpp_process`. Raises AdapterError: it fails."""
    answers: list[dict[str, Any]] = []
    with (
        tempfile.TemporaryFile("w+") as asked, tempfile.TemporaryFile("w+", errors="replace") as messages,
        counting("comparing answers of llama.cpp", len(request["questions"])) as advance,
    ):  # fmt: skip
        json.dump(request, asked)
        asked.seek(0)
        # -P: without it, Python would import the modules beside the script
        with subprocess.Popen(
            [sys.executable, "-P", str(_PROGRAM)], stdin=asked, stdout=subprocess.PIPE, stderr=messages, text=True
        ) as process:
            try:
                for line in process.stdout or ():
                    answers.append(json.loads(line))
                    advance(1)
            except BaseException:
                process.kill()
                raise
        if process.returncode or len(answers) < len(request["questions"]):
            messages.seek(0)
            lines = [line.strip() for line in messages if line.strip()]
            errors = [line for line in lines if _ERROR.match(line)]  # what llama.cpp logs as it ends comes after them
            what = f"llama.cpp failed: {' | '.join((errors or lines)[-3:]) or f'exit code {process.returncode}'}"
            raise AdapterError(Problem(Code.EXPORT_FAILED, what, str(request["model"])))
    return answers
