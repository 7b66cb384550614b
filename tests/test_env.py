"""`loratune env`: what a machine has, and whether it computes what stock transformers and PEFT compute."""

import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import check_refused
from running import Cli, MakeConfig

import loratune
from loratune.api import self_test, self_test_operations
from loratune.codes import Code
from loratune.commands import env
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


def test_a_hub_that_accepts_and_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert env._reached(f"http://127.0.0.1:{server.getsockname()[1]}")
    assert env._reached("http://127.0.0.1:1").startswith("cannot be reached")
    assert env._reached("no url").startswith("cannot be reached")


def test_a_name_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking up an address has no timeout."""
    slow = "import socket, time\nsocket.getaddrinfo = lambda *_, **__: time.sleep(60)\n"
    monkeypatch.setattr(env, "_REQUEST", slow + env._REQUEST)
    monkeypatch.setattr(env, "SECONDS", 0.5)
    start = time.monotonic()
    assert env._reached("http://nowhere.invalid") == "does not answer within 0.5 s"
    assert time.monotonic() - start < 10


def test_a_library_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_kernels.py").write_text("raise OSError('libcudart.so.12 is missing')")
    monkeypatch.syspath_prepend(tmp_path)
    assert env._imported("broken_kernels") == "installed, but cannot be imported (libcudart.so.12 is missing)"
    assert env._imported("nothing_like_this") == "not installed" and env._imported("json") == "installed"


def test_a_package_that_is_too_old_or_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = ["torch>=2.13", "nothing-like-this>=1", 'pytest>=9999; extra == "dev"']
    monkeypatch.setattr(env.importlib.metadata, "requires", lambda name: needed)
    monkeypatch.setattr(torch, "__version__", "1.0")
    facts = {fact.name: fact for fact in env._packages()}
    assert facts["nothing-like-this"].advice == "pip install 'nothing-like-this>=1'"
    assert facts["pytest"].advice == "pip install 'pytest>=9999'"
    assert not facts["torch"].advice


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(env.os, "access", lambda path, mode: Path(path) != tmp_path)
    facts = {fact.name: fact for fact in env._memory()}
    assert f"{tmp_path} is not writable" in facts["temporary files (TMPDIR)"].advice
    assert not facts["bases (HF_HUB_CACHE)"].advice


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
