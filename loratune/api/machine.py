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
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.request import getproxies

import huggingface_hub
import psutil
from packaging.requirements import Requirement

from loratune.codes import Code
from loratune.errors import NumericError, Problem
from loratune.system import environment, platforms, release, turns
from loratune.system.cache import KeptResults, cache_directory
from loratune.text import format_size, plural, without_userinfo

BROKEN = ""
"""Why torch or loratune's own modules cannot be imported: a library imports a package that is broken, or reads an
environment variable that is. The page then has all facts that do not need them; a function that does raises
NameError."""
try:
    import torch

    from loratune.model.upstream import bitsandbytes_lacks  # isort: skip  # needs less than what follows
    from loratune.system import accelerator  # isort: skip

    from loratune.data.upstream import datasets_cache_dir
    from loratune.kernels.compiled import fused_ops
    from loratune.system.machine_results import kept_here
except (Exception, SystemExit) as error:
    BROKEN = f"{type(error).__name__}: {error}, in {traceback.extract_tb(error.__traceback__)[-1].filename}"

SECONDS = 2.0
"""The most seconds for which the hub, a file or directory, or the version of a program is waited for."""
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


PASSED, FAILED, NOT_AVAILABLE = "passed", "failed", "not available"
"""The results of a check of the self-test."""


