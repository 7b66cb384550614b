"""`loratune env`: what a machine has, and whether it computes what stock transformers and PEFT compute."""

import errno
import json
import os
import socket
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import pytest
import torch
from conftest import check_refused, mainly, process
from running import Cli, MakeConfig
from transformers import LlamaForCausalLM
from transformers.utils.import_utils import is_kernels_available

import loratune
from loratune.api import libraries, machine, self_test, self_test_operations
from loratune.codes import Code
from loratune.console import log
from loratune.data.upstream import datasets_cache_dir
from loratune.errors import ModelError, NumericError, Problem, ResourceError
from loratune.events import noted
from loratune.kernels.compiled import fused_ops, reference
from loratune.model import fingerprints
from loratune.system import hub_kernels

FLOAT32 = "compiled operations, float32"


def test_the_page(cli: Cli) -> None:
    ran = cli("env")
    assert ran.code == 0, ran.err
    sections = [line for line in ran.out.splitlines() if not line.startswith(" ")]
    assert sections[:5] == ["program", "packages", "processor", "compiled code", "GPU"]
    assert f"torch {version('torch')}" in " ".join(ran.out.split())
    facts = json.loads(cli("env", "--json").out)
    assert "self_test" not in facts and facts["program"]["loratune"]["value"].startswith(loratune.__version__)
    assert facts["GPU"]["GPU"]["value"] == "none; training runs on the CPU"


