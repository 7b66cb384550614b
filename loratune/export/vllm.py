"""Runs an exported adapter in vLLM, and compares log-probabilities with those of the adapter and of its base."""

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os import environ
from os.path import abspath
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as validated_dataclass

from loratune.adapter.clients import VLLM_RANKS
from loratune.codes import Code
from loratune.errors import AdapterError, Problem
from loratune.events import progress
from loratune.export.answers import SHARE, Effect, ScoredAnswer, effect
from loratune.lora.module_names import join_first

SCRIPT = Path(__file__).with_name("vllm_process.py")
CLOSENESS = 0.02
"""The largest allowed mean difference of a log-probability, in nats. Both sides compute in float32."""
_ERROR = re.compile(r"\w+(Error|Exception)\b: ")
_SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
}  # fmt: skip


@dataclass(frozen=True)
class VllmResult(Effect):
    """The comparison of vLLM with the adapter.

    Attributes:
        version: The release of vLLM.
        answers: The number of answers compared.
        tokens: The total number of their tokens.
    """

    version: str
    answers: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.version}, {self.answers} answers of {self.tokens} tokens: {super().__str__()}"


@validated_dataclass(frozen=True, config=ConfigDict(strict=True))
class _Said:
    """What `vllm_process.run` returns."""

    logprobs: list[float]
    ignored: list[str]
    version: str


@progress("comparing answers in vLLM")
def compare(
    python: str, base: str, directory: Path, rank: int, answers: Sequence[ScoredAnswer], where: str
) -> VllmResult:
    """Run an adapter in vLLM, and compare its log-probabilities with those of the adapter and of the base.

    Args:
        python: The Python of an environment with vLLM.
        base: The base, a directory or a hub id.
        directory: The exported adapter.
        rank: Its rank.
        answers: The prompts, with the adapter's answers.
        where: The adapter, for errors.

    Raises:
        AdapterError: vLLM fails, ignores a module of the adapter, or computes something else than the adapter.
    """
    rows = [{"prompt": [*one.prompt], "answer": [*one.answer]} for one in answers if len(one.answer)]
    highest = next((most for most in VLLM_RANKS if rank <= most), rank)
    limits = {"image": 0, "video": 0, "audio": 0}
    said = _run(python, {"base": base, "adapter": str(directory), "rank": highest, "rows": rows, "limits": limits})
    tokens, server = sum(len(row["answer"]) for row in rows), f"vLLM {said.version}"
    if said.ignored:
        what = f"{server} ignores {len(said.ignored)} modules of the adapter: {join_first(said.ignored, 3)}"
        raise AdapterError(Problem(Code.EXPORT_DIFFERS, what, where))
    if len(said.logprobs) != tokens:
        what = f"{server} gave {len(said.logprobs)} log-probabilities for {tokens} tokens"
        raise AdapterError(Problem(Code.EXPORT_FAILED, what, python))
    found = effect(said.logprobs, answers)
    if not found.mean <= CLOSENESS or not SHARE[0] <= found.share <= SHARE[1]:
        raise AdapterError(Problem(Code.EXPORT_DIFFERS, found.deviation(server), where))
    return VllmResult(**asdict(found), version=said.version, answers=len(rows), tokens=tokens)


def _run(python: str, request: dict[str, Any]) -> _Said:
    """The result of `vllm_process`. Raises AdapterError: it fails."""
    try:
        with TemporaryDirectory() as name:
            script, result = Path(name, "run.py"), Path(name, "result.json")
            shutil.copyfile(SCRIPT, script)  # or Python would import the modules next to it
            done = subprocess.run(
                [abspath(python), "-E", str(script), str(result)], input=json.dumps(request), capture_output=True,
                text=True, errors="replace", check=False, env=environ | _SETTINGS,
            )  # fmt: skip
            if not done.returncode and result.is_file():
                return TypeAdapter(_Said).validate_json(result.read_bytes())
    except OSError as error:
        raise AdapterError(Problem(Code.EXPORT_FAILED, f"vLLM cannot be run: {error}", python)) from None
    except ValidationError as error:
        what = f"it gave no result of vLLM: {error.errors()[0]['msg']}"
        raise AdapterError(Problem(Code.EXPORT_FAILED, what, python)) from None
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if _ERROR.search(line)]  # progress and frames of the traceback come after them
    what = f"vLLM failed: {' | '.join((errors or lines)[-3:]) or f'exit code {done.returncode}, no result'}"
    raise AdapterError(Problem(Code.EXPORT_FAILED, what, python, fix="`verify=False` exports without running vLLM"))