@dataclass(frozen=True)
class Check:
    """A check of the self-test.

    Attributes:
        name: What was checked.
        result: `passed`, `failed` or `not available`.
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
            fix = "report it with the whole page; train checks by itself what it uses, and turns off what fails"
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
    """Find out what this machine has. Takes at most a few seconds, and never raises because something is missing.

    What imported libraries print on stdout goes to stderr.
    """
    parts: dict[str, Callable[[], Iterable[Fact]]] = {
        "program": _program, "packages": _packages, "processor": _processor, "compiled code": _compiled_code,
        "GPU": _gpus, "optional libraries": _libraries, "memory and disk": _memory, "hub": _hub,
    }  # fmt: skip
    with turns.stdout_to(sys.stderr):
        return Environment({title: _found(title, part) for title, part in parts.items()})


def _found(
    name: str,
    find: Callable[[], Iterable[Fact] | Fact | str],
    otherwise: str = "not known",
    advice: str = "repair what the line names; commands that need it may fail",
) -> list[Fact]:
    """The facts that a function returns, or one with the value that it returns; passwords in URLs are left out.

    Whatever it raises becomes a fact: libraries that are imported may raise anything, and even end the process.

    Args:
        name: What the fact is about.
        find: The function.
        otherwise: What it means that it raises.
        advice: What to do then.
    """
    facts = list[Fact]()
    try:
        found = find()
        facts += [Fact(name, found)] if isinstance(found, str) else [found] if isinstance(found, Fact) else found
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if BROKEN and isinstance(error, NameError):
            error, advice = ImportError("see libraries"), ""
        facts += [Fact(name, f"{otherwise} ({' '.join([f'{type(error).__name__}:', *str(error).split()])})", advice)]
    return [replace(one, value=without_userinfo(one.value), advice=without_userinfo(one.advice)) for one in facts]


def _program() -> Iterator[Fact]:
    yield from _found("loratune", lambda: f"{release.describe()}, in {Path(__file__).resolve().parent.parent}")
    yield Fact("Python", f"{platform.python_version()} ({sys.executable})")
    libc = " ".join(platform.libc_ver())
    yield Fact("system", f"{platform.system()} {platform.release()}, {platform.machine()}{f', {libc}' if libc else ''}")
    if BROKEN:
        repair = "repair or uninstall the package of this file, or correct the environment variable that it reads"
        advice = f"{repair}; until then, other commands fail"
        yield Fact("libraries", f"cannot be imported ({BROKEN})", advice)
    yield from _found("self-test", _self_test)


def known_results() -> KeptResults:
    """The results of the last self-test on this machine, with these versions: name of the check → result."""
    return kept_here("self-test")


def _self_test() -> Fact:
    known = known_results().load()
    if failed := [name for name, result in known.items() if result == FAILED]:
        return Fact("self-test", f"failed here: {'; '.join(failed)}", "loratune env --self-test repeats the checks")
    if passed := [name for name, result in known.items() if result == PASSED]:
        return Fact("self-test", f"{plural(len(passed), 'check')} passed here")
    return Fact("self-test", "not run here", "loratune env --self-test compares tiny runs here with stock PEFT")


def _packages() -> Iterator[Fact]:
    """The packages that pyproject.toml requires, and those of the extras that are installed."""
    for line in importlib.metadata.requires("loratune") or ():
        yield from _found(line, partial(_package, Requirement(line)))


def _package(wanted: Requirement) -> Iterator[Fact]:
    extra = wanted.marker is not None and not wanted.marker.evaluate({"extra": ""})
    found = next((one.version for one in importlib.metadata.distributions(name=wanted.name)), "")
    is_allowed = bool(found) and wanted.specifier.contains(found, prereleases=True)
    if is_allowed and not extra:
        yield Fact(wanted.name, f"{found} (allowed: {wanted.specifier})")
    elif not is_allowed and (found or not extra):
        yield Fact(wanted.name, found or "not installed", f"pip install '{wanted.name}{wanted.specifier}'")


def _processor() -> Iterator[Fact]:
    yield Fact("processor", environment.processor_name() or platform.processor() or "not known")
    yield from _found("cores", _cores)
    has, dtype = environment.features(), "bfloat16" if accelerator.multiplies_bfloat16() else "float32"
    names = [name for feature, name in FEATURES.items() if feature in has]
    none = f"none of {', '.join(FEATURES.values())}" if has else "not known: /proc/cpuinfo cannot be read"
    yield Fact("instructions", ", ".join(names) or none)
    slow = "float32 takes twice the memory and more time; use a GPU or a processor with bf16 where you can"
    where = "GPU" if accelerator.has_gpu() else "processor"
    yield Fact("model.dtype: auto", f"{dtype} on this {where}", slow if dtype == "float32" else "")


def _cores() -> Fact:
    seen, allowed, threads = platforms.processor_count(), environment.processors(), torch.get_num_threads()
    share = f"; this container may use {allowed:g}" if allowed < seen else ""
    most = int(min(seen, allowed))
    advice = f"OMP_NUM_THREADS={most} uses all cores, unless other work needs them" if threads < most else ""
    return Fact("cores", f"{seen} of {os.cpu_count()}{share}; {plural(threads, 'thread')} of torch", advice)


def _compiled_code() -> Iterator[Fact]:
    """The compiled operations for a CPU, in each dtype that they are for. A reason for both is given once."""
    compiler = next(filter(None, map(shutil.which, ("gcc", "cc", "clang"))), None)
    (fact,) = _found("C compiler", lambda: _version(compiler) if compiler else "none", "does not work")
    yield fact
    known = {""}
    for dtype in () if fact.advice else fused_ops.DEFINES:
        like = torch.zeros(1, dtype=dtype)
        refusal = fused_ops.refusal(like)
        value = "not in use; torch computes instead, which is slower" if refusal else fused_ops.variant(like)
        advice = refusal or fused_ops.library_note(like)
        yield Fact(str(dtype).removeprefix("torch."), value, advice if advice not in known else "")
        known.add(advice)


def _version(program: str) -> str:
    """Path and version of a program. Raises OSError, SubprocessError: it fails, or takes more than `SECONDS`."""
    done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=SECONDS, check=True)
    return f"{program}, {next(iter(done.stdout.splitlines()), '')}"


def _gpus() -> Iterator[Fact]:
    builds = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip, "XPU": torch.version.xpu}
    build = next((f"{name} {version}" for name, version in builds.items() if version), "CPU only")
    has_driver = shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia/version").is_file()
    missing = has_driver and not torch.cuda.is_available()
    advice = "there is a driver for NVIDIA GPUs, but torch cannot use it; install torch as https://pytorch.org says"
    yield Fact("build of torch", build, advice if missing else "")
    for number, name in enumerate(accelerator.names()):
        yield from _found(f"GPU {number}", partial(_gpu, number, name))
    if not accelerator.has_gpu():
        other = torch.accelerator.current_accelerator(check_available=True)
        yield Fact("GPU", f"{other.type}, which is not used" if other else "none; training runs on the CPU")


def _gpu(number: int, name: str) -> str:
    device = torch.device(accelerator.device().type, number)
    known: Any = torch.get_device_module(device).get_device_properties(number)
    kind = f"compute capability {known.major}.{known.minor}" if torch.cuda.is_available() else "not tested by us"
    free = f"{format_size(accelerator.free_memory(device))} free of {format_size(known.total_memory)}"
    return f"{name}, {free}, {kind}, {'bf16' if accelerator.multiplies_bfloat16() else 'no bf16'}{_driver()}"


def _driver() -> str:
    """The version of NVIDIA's driver, as the rest of a fact; empty if it is not known."""
    path = Path("/proc/driver/nvidia/version")
    found = re.search(r"Kernel Module.*?(\d+\.\d[\d.]*)", path.read_text(errors="replace")) if path.is_file() else None
    return f", driver {found[1]}" if found else ""


def _libraries() -> Iterator[Fact]:
    repair = "pip install --upgrade --force-reinstall {0}, or pip uninstall {0}".format
    broken, lost = "installed, but cannot be imported", "model.quantization cannot be used: "
    yield from _found("bitsandbytes", _bitsandbytes, broken, lost + repair("bitsandbytes"))
    for name, use in OPTIONAL.items():
        yield from _found(name, partial(_library, name, use), broken, repair(name.replace("_", "-")))


