"""A GGUF file run in llama.cpp, and its answers compared with those of the adapter on its base.

As a program, `python -m loratune.export.llama_cpp` reads a request as JSON from stdin, and writes what llama.cpp
(the package xllamacpp) says to each question in a line. llama.cpp ends the process where it fails.
"""

import json
import math
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loratune.codes import Code
from loratune.console import show_count
from loratune.errors import AdapterError, Problem, install
from loratune.system.containers import threads

_ERROR = re.compile(r"\w+(Error|Exception)\b")
PACKAGE = "xllamacpp"
INSTALL = install("llama-cpp")
SHARE = (0.9, 1.1)
"""How much of the adapter's effect on the log-probabilities must be there: all of it, up to the rounding of llama.cpp,
which computes with fewer bits. A scale that is lost shows as a factor of 2 and more."""
ROUNDING = 0.05
"""A mean difference of a log-probability, in nats, that counts as rounding, however small the adapter's effect."""
_SECONDS_EACH = 120
_CANDIDATES = 64


@dataclass(frozen=True)
class ScoredAnswer:
    """What is asked, and what the adapter answered.

    Attributes:
        request: A text under `prompt`, or `messages` with `tools`, as llama.cpp takes it; empty if there are only ids.
        prompt: The ids of the rendered prompt.
        answer: The ids of the adapter's likeliest answer, which is the reference.
        adapted: The log-probability of each of them.
        base: That by the base alone.
        second: For each, the log-probability of the second likeliest token.
    """

    request: Mapping[str, Any]
    prompt: Sequence[int]
    answer: Sequence[int]
    adapted: Sequence[float]
    base: Sequence[float]
    second: Sequence[float]


@dataclass(frozen=True)
class Comparison:
    """How llama.cpp answers.

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
        """All figures by name."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.answers} answers of {self.tokens} tokens: log-probabilities within {self.mean:.3f} on average and "
            f"{self.largest:.3f} at most, {self.share:.1%} of the adapter's effect; greedy {self.exact} equal, "
            f"{self.ties} ties; {self.counts} rendered prompts of equal length"
        )


def is_installed() -> bool:
    """Whether llama.cpp can be run here."""
    return find_spec(PACKAGE) is not None


def compare(
    model: Path, adapter: Path | None, template: str | None, questions: Sequence[ScoredAnswer], ends: Collection[int]
) -> Comparison:
    """Run a GGUF file.

    Args:
        model: The model.
        adapter: A GGUF file of an adapter for it.
        template: A chat template in place of the model's own.
        questions: What is asked.
        ends: The tokens that end an answer.

    Raises:
        AdapterError: llama.cpp fails; it does not compute what the adapter computes; or it tokenizes otherwise.
    """
    asked = [{"request": dict(q.request), "prompt": [*q.prompt], "answer": [*q.answer]} for q in questions]
    request = {
        "model": str(model), "adapter": str(adapter) if adapter else None, "template": template, "questions": asked,
    }  # fmt: skip
    said = _run(request, 300 + _SECONDS_EACH * len(questions))
    _check_counts(questions, said)
    pairs = [
        (found - base, adapted - base)
        for question, answer in zip(questions, said, strict=True)
        for found, adapted, base in zip(answer["logprobs"], question.adapted, question.base, strict=True)
    ]
    differences = [abs(found - adapted) for found, adapted in pairs]
    mean, largest = sum(differences) / len(pairs), max(differences)
    effect = sum(adapted * adapted for _, adapted in pairs)
    share = sum(found * adapted for found, adapted in pairs) / effect if effect else math.nan
    if not mean <= ROUNDING and not SHARE[0] <= share <= SHARE[1]:
        what = f"in llama.cpp it has {share:.1%} of its effect: log-probabilities differ by {mean:.3f} on average"
        raise AdapterError(Problem(Code.EXPORT_DIFFERS, what, str(model)))
    exact, ties = _check_greedy(questions, said, largest, ends)
    counts = sum(answer["count"] is not None for answer in said)
    return Comparison(len(said), len(pairs), mean, largest, share, exact, ties, counts)


def _check_counts(questions: Sequence[ScoredAnswer], said: Sequence[Mapping[str, Any]]) -> None:
    """Raises AdapterError: llama.cpp renders or tokenizes a prompt otherwise."""
    for question, answer in zip(questions, said, strict=True):
        if answer["count"] not in (None, len(question.prompt)):
            text = json.dumps(question.request)[:80]
            what = f"llama.cpp makes {answer['count']} tokens of a prompt that has {len(question.prompt)}: {text}"
            raise AdapterError(Problem(Code.EXPORT_TOKENIZER, what))


def _check_greedy(
    questions: Sequence[ScoredAnswer], said: Sequence[Mapping[str, Any]], largest: float, ends: Collection[int]
) -> tuple[int, int]:
    """How many greedy answers are equal, and how many differ at a tie.

    Raises AdapterError: one differs where the adapter prefers its own token by more than rounding explains.
    """
    exact = ties = 0
    for question, answer in zip(questions, said, strict=True):
        other = [*answer["greedy"], None]  # None: llama.cpp ended the answer
        expected = (None if token in ends else token for token in question.answer)
        places = (at for at, (one, two) in enumerate(zip(expected, other, strict=False)) if one != two)
        at = next(places, None)
        if at is None:
            exact += 1
        elif question.adapted[at] - question.second[at] <= 2 * largest:
            ties += 1
        else:
            gap = question.adapted[at] - question.second[at]
            what = f"in llama.cpp the answer to {json.dumps(dict(question.request))[:80]} differs at token {at + 1}"
            what += (
                f", which the adapter prefers to any other by {gap:.3f} nats, and rounding explains {2 * largest:.3f}"
            )
            raise AdapterError(Problem(Code.EXPORT_DIFFERS, what))
    return exact, ties


