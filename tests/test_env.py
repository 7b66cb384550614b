"""`loratune env`: what a machine has, and whether it computes what stock transformers and PEFT compute."""

import json
import os
import socket
import sys
import time
from base64 import b64encode
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import pytest
import torch
from conftest import check_refused
from running import Cli, MakeConfig

import loratune
from loratune.api import libraries, self_test, self_test_operations
from loratune.codes import Code
from loratune.commands import env
from loratune.console import log
from loratune.errors import ModelError, Problem
from loratune.kernels.compiled import fused_ops, library, reference
from loratune.kernels.compiled import self_test as results

FLOAT32 = results.OPERATIONS.format("float32")


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache directory in which no results are."""
    monkeypatch.setattr(library, "cache_directory", lambda: tmp_path / "cache")
    results.record({})
    yield tmp_path / "cache"
    monkeypatch.undo()
    results._known.cache_clear()


def test_the_page(cli: Cli) -> None:
    ran = cli("env")
    assert ran.code == 0, ran.err
    sections = [line for line in ran.out.splitlines() if not line.startswith(" ")]
    assert sections[:5] == ["program", "packages", "processor", "compiled code", "GPU"]
    assert f"torch {torch.__version__}" in " ".join(ran.out.split())
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
    monkeypatch.setattr(env.huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    env.huggingface_hub.close_session()
    yield
    env.huggingface_hub.close_session()


@pytest.mark.usefixtures("direct")
def test_a_hub_that_accepts_and_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert env._reached(f"http://127.0.0.1:{server.getsockname()[1]}")
    assert env._reached("http://127.0.0.1:1").startswith("cannot be reached")
    assert env._reached("no url").startswith("cannot be reached")


@pytest.mark.usefixtures("direct")
def test_a_name_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking up an address has no timeout."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(5))
    monkeypatch.setattr(env, "SECONDS", 0.5)
    start = time.monotonic()
    assert env._reached("http://nowhere.invalid") == "does not answer within 0.5 s"
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
    monkeypatch.setattr(env.huggingface_hub.constants, "ENDPOINT", f"http://me:g%20h@{server}/{status}")
    (fact,) = env._found("hub", env._endpoint)
    assert fact.value.startswith(f"http://{server}/{status} {STATUSES[status]}") and "me:" not in str(fact)
    assert bool(fact.advice) == (status > 406)
    assert Server.asked == [(f"/{status}", f"Basic {b64encode(b'me:g h').decode()}")]


@pytest.mark.parametrize("name", ["ALL_PROXY", "HTTP_PROXY"])
@pytest.mark.parametrize("works", [True, False])
def test_a_proxy_is_used_and_named(works: bool, name: str, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, f"http://me:secret@{server if works else '127.0.0.1:1'}")
    monkeypatch.setattr(env.huggingface_hub.constants, "ENDPOINT", "http://nowhere.invalid/200")
    (fact,) = env._found("hub", env._endpoint)
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
    "no home directory": ("env.library", "cache_directory", RuntimeError("Could not determine home directory.")),
    "token file is a directory": ("env.huggingface_hub", "get_token", IsADirectoryError(21, "Is a directory", "/t")),
    "token of OIDC": ("env.huggingface_hub", "get_token", ValueError("no token")),
    "no /proc": ("env.psutil", "virtual_memory", FileNotFoundError(2, "No such file", "/proc/meminfo")),
    "no metadata": ("env.importlib.metadata", "requires", PackageNotFoundError("loratune")),
    "bitsandbytes exits": ("env", "bitsandbytes_lacks", SystemExit(5)),
    "unreadable directory": ("env", "datasets_cache_dir", PermissionError(13, "Permission denied", "/c")),
    "a driver fails": ("env.accelerator", "names", RuntimeError("CUDA error")),
    "git fails": ("env.release", "describe", UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")),
    "the self-test": ("env.self_test", "passed", MemoryError()),
}


@pytest.mark.parametrize("name", FAILURES)
def test_what_fails_becomes_a_line(name: str, monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    owner, function, error = FAILURES[name]
    monkeypatch.setattr(f"loratune.commands.{owner}.{function}", fail(error))
    ran = cli("env", "--json")
    assert ran.code == 0, ran.err
    facts = [fact for section in json.loads(ran.out).values() for fact in section.values()]
    (found,) = [fact for fact in facts if f"({type(error).__name__}:" in fact["value"]]
    assert found["advice"]


def test_ctrl_c_is_no_line() -> None:
    with pytest.raises(KeyboardInterrupt):
        env._found("a", fail(KeyboardInterrupt()))


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
    monkeypatch.setattr(env, "OPTIONAL", {"broken_kernels": "attention", "nothing_like_this": "speed"})
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "broken_kernels", raising=False)
        facts = {fact.name: fact for fact in env.describe().sections["optional libraries"]}
    sys.modules.pop("broken_kernels", None)
    assert MODULES[source] in facts["broken_kernels"].value and "HELLO" not in capsys.readouterr().out
    assert bool(facts["broken_kernels"].advice) == ("print" not in source)
    assert facts["nothing_like_this"].value.startswith("not installed")


def test_a_package_that_ends_the_program_as_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "transformers")
    with pytest.raises(ImportError, match="exit code 5"), libraries():
        sys.exit(5)


COMPILERS = {"exit 1": "does not work (CalledProcessError", "sleep 60": "does not work (TimeoutExpired", "": ", "}


@pytest.mark.parametrize("script", COMPILERS)
def test_a_compiler_that_does_not_work(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gcc").write_text(f"#!/bin/sh\nexec {script or 'echo gcc 1'}\n")
    (tmp_path / "gcc").chmod(0o755)
    monkeypatch.setattr(env.shutil, "which", lambda name: str(tmp_path / "gcc"))
    monkeypatch.setattr(env, "SECONDS", 0.5)
    compiler, *dtypes = env._compiled_code()
    assert COMPILERS[script] in compiler.value
    assert len(dtypes) == (0 if script else 2)


def test_a_reason_for_all_dtypes_is_given_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORATUNE_NATIVE", "0")
    facts = [*env._compiled_code()][1:]
    assert all(fact.value.startswith("not in use") for fact in facts)
    assert [bool(fact.advice) for fact in facts] == [True, False]


def test_a_processor_that_is_hidden_and_an_xpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env.environment, "features", frozenset)
    assert {fact.name: fact for fact in env._processor()}["instructions"].value.startswith("not known")
    monkeypatch.setattr(torch.version, "xpu", "20250101")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert next(env._gpus()).value == "XPU 20250101"


def test_too_few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env.platforms, "processor_count", lambda: 8)
    monkeypatch.setattr(env.environment, "processors", lambda: 4.0)
    monkeypatch.setattr(env.torch, "get_num_threads", lambda: 2)
    assert "OMP_NUM_THREADS" in env._cores().advice
    monkeypatch.setattr(env.torch, "get_num_threads", lambda: 4)
    assert not env._cores().advice


def test_a_package_that_is_too_old_or_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = ["torch>=2.13", "nothing-like-this>=1", 'pytest>=9999; extra == "dev"']
    monkeypatch.setattr(env.importlib.metadata, "requires", lambda name: needed)
    monkeypatch.setattr(torch, "__version__", "1.0")
    facts = {fact.name: fact for fact in env._packages()}
    assert facts["nothing-like-this"].advice == "pip install 'nothing-like-this>=1'"
    assert facts["pytest"].advice == "pip install 'pytest>=9999'"
    assert not facts["torch"].advice


def test_caches_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One below a file, one that cannot be written, one that is not there, and one whose name is too long."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(env.huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(env, "datasets_cache_dir", lambda: tmp_path / ("x" * 300))
    monkeypatch.setattr(env.library, "cache_directory", lambda: tmp_path / "here" / "loratune")
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "absent"))
    monkeypatch.setattr(env.os, "access", lambda path, mode: Path(path) != tmp_path / "here")
    facts = {fact.name.partition(" ")[0]: fact for fact in env._memory()}
    assert "is not a directory" in facts["bases"].advice
    assert "cannot be used (OSError" in facts["rows"].value and "that you can write to" in facts["rows"].advice
    assert "is not writable" in facts["compiled"].advice
    assert "there is no such directory" in facts["temporary"].advice and "absent" in facts["temporary"].value


@pytest.mark.slow
def test_all_checks_pass_here(cli: Cli, own_cache: Path) -> None:
    ran = cli("env", "--self-test", "--json")
    assert ran.code == 0, ran.err
    checks = {check["name"]: check for check in json.loads(ran.out)["self_test"]}
    assert [check for check in checks.values() if check["result"] == env.FAILED] == []
    assert {"resume", "generate", "dpo, float32", FLOAT32} <= checks.keys()
    assert checks["speed"]["result"] == env.PASSED and "times as fast" in checks["speed"]["detail"]
    if not torch.accelerator.is_available():
        needing = {"shared prefixes on a GPU", "FlashAttention 2", results.LIGER}
        assert {name for name in needing if checks[name]["result"] == env.NOT_AVAILABLE} == needing
    assert results.failed() == []


def test_operations_that_compute_something_else_fail(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert self_test._outcome(lambda: self_test_operations.operations(torch.float32))[0] == env.PASSED
    compiled = fused_ops.CompiledOps.swiglu
    monkeypatch.setattr(fused_ops.CompiledOps, "swiglu", lambda *given: compiled(*given) * 1.01)
    result, detail = self_test._outcome(lambda: self_test_operations.operations(torch.float32))
    assert result == env.FAILED and "(gate)" in detail and "is allowed" in detail


def test_what_failed_is_not_used_and_said(
    own_cache: Path, cli: Cli, run_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def checks(self: Any) -> Iterator[tuple[str, Any]]:
        yield FLOAT32, lambda: 1 / 0
        yield "generate", lambda: "as expected"

    like = torch.zeros(1)
    assert isinstance(fused_ops.fused_ops(like), fused_ops.CompiledOps)
    with monkeypatch.context() as patch:
        patch.setattr(self_test._SelfTest, "checks", checks)
        check_refused(cli("env", "--self-test"), 6, (Code.SYSTEM_SELF_TEST, "", ""))
    assert results.failed() == [FLOAT32]
    assert fused_ops.fused_ops(like) is reference
    facts = {fact.name: fact.value for fact in env._program()}
    assert facts["self-test"] == f"failed here: {FLOAT32}"
    ran = cli("train", run_config(training={"max_steps": 1}))
    assert ran.code == 0 and "self-test failed on this machine" in ran.err
    results.record({FLOAT32: env.PASSED})
    assert {fact.name: fact.value for fact in env._program()}["self-test"] == "1 check passed here"
    assert isinstance(fused_ops.fused_ops(like), fused_ops.CompiledOps)


@pytest.mark.parametrize("content", ["", "[", "[]", '{"a": 1}', '{"a": {"b": 1}}'])
def test_results_that_are_damaged_are_none(content: str, own_cache: Path) -> None:
    (own_cache / "self-test.json").write_text(content)
    results._known.cache_clear()
    assert results.failed() == []
    assert results.record({FLOAT32: env.FAILED}) == ""
    assert results.failed() == [FLOAT32]


def test_results_of_another_user_are_not_read(own_cache: Path) -> None:
    results.record({FLOAT32: env.FAILED})
    os.chmod(own_cache / "self-test.json", 0o666)
    results._known.cache_clear()
    assert results.failed() == []


def test_results_that_cannot_be_kept(own_cache: Path) -> None:
    (own_cache / "self-test.json").unlink()
    (own_cache / "self-test.json").mkdir()
    assert results.record({FLOAT32: env.FAILED})