def _bitsandbytes() -> Fact:
    lacks = bitsandbytes_lacks()
    advice = "model.quantization cannot be used: pip install --upgrade --force-reinstall bitsandbytes"
    return Fact("bitsandbytes", lacks or "its native library works", advice if lacks else "")


def _library(name: str, use: str) -> str:
    """Whether a module is installed. Raises whatever importing it raises."""
    if find_spec(name) is None:
        return f"not installed; {use}"
    importlib.import_module(name)
    return f"installed; {use}"


def _memory() -> Iterator[Fact]:
    yield from _found("memory", _free_memory)
    caches: dict[str, Callable[[], Path]] = {
        "bases (HF_HUB_CACHE)": lambda: Path(_hub_constants().HF_HUB_CACHE),
        "rows (HF_DATASETS_CACHE)": lambda: datasets_cache_dir(),
        "compiled code (XDG_CACHE_HOME)": cache_directory,
        "temporary files (TMPDIR)": lambda: Path(os.environ.get("TMPDIR") or tempfile.gettempdir()),
    }
    for name, path in caches.items():
        found = partial(_in_time, partial(_directory, name, path))
        yield from _found(name, found, "cannot be used", f"{_OTHER} that you can write to")


_OTHER = "set the variable to a directory"


def _free_memory() -> str:
    known = psutil.virtual_memory()
    free = min(known.available, environment.free_memory(), platforms.memory_limit() or known.available)
    return f"{format_size(int(free))} available of {format_size(known.total)}"


def _directory(name: str, path: Callable[[], Path]) -> Fact:
    """Whether a cache can be written to, and what room is there."""
    directory = path()
    place = next(one for one in (directory, *directory.parents) if one.exists())
    free, advice = shutil.disk_usage(place).free, ""
    if not place.is_dir():
        advice = f"{place} is not a directory; {_OTHER}"
    elif not os.access(place, os.W_OK):
        advice = f"{place} is not writable; {_OTHER} that is"
    elif "TMPDIR" in name and place != directory:
        advice = f"there is no such directory, and {tempfile.gettempdir()} is used; {_OTHER} that exists"
    elif free < LOW_DISK:
        advice = f"only {format_size(free)} are free; make room, or {_OTHER} on another disk"
    return Fact(name, f"{directory}, {format_size(free)} free", advice)


def _hub_constants() -> Any:
    """The module with what the hub's client reads from the environment, as it is imported. Raises ValueError."""
    return importlib.import_module("huggingface_hub.constants")


def _hub() -> Iterator[Fact]:
    yield from _found("hub", _endpoint, "cannot be used", "correct HF_ENDPOINT, or what else the line names")
    file = "repair the file that HF_TOKEN_PATH or HF_HOME names, or set HF_TOKEN"
    yield from _found("token", partial(_in_time, _token), "cannot be read", file)


def _token() -> str:
    return "present" if huggingface_hub.get_token() else _NO_TOKEN


_NO_TOKEN = "none; only needed for gated bases and for push"


def _endpoint() -> Fact:
    endpoint, proxies = _hub_constants().ENDPOINT, getproxies()
    if _hub_constants().HF_HUB_OFFLINE:
        return Fact("hub", f"not used (HF_HUB_OFFLINE); {endpoint}")
    proxy = proxies.get(endpoint.partition(":")[0]) or proxies.get("all") or ""
    through = f" through the proxy {proxy if '://' in proxy else f'http://{proxy}'}" if proxy else ""
    advice = "correct HTTPS_PROXY or ALL_PROXY" if proxy else "set HF_ENDPOINT or HTTPS_PROXY"
    if problem := _reached(endpoint):
        return Fact("hub", f"{endpoint} {problem}{through}", f"use local directories, or {advice}")
    return Fact("hub", f"{endpoint} answers{through}")


def _reached(url: str) -> str:
    """Why a server cannot be reached within `SECONDS` by the client of the hub, with the user, password and proxy that
    are set; empty if it answers."""
    try:
        status = _in_time(lambda: huggingface_hub.get_session().head(url, timeout=SECONDS).status_code)
    except TimeoutError as error:
        return str(error)
    except Exception as error:  # whatever the network stack raises
        return f"cannot be reached ({str(error) or type(error).__name__})"
    return f"answers with an error (HTTP {status})" if status == 407 or status >= 500 else ""


def _in_time(function: Callable[[], Any]) -> Any:
    """What a function returns or raises. It runs in a thread, as looking up an address, opening a named pipe, and using
    a network drive that is gone have no timeout. Raises TimeoutError: it takes more than `SECONDS`."""
    result = Future[Any]()

    def run() -> None:
        try:
            result.set_result(function())
        except BaseException as error:
            result.set_exception(error)

    Thread(target=run, daemon=True).start()
    wait([result], SECONDS)
    if not result.done():
        raise TimeoutError(f"does not answer within {SECONDS:g} s")
    return result.result()
