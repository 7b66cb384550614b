"""Runs a GGUF file in llama.cpp, and compares its answers with those of the adapter on its base."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from loratune.codes import Code
from loratune.errors import AdapterError, Problem
from loratune.events import progress
from loratune.system.environment import threads

PACKAGE = "xllamacpp"
SCRIPT = Path(__file__).with_name("llama_cpp_process.py")
SHARE = (0.9, 1.1)
"""How much of the adapter's effect on the log-probabilities must be there: all of it, up to the rounding of llama.cpp,
which computes with fewer bits. A scale that is lost shows as a factor of 2 and more."""
ROUNDING = 0.05
"""A mean difference of a log-probability, in nats, that counts as rounding, however small the adapter's effect."""
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
    """

    request: Mapping[str, Any]
    prompt: Sequence[int]
    answer: Sequence[int]
    adapted: Sequence[float]
    base: Sequence[float]


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
        ties: Greedy answers that differ where two tokens are equally likely, up to twice the largest difference.
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
            raise AdapterError(Problem(Code.EXPORT_DIFFERS, what + _shortened(question)))
    found = np.concatenate([answer["logprobs"] for answer in answers])
    adapted, base = (np.concatenate([getattr(q, name) for q in questions]) for name in ("adapted", "base"))
    differences, effect = np.abs(found - adapted), adapted - base
    mean, largest = float(differences.mean()), float(differences.max())
    share = float((found - base) @ effect / (effect @ effect)) if effect.any() else math.nan
    if not mean <= ROUNDING and not SHARE[0] <= share <= SHARE[1]:
        what = f"in llama.cpp it has {share:.1%} of its effect: log-probabilities differ by {mean:.3f} on average"
        raise AdapterError(Problem(Code.EXPORT_DIFFERS, what, str(model)))
    equal = [_is_greedy(*pair, largest, ends) for pair in zip(questions, answers, strict=True)]
    counts = sum(answer["count"] is not None for answer in answers)
    return LlamaCppResult(len(answers), len(found), mean, largest, share, sum(equal), len(equal) - sum(equal), counts)


def _is_greedy(question: ScoredAnswer, answer: Mapping[str, Any], largest: float, ends: Collection[int]) -> bool:
    """Whether the greedy answer of llama.cpp is that of the adapter; if not, they differ at a tie.

    Raises:
        AdapterError: Where they first differ, llama.cpp prefers its own token by more than rounding explains, which is
            twice the largest difference.
    """
    for at, (token, top) in enumerate(zip(question.answer, answer["top"], strict=True)):
        if top["id"] == token or (top["id"] in ends and token in ends):
            continue
        gap = top["logprob"] - answer["logprobs"][at]
        if not gap <= 2 * largest:
            what = f"in llama.cpp the answer to {_shortened(question)} differs at token {at + 1}: it prefers another "
            what += f"token by {gap:.3f} nats, and rounding explains {2 * largest:.3f}"
            raise AdapterError(Problem(Code.EXPORT_DIFFERS, what))
        return False
    return True


def _shortened(question: ScoredAnswer) -> str:
    return json.dumps(dict(question.request))[:80]


@progress("comparing answers of llama.cpp")
def _run(request: Mapping[str, Any]) -> list[dict[str, Any]]:
    """llama.cpp's answers, see `llama_cpp_process`. Raises AdapterError: it fails."""
    done = subprocess.run(
        [sys.executable, "-P", str(SCRIPT), "answer"], input=json.dumps(request), capture_output=True, text=True,
        errors="replace", check=False,
    )  # fmt: skip
    found = done.stdout.splitlines()
    if done.returncode or len(found) < len(request["questions"]):
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if _ERROR.match(line)]  # what llama.cpp logs as it ends comes after them
        what = f"llama.cpp failed: {' | '.join((errors or lines)[-3:]) or f'exit code {done.returncode}'}"
        raise AdapterError(Problem(Code.EXPORT_FAILED, what, str(request["model"])))
    return [json.loads(line) for line in found]
