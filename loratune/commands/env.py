"""`loratune env`: what this machine has for training, and what to do where something is slow or missing."""

import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import huggingface_hub
import psutil
import torch
from packaging.requirements import Requirement

from loratune import memory
from loratune.codes import Code
from loratune.data.upstream import datasets_cache_dir
from loratune.errors import NumericError, Problem
from loratune.kernels.compiled import fused_ops, library, self_test
from loratune.kernels.compiled.self_test import FAILED as FAILED
from loratune.kernels.compiled.self_test import PASSED as PASSED
from loratune.model import load
from loratune.model.upstream import bitsandbytes_lacks
from loratune.system import accelerator, environment, platforms, release
from loratune.text import format_size, plural

SECONDS = 2.0
"""The most seconds for which the hub is waited for."""
LOW_DISK = 5 << 30
"""Bytes; with less free space than this in a cache, a base of a few billion parameters does not fit."""
FEATURES = {"avx512_bf16": "bf16", "amx_bf16": "AMX bf16", "amx_int8": "AMX int8", "avx512_vnni": "VNNI"}
"""Processor feature → its name in the report. bf16 halves memory and time, VNNI and AMX speed up matrix products."""
OPTIONAL = {
    "liger_kernel": "kernels for NVIDIA and AMD GPUs (model.use_liger_kernel)",
    "triton": "needed by Liger and torch.compile on a GPU",
    "flash_attn": "attention on NVIDIA GPUs (model.attn_implementation: flash_attention_2)",
    "kernels": "kernels of the hub (model.attn_implementation)",
}
"""Modules that are not required → what they are for."""


@dataclass(frozen=True)
class Fact:
    """One line about the machine.

    Attributes:
        name: What it is about.
        value: What was found.
        advice: What to do where it is slow or missing; empty if nothing is.
    """

    name: str
    value: str
    advice: str = ""


NOT_AVAILABLE = "not available"
"""The result of a check of the self-test, beside `PASSED` and `FAILED`."""


@dataclass(frozen=True)
class Check:
    """A check of the self-test.

    Attributes:
        name: What was checked.
        result: `PASSED`, `FAILED` or `NOT_AVAILABLE`.
        detail: What was found, or what is missing.
        seconds: How long it took.
    """

    name: str
    result: str
    detail: str
    seconds: float


@dataclass(frozen=True)
class Environment:
    """What is known about the machine.

    Attributes:
        sections: Title → its facts.
        checks: The results of the self-test; empty without it.
    """

    sections: Mapping[str, Sequence[Fact]]
    checks: Sequence[Check] = ()

    @property
    def advice(self) -> list[str]:
        """What to do, in the order of the facts."""
        return [f"{fact.name}: {fact.advice}" for facts in self.sections.values() for fact in facts if fact.advice]

    def check_passed(self) -> None:
        """Raises NumericError: a check of the self-test failed."""
        failed = [check for check in self.checks if check.result == FAILED]
        if failed:
            fix = "report it with the whole page; until then train does not use operations that failed"
            raise NumericError([Problem(Code.SYSTEM_SELF_TEST, f"{one.name}: {one.detail}", fix=fix) for one in failed])

    def to_dict(self) -> dict[str, Any]:
        """Plain values: title → name → `value`, and `advice` where there is some; `self_test` if there was one."""
        values: dict[str, Any] = {
            title: {
                fact.name: {"value": fact.value} | ({"advice": fact.advice} if fact.advice else {}) for fact in facts
            }
            for title, facts in self.sections.items()
        }
        return values | ({"self_test": [vars(check) for check in self.checks]} if self.checks else {})


def describe() -> Environment:
    """Find out what this machine has. Takes at most a few seconds, and never raises because something is missing."""
    parts: dict[str, Callable[[], Iterator[Fact]]] = {
        "program": _program, "packages": _packages, "processor": _processor, "compiled code": _compiled_code,
        "GPU": _gpus, "optional libraries": _libraries, "memory and disk": _memory, "hub": _hub,
    }  # fmt: skip
    return Environment({title: [*part()] for title, part in parts.items()})


def _program() -> Iterator[Fact]:
    yield Fact("loratune", f"{release.describe()}, in {Path(__file__).resolve().parent.parent}")
    yield Fact("Python", f"{platform.python_version()} ({sys.executable})")
    libc = " ".join(platform.libc_ver())
    yield Fact("system", f"{platform.system()} {platform.release()}, {platform.machine()}{f', {libc}' if libc else ''}")
    if failed := self_test.failed():
        yield Fact("self-test", f"failed here: {', '.join(failed)}", "loratune env --self-test repeats the checks")
    elif passed := self_test.passed():
        yield Fact("self-test", f"{plural(len(passed), 'check')} passed here")
    else:
        yield Fact("self-test", "not run here", "loratune env --self-test compares tiny runs here with stock PEFT")


def _packages() -> Iterator[Fact]:
    """The packages that pyproject.toml requires, and those of the extras that are installed."""
    for line in importlib.metadata.requires("loratune") or ():
        wanted = Requirement(line)
        extra = wanted.marker is not None and not wanted.marker.evaluate({"extra": ""})
        try:
            found = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            if not extra:
                yield Fact(wanted.name, "not installed", f"pip install '{wanted.name}{wanted.specifier}'")
            continue
        if wanted.specifier.contains(found, prereleases=True):
            if not extra:
                yield Fact(wanted.name, f"{found} (allowed: {wanted.specifier})")
        else:
            yield Fact(wanted.name, found, f"pip install '{wanted.name}{wanted.specifier}'")