def test_a_token_is_never_shown(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    ran = cli("env")
    assert "hf_secret" not in ran.out + ran.err
    assert "present" in json.loads(cli("env", "--json").out)["hub"]["token"]["value"]


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The client of the hub without a proxy."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setattr(machine.huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    machine.huggingface_hub.close_session()
    yield
    machine.huggingface_hub.close_session()


@pytest.mark.usefixtures("direct")
def test_a_hub_that_accepts_and_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert machine._reached(f"http://127.0.0.1:{server.getsockname()[1]}")
    assert machine._reached("http://127.0.0.1:1").startswith("cannot be reached")
    assert machine._reached("no url").startswith("cannot be reached")


@pytest.mark.usefixtures("direct")
def test_a_name_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking up an address has no timeout."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(5))
    monkeypatch.setattr(machine, "SECONDS", 0.5)
    start = time.monotonic()
    assert machine._reached("http://nowhere.invalid") == "does not answer within 0.5 s"
    assert time.monotonic() - start < 4


class Server(BaseHTTPRequestHandler):
    """Answers with the status that the path names; `asked` has path and Authorization of each request."""

    asked: ClassVar[list[tuple[str, str | None]]] = []

    def do_HEAD(self) -> None:
        """Called with each request."""
        self.asked.append((self.path, self.headers["Authorization"]))
        self.send_response(int(self.path.rpartition("/")[2]))
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""


@pytest.fixture
def server(direct: None) -> Iterator[str]:
    """Host and port of a `Server`."""
    Server.asked.clear()
    with HTTPServer(("127.0.0.1", 0), Server) as made:
        Thread(target=made.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{made.server_port}"
        made.shutdown()


STATUSES = {200: "answers", 404: "answers", 503: "answers with an error (HTTP 503)", 407: "answers with an error"}


@pytest.mark.parametrize("status", STATUSES)
def test_what_the_hub_answers(status: int, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """User and password of its URL are sent, and not shown."""
    monkeypatch.setattr(machine.huggingface_hub.constants, "ENDPOINT", f"http://me:g%20h@{server}/{status}")
    (fact,) = machine._found("hub", machine._endpoint)
    assert fact.value.startswith(f"http://{server}/{status} {STATUSES[status]}") and "me:" not in str(fact)
    assert bool(fact.advice) == (status > 406)
    assert Server.asked == [(f"/{status}", f"Basic {b64encode(b'me:g h').decode()}")]


@pytest.mark.parametrize("name", ["ALL_PROXY", "HTTP_PROXY"])
@pytest.mark.parametrize("works", [True, False])
def test_a_proxy_is_used_and_named(works: bool, name: str, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, f"http://me:secret@{server if works else '127.0.0.1:1'}")
    monkeypatch.setattr(machine.huggingface_hub.constants, "ENDPOINT", "http://nowhere.invalid/200")
    (fact,) = machine._found("hub", machine._endpoint)
    assert "through the proxy http://127.0.0.1:" in fact.value and "secret" not in str(fact)
    assert bool(fact.advice) != works and (works or name in fact.advice or "PROXY" in fact.advice)
    assert [path for path, _ in Server.asked] == ["http://nowhere.invalid/200"] * works


URLS = {
    "https://me:geheim@mirror.example/a": "https://mirror.example/a",
    "see 'http://me@host' and (socks5://a:b@c:1)": "see 'http://host' and (socks5://c:1)",
    "https://a:p@ss@host/x@y": "https://host/x@y",
    "https://host/a@b?c=d@e and me@host": "https://host/a@b?c=d@e and me@host",
}


@pytest.mark.parametrize("text", URLS)
def test_messages_have_urls_without_passwords(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    problem = Problem(Code.MODEL_HUB_UNREACHABLE, text, text, fix=text)
    assert str(problem).count(URLS[text]) == 3 and ("geheim" not in str(ModelError(problem)))
    assert problem.to_dict()["what"] == URLS[text]
    log(text)
    assert capsys.readouterr().err.strip() == URLS[text]


def fail(error: BaseException) -> Any:
    """A function that raises this."""

    def function(*_: Any, **__: Any) -> Any:
        raise error

    return function


FAILURES: dict[str, tuple[str, str, BaseException]] = {
    "no home directory": ("machine", "cache_directory", RuntimeError("Could not determine home directory.")),
    "token file is a directory": (
        "machine.huggingface_hub",
        "get_token",
        IsADirectoryError(21, "Is a directory", "/t"),
    ),
    "token of OIDC": ("machine.huggingface_hub", "get_token", ValueError("no token")),
    "no /proc": ("machine.psutil", "virtual_memory", FileNotFoundError(2, "No such file", "/proc/meminfo")),
    "no metadata": ("machine.importlib.metadata", "requires", PackageNotFoundError("loratune")),
    "bitsandbytes exits": ("machine", "bitsandbytes_lacks", SystemExit(5)),
    "unreadable directory": ("machine", "datasets_cache_dir", PermissionError(13, "Permission denied", "/c")),
    "a driver fails": ("machine.accelerator", "names", RuntimeError("CUDA error")),
    "git fails": ("machine.release", "describe", UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")),
    "the self-test": ("machine", "known_results", MemoryError()),
}


@pytest.mark.parametrize("name", FAILURES)
def test_what_fails_becomes_a_line(name: str, monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    owner, function, error = FAILURES[name]
    monkeypatch.setattr(f"loratune.api.{owner}.{function}", fail(error))
    ran = cli("env", "--json")
    assert ran.code == 0, ran.err
    facts = [fact for section in json.loads(ran.out).values() for fact in section.values()]
    (found,) = [fact for fact in facts if f"({type(error).__name__}:" in fact["value"]]
    assert found["advice"]


def test_ctrl_c_is_no_line() -> None:
    with pytest.raises(KeyboardInterrupt):
        machine._found("a", fail(KeyboardInterrupt()))


MODULES = {
    "raise OSError('libcudart.so.12 is missing')": "cannot be imported (OSError: libcudart.so.12 is missing)",
    "import sys; sys.exit(3)": "cannot be imported (SystemExit: 3)",
    "print('HELLO')": "installed; attention",
}


@pytest.mark.parametrize("source", MODULES)
def test_a_library_that_cannot_be_imported(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken_kernels.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(machine, "OPTIONAL", {"broken_kernels": "attention", "nothing_like_this": "speed"})
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "broken_kernels", raising=False)
        facts = {fact.name: fact for fact in machine.describe().sections["optional libraries"]}
    sys.modules.pop("broken_kernels", None)
    assert MODULES[source] in facts["broken_kernels"].value and "HELLO" not in capsys.readouterr().out
    assert bool(facts["broken_kernels"].advice) == ("print" not in source)
    assert facts["nothing_like_this"].value.startswith("not installed")


def test_packages_that_break_the_libraries(tmp_path: Path) -> None:
    """PEFT imports bitsandbytes, and torch Triton."""
    for name in ("bitsandbytes", "triton"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise RuntimeError('{name} is broken')")
    ran = process("env", "--json", PYTHONPATH=f"{tmp_path}:{Path(loratune.__file__).parents[1]}")
    assert ran.code == 0, ran.err
    facts = json.loads(ran.out)
    broken = facts["program"]["libraries"]
    assert "is broken, in " in broken["value"] and str(tmp_path) in broken["value"] and broken["advice"]
    for name in ("bitsandbytes", "triton"):
        found = facts["optional libraries"][name]
        assert f"{name} is broken" in found["value"] and f"--force-reinstall {name}" in found["advice"]
    assert "torch" in facts["packages"] and "cores" in facts["processor"] and "hub" in facts["hub"]
    advice = [fact["advice"] for section in facts.values() for fact in section.values() if "advice" in fact]
    assert not any("repair what the line names" in one for one in advice)


VARIABLES = {
    "HF_ENDPOINT": ("gopher://[::1", "hub", "Invalid IPv6 URL"),
    "HF_HUB_DOWNLOAD_TIMEOUT": ("soon", "hub", "invalid literal for int()"),
    "HF_DATASETS_IN_MEMORY_MAX_SIZE": ("much", "libraries", "could not convert string to float"),
    "TORCH_LOGS": ("x=y=", "libraries", "Invalid log settings"),
    "HF_TOKEN_PATH": ("{pipe}", "token", "does not answer within 2 s"),
    "HF_HOME": ("{pipe}", "token", "NotADirectoryError"),
    "HF_HUB_CACHE": ("{pipe}", "bases (HF_HUB_CACHE)", ""),
    "SSL_CERT_FILE": ("{pipe}", "hub", "does not answer within 2 s"),
}
"""Variable → its value, the fact that names what is wrong, and with what words."""


@pytest.mark.parametrize("variable", mainly(("TORCH_LOGS", "HF_TOKEN_PATH"), VARIABLES))
def test_variables_that_libraries_cannot_use(variable: str, tmp_path: Path) -> None:
    """Most are read as a library is imported."""
    os.mkfifo(tmp_path / "pipe")
    value, name, told = VARIABLES[variable]
    ran = process("env", "--json", **{variable: value.format(pipe=tmp_path / "pipe"), "HF_HUB_OFFLINE": "0"})
    assert ran.code == 0, ran.err
    facts = {name: fact for section in json.loads(ran.out).values() for name, fact in section.items()}
    assert told in facts[name]["value"] and facts[name]["advice"], facts[name]
    assert {"torch", "cores", "token", "temporary files (TMPDIR)"} <= facts.keys()


def test_a_package_that_ends_the_program_as_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "transformers")
    with pytest.raises(ImportError, match="exit code 5"), libraries():
        sys.exit(5)


IMPORTS = """
from loratune.system import hub_kernels
with hub_kernels.hidden_from_bitsandbytes():
    with hub_kernels.hidden_from_bitsandbytes():
        import json
    import bitsandbytes, kernels
assert bitsandbytes.kernels is None
with hub_kernels.hidden():
    with hub_kernels.hidden():
        pass
    try:
        import kernels
    except ImportError:
        print("hidden")
import kernels
"""


def test_no_library_runs_code_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package `kernels`, which loads such code, is hidden as bitsandbytes is imported, and as a base is loaded."""
    (tmp_path / "kernels.py").write_text("")
    (tmp_path / "bitsandbytes.py").write_text("try:\n    import kernels\nexcept ImportError:\n    kernels = None\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(loratune.__file__).parent.parent}")
    ran = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=False)
    assert (ran.stdout, ran.stderr) == ("hidden\n", "")


def test_transformers_knows_of_no_kernels_as_a_base_is_loaded() -> None:
    before = is_kernels_available(), sys.modules.get("kernels")
    with hub_kernels.hidden():
        assert not is_kernels_available()
    assert (is_kernels_available(), sys.modules.get("kernels")) == before


def test_threads_hide_the_package_until_the_last_is_done() -> None:
    """Whichever ends first."""
    before = sys.modules.get("kernels")
    first, second = hub_kernels.hidden(), hub_kernels.hidden()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert sys.modules["kernels"] is None and not is_kernels_available()
    second.__exit__(None, None, None)
    assert sys.modules.get("kernels") is before


COMPILERS = {"exit 1": "does not work (CalledProcessError", "sleep 60": "does not work (TimeoutExpired", "": ", "}


@pytest.mark.parametrize("script", COMPILERS)
def test_a_compiler_that_does_not_work(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gcc").write_text(f"#!/bin/sh\nexec {script or 'echo gcc 1'}\n")
    (tmp_path / "gcc").chmod(0o755)
    for dtype in fused_ops.DEFINES:  # loaded once for this process, with the real compiler
        fused_ops.fused_ops(torch.zeros(1, dtype=dtype))
    monkeypatch.setattr(machine.shutil, "which", lambda name: str(tmp_path / "gcc"))
    monkeypatch.setattr(machine, "SECONDS", 0.5)
    compiler, *dtypes = machine._compiled_code()
    assert COMPILERS[script] in compiler.value
    assert len(dtypes) == (0 if script else 2)


def test_a_reason_for_all_dtypes_is_given_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORATUNE_NATIVE", "0")
    facts = [*machine._compiled_code()][1:]
    assert all(fact.value.startswith("not in use") for fact in facts)
    assert [bool(fact.advice) for fact in facts] == [True, False]


def test_a_processor_that_is_hidden_and_an_xpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.environment, "features", frozenset)
    assert {fact.name: fact for fact in machine._processor()}["instructions"].value.startswith("not known")
    monkeypatch.setattr(torch.version, "xpu", "20250101")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert next(machine._gpus()).value == "XPU 20250101"


def test_too_few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.platforms, "processor_count", lambda: 8)
    monkeypatch.setattr(machine.environment, "processors", lambda: 4.0)
    monkeypatch.setattr(machine.torch, "get_num_threads", lambda: 2)
    assert "OMP_NUM_THREADS" in machine._cores().advice
    monkeypatch.setattr(machine.torch, "get_num_threads", lambda: 4)
    assert not machine._cores().advice


def test_a_package_that_is_too_old_or_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = ["torch>=2.13", "nothing-like-this>=1", 'pytest>=9999; extra == "dev"']
    monkeypatch.setattr(machine.importlib.metadata, "requires", lambda name: needed)
    monkeypatch.setattr(torch, "__version__", "1.0")
    facts = {fact.name: fact for fact in machine._packages()}
    assert facts["nothing-like-this"].advice == "pip install 'nothing-like-this>=1'"
    assert facts["pytest"].advice == "pip install 'pytest>=9999'"
    assert not facts["torch"].advice


def test_caches_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One below a file, one that cannot be written, one that is not there, and one whose name is too long."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(machine.huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(machine, "datasets_cache_dir", lambda: tmp_path / ("x" * 300))
    monkeypatch.setattr(machine, "cache_directory", lambda: tmp_path / "here" / "loratune")
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "absent"))
    monkeypatch.setattr(machine.os, "access", lambda path, mode: Path(path) != tmp_path / "here")
    facts = {fact.name.partition(" ")[0]: fact for fact in machine._memory()}
    assert "is not a directory" in facts["bases"].advice
    assert "cannot be used (OSError" in facts["rows"].value and "that you can write to" in facts["rows"].advice
    assert "is not writable" in facts["compiled"].advice
    assert "there is no such directory" in facts["temporary"].advice and "absent" in facts["temporary"].value


@pytest.mark.slow
def test_all_checks_pass_here(cli: Cli) -> None:
    ran = cli("env", "--self-test", "--json")
    assert ran.code == 0, ran.err
    checks = {check["name"]: check for check in json.loads(ran.out)["self_test"]}
    assert [check for check in checks.values() if check["result"] == machine.FAILED] == []
    assert {"resume", "generate", "dpo, float32", FLOAT32} <= checks.keys()
    assert checks["speed"]["result"] == machine.PASSED and "times as fast" in checks["speed"]["detail"]
    if not torch.accelerator.is_available():
        needing = {"shared prefixes on a GPU", "FlashAttention 2", "Liger's kernels"}
        assert {name for name in needing if checks[name]["result"] == machine.NOT_AVAILABLE} == needing


def test_operations_that_compute_something_else_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    assert self_test._outcome(lambda: self_test_operations.operations(torch.float32))[0] == machine.PASSED
    compiled = fused_ops.CompiledOps.swiglu
    monkeypatch.setattr(fused_ops.CompiledOps, "swiglu", lambda *given: compiled(*given) * 1.01)
    result, detail = self_test._outcome(lambda: self_test_operations.operations(torch.float32))
    assert result == machine.FAILED and "(gate" in detail and "is allowed" in detail


def run_checks(patch: pytest.MonkeyPatch, **found: Callable[[], Any]) -> list[machine.Check]:
    """The self-test with these checks in the place of its own. Underscores in names stand for spaces."""
    names = {name.replace("_", " "): check for name, check in found.items()}
    patch.setattr(self_test._SelfTest, "checks", lambda self: iter(names.items()))
    return self_test.run()


def kept_results_of(*names: str) -> dict[str, str]:
    """The kept results of checks, by name."""
    known = machine.known_results().load()
    return {name: known[name] for name in names if name in known}


def test_results_are_reported_and_switch_nothing(
    cli: Cli, run_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def checks(self: Any) -> Iterator[tuple[str, Any]]:
        yield FLOAT32, lambda: 1 / 0
        yield "generate", lambda: "as expected"

    with monkeypatch.context() as patch:
        patch.setattr(self_test._SelfTest, "checks", checks)
        ran = cli("env", "--self-test")
        check_refused(ran, 6, (Code.SYSTEM_SELF_TEST, "", ""))
    assert f"failed here: {FLOAT32}" in ran.out and "not run here" not in ran.out
    facts = {fact.name: fact.value for fact in machine._program()}
    assert facts["self-test"] == f"failed here: {FLOAT32}"
    assert isinstance(fused_ops.fused_ops(torch.zeros(1)), fused_ops.CompiledOps)
    ran = cli("train", run_config(training={"max_steps": 1}))
    assert ran.code == 0 and "self-test" not in ran.err
    run_checks(monkeypatch, a=lambda: "right", b=lambda: "right")
    assert {fact.name: fact.value for fact in machine._program()}["self-test"] == "2 checks passed here"


def test_a_self_test_that_is_stopped_keeps_the_results_of_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped() -> str:
        raise KeyboardInterrupt

    run_checks(monkeypatch, a=lambda: 1 / 0, b=lambda: "right")
    with pytest.raises(KeyboardInterrupt):
        run_checks(monkeypatch, a=lambda: "right", b=stopped)
    assert kept_results_of("a", "b") == {"a": machine.FAILED, "b": machine.PASSED}


def test_operations_that_compute_something_else_are_not_used(
    cli: Cli, run_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as those that this machine's compiler translated wrongly: the check is made where they are loaded."""
    compiled, like = fused_ops.CompiledOps.swiglu, torch.zeros(1)
    monkeypatch.setattr(fused_ops.CompiledOps, "swiglu", lambda *given: compiled(*given) * 1.01)
    fused_ops._library.cache_clear()
    try:
        assert fused_ops.fused_ops(like) is reference
        ran = cli("train", run_config(training={"max_steps": 1}))
        line = "they compute something else than torch on this machine: gate"
        assert ran.code == 0 and line in ran.err and line in fused_ops.refusal(like)
    finally:
        fused_ops._library.cache_clear()


OUTCOMES = [
    (ResourceError(Problem(Code.SYSTEM_DISK_FULL, "9 bytes are needed")), machine.NOT_AVAILABLE, "9 bytes are needed"),
    (ResourceError(Problem(Code.SYSTEM_OUT_OF_MEMORY, "too large")), machine.NOT_AVAILABLE, "too large"),
    (OSError(errno.ENOSPC, "No space left on device"), machine.NOT_AVAILABLE, "No space left"),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), machine.NOT_AVAILABLE, "quota"),
    (MemoryError(), machine.NOT_AVAILABLE, "MemoryError"),
    (RuntimeError("[enforce fail at inline_container.cc:672]"), machine.NOT_AVAILABLE, "inline_container"),
    (RuntimeError("CUDA error: out of memory"), machine.NOT_AVAILABLE, "out of memory"),
    (self_test_operations.NotAvailableError("there is no GPU"), machine.NOT_AVAILABLE, "there is no GPU"),
    (self_test_operations.DifferenceError("0.1 is too much"), machine.FAILED, "DifferenceError: 0.1 is too much"),
    (NumericError(Problem(Code.SYSTEM_SELF_TEST, "NaN")), machine.FAILED, "NaN"),
    (KeyError("x"), machine.FAILED, "KeyError: 'x'"),
    (OSError(errno.ENOENT, "No such file"), machine.FAILED, "No such file"),
]


@pytest.mark.parametrize(("error", "expected", "told"), OUTCOMES, ids=[repr(error) for error, *_ in OUTCOMES])
def test_a_lack_of_room_is_no_wrong_result(error: Exception, expected: str, told: str) -> None:
    def check() -> str:
        raise error

    result, detail = self_test._outcome(check)
    assert result == expected and told in detail


def test_checks_that_need_another_are_skipped_without_it(tmp_path: Path) -> None:
    tests = self_test._SelfTest(tmp_path)
    for check in (tests._resume, tests._generate, tests._liger):
        assert self_test._outcome(check)[0] == machine.NOT_AVAILABLE


def test_no_room_for_the_models_of_the_self_test(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full)
    ran = cli("env", "--self-test")
    assert ran.code == 8 and f"[{Code.SYSTEM_DISK_FULL}]" in ran.err and "TMPDIR" in ran.err


def test_a_self_test_leaves_nothing_in_the_caches(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, before = datasets_cache_dir(), [*datasets_cache_dir().rglob("*")]
    tests = list[self_test._SelfTest]()

    def checks(self: self_test._SelfTest) -> Iterator[tuple[str, Any]]:
        tests.append(self)
        yield self_test.PACKED.format("float32"), partial(self._sft, self_test.PACKED, torch.float32)

    monkeypatch.setattr(fingerprints, "_OLD", 0)
    monkeypatch.setattr(self_test._SelfTest, "checks", checks)
    (check,) = self_test.run()
    assert check.result == machine.PASSED, check.detail
    assert [*rows.rglob("*")] == before and len([*kept.iterdir()]) == 1
    assert not tests[0].folder.exists()


def test_a_self_test_that_waits_for_the_processor_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, where it is long."""
    with noted() as lines:
        run_checks(monkeypatch, a=lambda: time.sleep(0.5) or "")
        assert lines == []
        monkeypatch.setattr(self_test, "LONG_SECONDS", 0.2)
        run_checks(monkeypatch, a=lambda: time.sleep(1) or "", b=lambda: time.sleep(1) or "")
    assert len(lines) == 1 and "waits for the processor" in lines[0]


@pytest.mark.parametrize(("options", "chosen"), [(["--self-test"], "passive"), ([], "None")])
def test_threads_of_the_self_test_do_not_spin(options: list[str], chosen: str, tmp_path: Path) -> None:
    """OpenMP reads it as torch is loaded. With two busy programs beside it, spinning took four times the processor."""
    (tmp_path / "torch.py").write_text("import os\nraise ValueError(f'policy: {os.environ.get(\"OMP_WAIT_POLICY\")}')")
    ran = process("env", *options, PYTHONPATH=f"{tmp_path}:{Path(loratune.__file__).parents[1]}")
    assert f"policy: {chosen}" in ran.out + ran.err


def test_results_that_cannot_be_kept(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept.write_text("")
    with noted() as lines:
        run_checks(monkeypatch, a=lambda: 1 / 0)
    assert "the results of the self-test are not kept" in lines[0]
