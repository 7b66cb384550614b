"""Compares a merged model with its base and adapter, in a process of its own.

What the comparison holds in memory is then no part of what the merging takes, and whatever happens to it, the files are
as they were. The process gets its task as a line of JSON on stdin, and gives its result as JSON on stdout. It ends when
stdin does, which is when the process that started it has ended.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from loratune import data, errors, memory
from loratune.adapter import loading
from loratune.adapter.directory import AdapterDirectory
from loratune.codes import Code
from loratune.console import progress
from loratune.errors import AdapterError, LoratuneError, Problem, ResourceError, is_out_of_memory
from loratune.export import loaded_merge
from loratune.export.comparison import agreement
from loratune.export.merging import StreamedMerge
from loratune.export.texts import Texts
from loratune.model import load

_NEW_TOKENS = 32
"""Tokens of an answer by which a prompt is extended."""
_MOST_TOKENS = 1024
"""Tokens of a text that are compared."""
_LOGITS = 1 << 30
"""Bytes of the logits of two models that are held."""
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from loratune.commands import merge_check; "
    "merge_check.main()"
)


def dtype_that_fits(parameters: int, stored: Sequence[str]) -> str | None:
    """The dtype in which base and merged model are compared, one after the other: float32, if there is memory for it.

    Args:
        parameters: How many the model has.
        stored: The dtypes of the merged model.

    Returns:
        The name of the dtype; None if the model does not fit in any.
    """
    free = memory.available(load.device()) - 2 * _LOGITS
    widths = {"float32": 4, **{name: 2 for name in stored if name in ("bfloat16", "float16")}}
    return next((name for name, width in widths.items() if parameters * width < free), None)


@progress("comparing the merged model")
def compare(
    source: AdapterDirectory, staging: Path, texts: Texts, dtype: str | None, merged: str | None
) -> dict[str, Any]:
    """Compare in a process of its own.

    Args:
        source: The adapter.
        staging: The merged model.
        texts: What is compared on.
        dtype: The dtype in which both are computed; None compares tensor by tensor.
        merged: The dtype that the user wanted for the merged model.

    Returns:
        See `compare_models` and `compare_tensors`.

    Raises:
        LoratuneError: The comparison fails.
    """
    task = {"adapter": str(source.files.path), "staging": str(staging), "dtype": dtype, "merged": merged}
    line = json.dumps(task | {"texts": asdict(texts)}) + "\n"
    command = [sys.executable, "-c", _START, json.dumps(sys.path)]
    with tempfile.TemporaryFile() as messages:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=messages)
        try:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(line.encode())
            process.stdin.flush()
            answer = process.stdout.read()
            process.wait()
        except BrokenPipeError:
            answer = b""
            process.wait()
        finally:
            process.kill()
            process.wait()
        messages.seek(0)
        said = messages.read().decode(errors="replace").strip().splitlines()
    if process.returncode or not answer:
        raise _failed(process.returncode, said)
    result: dict[str, Any] = json.loads(answer)
    if "problems" in result:
        raise _error(result)
    return result


def _failed(code: int, said: Sequence[str]) -> LoratuneError:
    if code == -signal.SIGKILL or (said and is_out_of_memory(RuntimeError(said[-1]))):
        what, fix = "the comparison of the merged model ran out of memory", "free memory"
        return ResourceError(Problem(Code.SYSTEM_OUT_OF_MEMORY, what, fix=fix))
    what = f"the comparison of the merged model failed: {said[-1] if said else f'exit code {code}'}"
    return AdapterError(Problem(Code.MERGE_COMPARISON, what))


def _error(result: Mapping[str, Any]) -> LoratuneError:
    """The error of the other process."""
    problems = [Problem(**fields | {"code": Code(fields["code"])}) for fields in result["problems"]]
    kind: type[LoratuneError] = getattr(errors, result["error"])
    return kind(problems)


def main() -> None:
    """Do the task on stdin."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to both; the other process decides
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever libraries print
    task = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    source = AdapterDirectory.open(Path(task["adapter"]), forced=True)  # it has been checked before
    staging, texts = Path(task["staging"]), Texts(**task["texts"])
    try:
        if task["dtype"] is None:
            result = compare_tensors(source, staging, task["merged"])
        else:
            result = compare_models(source, staging, texts, task["dtype"])
    except LoratuneError as error:
        result = {"error": type(error).__name__, "problems": [asdict(problem) for problem in error.problems]}
    answer.write(json.dumps(result))
    answer.close()


def _end_with_stdin() -> None:
    os.read(0, 1)  # not through `sys.stdin`, whose lock Python needs as it ends
    os._exit(1)


@torch.inference_mode()
def compare_models(source: AdapterDirectory, staging: Path, texts: Texts, dtype: str) -> dict[str, Any]:
    """Compare the logits of the merged model, loaded by stock transformers, with those of the adapter and the base.

    Args:
        source: The adapter.
        staging: The merged model.
        texts: What is compared on; prompts are extended by the beginning of the adapter's answers.
        dtype: The dtype in which both are computed.

    Returns:
        `adapter` and `base`: how the merged model agrees with each, see `Agreement`; `dtype`.
    """
    loaded = loading.load(replace(source, base=source.base.model_copy(update={"dtype": dtype})))
    device, context = loaded.model.device, load.context_length(loaded.model.config) or _MOST_TOKENS
    ids = [list(text)[: min(_MOST_TOKENS, context)] for text in texts.ids]
    if not texts.complete:
        ids = [text[: max(1, context - _NEW_TOKENS)] for text in ids]
        ids = [text + answer for text in ids for answer in loaded.complete([text], _NEW_TOKENS)]
    most = _LOGITS // (8 * loaded.model.config.get_text_config().vocab_size)
    ids = _within(ids, max(1, most))
    adapter = [_logits(loaded.model, text, device) for text in ids]
    with loaded.without_adapter():
        base = [_logits(loaded.model, text, device) for text in ids]
    del loaded
    merged = AutoModelForCausalLM.from_pretrained(
        staging, dtype=getattr(torch, dtype), attn_implementation=source.base.attn_implementation
    )
    merged = merged.eval().to(device)
    found = [_logits(merged, text, device) for text in ids]
    return {
        "adapter": agreement(zip(adapter, found, strict=True)).as_json(),
        "base": agreement(zip(base, found, strict=True)).as_json(),
        "dtype": dtype,
        "texts": len(ids),
    }


def _within(ids: Sequence[list[int]], most: int) -> list[list[int]]:
    """The first texts, and of the last of them the beginning, so that there are not more tokens in all."""
    taken: list[list[int]] = []
    for text in ids:
        taken.append(text[:most])
        most -= len(taken[-1])
        if most <= 0:
            break
    return taken


def _logits(model: Any, ids: Sequence[int], device: torch.device) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0].float().cpu()
    return logits


def compare_tensors(source: AdapterDirectory, staging: Path, merged: str | None) -> dict[str, Any]:
    """Compute all tensors once more, and compare them with the files, byte for byte.

    Returns:
        `tensors`: how many were compared; `nearer`: whether the parameters that the adapter changes are nearer to those
        of base and adapter than to the base's.

    Raises:
        AdapterError: They differ.
    """
    plan = loaded_merge.prepare(source, getattr(torch, merged) if merged else None)
    assert isinstance(plan, StreamedMerge)  # others have been in memory
    kept = plan.compare(staging, data.no_progress)
    nearer = sum(one.error for one in kept) < sum(one.moved for one in kept)
    return {"tensors": len(plan.layout), "nearer": nearer}