def _run(request: Mapping[str, Any], seconds: float) -> list[dict[str, Any]]:
    """Ask llama.cpp in a process of its own. Raises AdapterError: it fails, or takes too long."""
    root = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    command, said, where = [sys.executable, "-m", "loratune.export.llama_cpp"], [], str(request["model"])
    with (
        tempfile.TemporaryFile("w+") as asked, tempfile.TemporaryFile("w+", errors="replace") as messages,
        show_count("comparing answers of llama.cpp", len(request["questions"])) as advance,
    ):  # fmt: skip
        json.dump(request, asked)
        asked.seek(0)
        process = subprocess.Popen(
            command, stdin=asked, stdout=subprocess.PIPE, stderr=messages, text=True,
            env=os.environ | {"PYTHONPATH": root},
        )  # fmt: skip
        limit, end = threading.Timer(seconds, process.kill), time.monotonic() + seconds
        try:
            limit.start()
            for line in process.stdout or ():
                said.append(json.loads(line))
                advance(1)
            process.wait()
        finally:
            limit.cancel()
            process.kill()
            process.wait()
        if time.monotonic() >= end:
            raise AdapterError(Problem(Code.EXPORT_LLAMA_FAILED, f"llama.cpp took longer than {seconds:.0f} s", where))
        if process.returncode or len(said) < len(request["questions"]):
            messages.seek(0)
            lines = [line.strip() for line in messages if line.strip()]
            errors = [line for line in lines if _ERROR.match(line)]  # What llama.cpp logs as it ends comes after them.
            what = f"llama.cpp failed: {' | '.join((errors or lines)[-3:]) or f'exit code {process.returncode}'}"
            raise AdapterError(Problem(Code.EXPORT_LLAMA_FAILED, what, where))
    return said


class _Server:
    """llama.cpp with one model. Needs the package xllamacpp."""

    def __init__(self, request: Mapping[str, Any]):
        package = import_module(PACKAGE)
        parameters = package.CommonParams()
        parameters.model.path = request["model"]
        longest = max(len(asked["prompt"]) + len(asked["answer"]) for asked in request["questions"])
        parameters.n_ctx = -(-(longest + 64) // 256) * 256
        parameters.n_parallel, parameters.warmup, parameters.n_gpu_layers = 1, False, 0
        parameters.use_jinja = True
        parameters.cpuparams.n_threads = threads()
        if request["template"] is not None:
            parameters.chat_template = request["template"]
        if request["adapter"]:
            parameters.lora_adapters = [package.CommonAdapterLoraInfo(request["adapter"], 1.0)]
        self._server, self._vocabulary = package.Server(parameters), 1 << 20

    def _complete(self, prompt: Any, tokens: int, candidates: int) -> dict[str, Any]:
        answer = self._server.handle_completions({
            "prompt": prompt, "n_predict": tokens, "n_probs": candidates, "temperature": 0.0, "cache_prompt": True,
        })  # fmt: skip
        answer = json.loads(answer) if isinstance(answer, str) else answer
        if "choices" not in answer:
            raise RuntimeError(f"llama.cpp refuses a prompt: {answer}")
        return dict(answer)

    def log_probability(self, ids: Sequence[int], token: int) -> float:
        """That of one token after others."""
        for candidates in (_CANDIDATES, self._vocabulary):
            tops = self._first_token([*ids], candidates)["top_logprobs"]
            found = next((top["logprob"] for top in tops if top["id"] == token), None)
            if found is not None:
                return float(found)
        return -math.inf

    def _first_token(self, ids: Sequence[int], candidates: int) -> dict[str, Any]:
        """What is said of the first token of an answer. It is held back until its bytes are whole characters."""
        for tokens in (1, 8, 64):
            content = _content(self._complete([*ids], tokens, candidates)["choices"][0])
            if content:
                return content[0]
        raise RuntimeError("llama.cpp says nothing of the next token")

    def greedy(self, ids: Sequence[int], tokens: int) -> list[int]:
        """The likeliest answer of at most so many tokens, without the one that ends it."""
        choice = self._complete([*ids], tokens, 1)["choices"][0]
        found = [int(token["id"]) for token in _content(choice)]
        return found[:-1] if choice["finish_reason"] == "stop" else found

    def count(self, request: Mapping[str, Any]) -> int | None:
        """The number of tokens of a rendered prompt; None for a prompt that is ids."""
        if "messages" in request:
            answer = self._server.handle_chat_completions({**request, "max_tokens": 1, "temperature": 0.0})
            answer = json.loads(answer) if isinstance(answer, str) else answer
            if "usage" not in answer:
                raise RuntimeError(f"llama.cpp refuses messages: {answer}")
        elif "prompt" in request:
            answer = self._complete(request["prompt"], 1, 1)
        else:
            return None
        return int(answer["usage"]["prompt_tokens"])


def _content(choice: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tokens of an answer; none where it is empty."""
    return [*((choice.get("logprobs") or {}).get("content") or ())]


def _answers(request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What llama.cpp says to each question."""
    server = _Server(request)
    for asked in request["questions"]:
        yield {
            "logprobs": [
                server.log_probability([*asked["prompt"], *asked["answer"][:at]], token)
                for at, token in enumerate(asked["answer"])
            ],
            "greedy": server.greedy(asked["prompt"], len(asked["answer"])),
            "count": server.count(asked["request"]),
        }


if __name__ == "__main__":
    with open(os.dup(1), "w") as out:
        os.dup2(2, 1)  # whatever llama.cpp prints
        for answer in _answers(json.load(sys.stdin)):
            print(json.dumps(answer), file=out, flush=True)