def _processor() -> Iterator[Fact]:
    seen, allowed = platforms.processor_count(), environment.processors()
    share = f"; this container may use {allowed:g}" if allowed < seen else ""
    yield Fact("processor", environment.processor_name() or platform.processor() or "unknown")
    yield Fact("cores", f"{seen} of {os.cpu_count()}{share}; {plural(torch.get_num_threads(), 'thread')} of torch")
    has = environment.features()
    names = ", ".join(name for feature, name in FEATURES.items() if feature in has)
    dtype = str(load.automatic_dtype()).removeprefix("torch.")
    yield Fact("instructions", names or "none of " + ", ".join(FEATURES.values()))
    yield Fact("model.dtype: auto", f"{dtype} on this {'GPU' if accelerator.has_gpu() else 'processor'}")


def _compiled_code() -> Iterator[Fact]:
    """The compiled operations for a CPU, in each dtype that they are for."""
    compiler = next(filter(None, map(shutil.which, ("gcc", "cc", "clang"))), None)
    yield Fact("C compiler", compiler or "none")
    for dtype in fused_ops.DEFINES:
        like = torch.zeros(1, dtype=dtype)
        refusal = fused_ops.refusal(like)
        advice = f"the reference in torch is used, which is slower: {refusal}" if refusal else ""
        notes = "; ".join(fused_ops.notes(like))
        yield Fact(str(dtype).removeprefix("torch."), fused_ops.variant(like), advice or notes)


def _gpus() -> Iterator[Fact]:
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else ""
    build = build or (f"ROCm {torch.version.hip}" if torch.version.hip else "CPU only")
    has_driver = shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia/version").is_file()
    missing = has_driver and not torch.cuda.is_available()
    advice = "there is a driver for NVIDIA GPUs, but torch cannot use it; install torch as https://pytorch.org says"
    yield Fact("build of torch", build, advice if missing else "")
    bf16 = "bf16" if accelerator.multiplies_bfloat16() else "no bf16"
    for number, name in enumerate(accelerator.names()):
        known: Any = torch.get_device_module(accelerator.device()).get_device_properties(number)
        kind = f"compute capability {known.major}.{known.minor}" if torch.cuda.is_available() else "not tested by us"
        yield Fact(f"GPU {number}", f"{name}, {format_size(known.total_memory)}, {kind}, {bf16}{_driver()}")
    if not accelerator.has_gpu():
        other = torch.accelerator.current_accelerator(check_available=True)
        yield Fact("GPU", f"{other.type}, which is not used" if other else "none; training runs on the CPU")


def _driver() -> str:
    """The version of NVIDIA's driver, as the rest of a fact; empty if it is not known."""
    path = Path("/proc/driver/nvidia/version")
    found = re.search(r"Kernel Module.*?(\d+\.\d[\d.]*)", path.read_text(errors="replace")) if path.is_file() else None
    return f", driver {found[1]}" if found else ""


def _libraries() -> Iterator[Fact]:
    lacks = bitsandbytes_lacks()
    yield Fact(
        "bitsandbytes", lacks or "its native library works", "model.quantization cannot be used" if lacks else ""
    )
    for name, use in OPTIONAL.items():
        yield Fact(name, f"{_imported(name)}; {use}")


def _imported(name: str) -> str:
    """Whether a module is installed, and can be imported."""
    if find_spec(name) is None:
        return "not installed"
    try:
        importlib.import_module(name)
    except Exception as error:  # such as a library that was built for another version of CUDA or torch
        return f"installed, but cannot be imported ({error})"
    return "installed"


def _memory() -> Iterator[Fact]:
    total, free = psutil.virtual_memory().total, memory.available(torch.device("cpu"))
    yield Fact("memory", f"{format_size(free)} available of {format_size(total)}")
    caches = {
        "bases (HF_HUB_CACHE)": Path(huggingface_hub.constants.HF_HUB_CACHE),
        "rows (HF_DATASETS_CACHE)": datasets_cache_dir(),
        "compiled code (XDG_CACHE_HOME)": library.cache_directory(),
        "temporary files (TMPDIR)": Path(tempfile.gettempdir()),
    }
    for name, path in caches.items():
        place = next(one for one in (path, *path.parents) if one.exists())
        free = shutil.disk_usage(place).free
        advice = (
            f"{place} is not writable; set the variable to a directory that is" if not os.access(place, os.W_OK) else ""
        )
        advice = advice or (f"only {format_size(free)} are free" if free < LOW_DISK else "")
        yield Fact(name, f"{path}, {format_size(free)} free", advice)


def _hub() -> Iterator[Fact]:
    endpoint = huggingface_hub.constants.ENDPOINT
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        yield Fact("hub", f"not used (HF_HUB_OFFLINE); {endpoint}")
    else:
        problem = _reached(endpoint)
        advice = "use local directories, or set HF_ENDPOINT or HTTPS_PROXY" if problem else ""
        yield Fact("hub", f"{endpoint} {problem or 'answers'}", advice)
    yield Fact("token", "present" if huggingface_hub.get_token() else "none; only needed for gated bases and for push")


def _reached(url: str) -> str:
    """Why a server cannot be reached within `SECONDS`; empty if it answers.

    Another process asks, as looking up an address has no timeout.
    """
    command = [sys.executable, "-I", "-c", _REQUEST, url]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"does not answer within {SECONDS:g} s"
    except OSError as error:
        return f"cannot be tried ({error})"
    reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    return f"cannot be reached ({reason})" if done.returncode else ""


_REQUEST = """
import sys, urllib.error, urllib.request
try:
    urllib.request.urlopen(sys.argv[1])
except urllib.error.HTTPError:
    pass
except Exception as error:
    sys.exit(str(getattr(error, "reason", error)))
"""
