"""Errors that do not stop a command are logged with `--debug`, and only then."""

import ast
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
import torch
from conftest import CHAT_TEMPLATE, ROOT, write_rows
from running import Cli, MakeConfig
from test_kernels import adapted
from torch import nn

from loratune import kernels
from loratune.cli.boundary import boundary
from loratune.data.batch_check import packing_refusal
from loratune.lora import attach

SILENT = {"signals.py: write_line"}
"""It writes to the terminal from a signal handler, and a failure cannot be reported anywhere else."""


def catches_all(handled: ast.expr | None) -> bool:
    """Whether an except clause or a `suppress` catches every exception."""
    names = {node.id for node in ast.walk(handled) if isinstance(node, ast.Name)} if handled else {"BaseException"}
    return bool(names & {"Exception", "BaseException"})


def reports_error(handler: ast.ExceptHandler) -> bool:
    """Whether a clause raises, uses the caught error, or logs it."""
    nodes = [node for line in handler.body for node in ast.walk(line)]
    used = any(isinstance(node, ast.Name) and node.id == handler.name for node in nodes)
    called = {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}
    return used or any(isinstance(node, ast.Raise) for node in nodes) or bool(called & REPORTS)


REPORTS = {"_log.debug", "traceback.format_exc"}


def silent_functions(tree: ast.Module) -> Iterator[str]:
    """The functions that catch every exception without reporting it."""
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.ExceptHandler) and catches_all(node.type) and not reports_error(node):
                yield function.name
            called = node.func if isinstance(node, ast.Call) else None
            if isinstance(called, ast.Name) and called.id == "suppress" and any(map(catches_all, node.args)):  # type: ignore[attr-defined]
                yield function.name


def test_no_exception_is_caught_silently() -> None:
    package = ROOT / "loratune"
    assert {
        f"{path.name}: {name}"
        for path in package.rglob("*.py")
        for name in silent_functions(ast.parse(path.read_text("utf-8")))
    } == SILENT


@pytest.mark.parametrize(
    "clause, is_silent",
    [
        ("except Exception:\n  pass", True),
        ("except (KeyError, Exception):\n  return None", True),
        ("except:\n  x = 1", True),
        ("except Exception as error:\n  return None", True),
        ("except Exception as error:\n  return str(error)", False),
        ("except Exception:\n  _log.debug('what', exc_info=True)", False),
        ("except BaseException:\n  raise", False),
        ("except KeyError:\n  pass", False),
    ],
)
def test_silent_handlers_are_detected(clause: str, is_silent: bool) -> None:
    body = f"try:\n  y = 1\n{clause}".replace("\n", "\n  ")
    assert [*silent_functions(ast.parse(f"def f():\n  {body}"))] == ["f"] * is_silent
    assert [*silent_functions(ast.parse("def f():\n  with suppress(Exception):\n    pass"))] == ["f"]


def test_ignored_errors_of_a_run_are_logged_with_debug(
    run_config: MakeConfig, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A template that fails on messages with marks, and damaged rows in the cache. Its messages end with one of the
    characters that it allows, and a mark is none of them."""
    template = tmp_path / "chat.jinja"
    refusal = "{% if messages[0].content[-1] not in '012345678?!.s' %}{{ raise_exception('no such end') }}{% endif %}"
    template.write_text(refusal + CHAT_TEMPLATE)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    turns = [[{"role": "user", "content": text}, {"role": "assistant", "content": text}] for text in map(str, range(9))]
    rows = write_rows(tmp_path / "chats.jsonl", [{"messages": messages} for messages in turns])
    data = {"train": str(rows), "chat_template": str(template)}
    config = run_config(data=data, training={"max_steps": 1})
    runs = []
    for arguments in ((), ("--debug",), ()):
        for path in (tmp_path / "cache").glob("loratune/*/whole"):
            path.write_text("{}")
        runs.append(cli("train", config, "--overwrite", "--allow-worse", *arguments))
        assert runs[-1].code == 0, runs[-1].err
    for quiet in (runs[0], runs[2]):
        assert "debug:" not in quiet.err and "Traceback" not in quiet.err
    messages = runs[1].err
    assert re.search(
        r"^debug: loratune\.[\w.]+: the chat template fails on messages with marks\nTraceback ", messages, re.M
    )
    assert "no such end" in messages
    assert re.search(r"^debug: loratune\.[\w.]+: the rows in \S+ are not used\nTraceback ", messages, re.M)
    assert logging.getLogger("loratune").handlers == []


class Failing(nn.Module):
    """Fails on any input."""

    def forward(self, *_: object, **__: object) -> torch.Tensor:
        raise ValueError("it fails on purpose")


def test_models_that_cannot_be_analyzed_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted()
    model.get_base_model().model.layers[1] = Failing()
    for debug in (True, False):
        with boundary(debug):
            assert "loss" in kernels.accelerate(model, attach.adapted_linear).fallbacks
            assert packing_refusal(model, 9) is not None
        messages = capsys.readouterr().err
        expected = (
            "the model does not run on packed rows",
            "attention is not understood",
            "the loss is left to the model",
            "llama does not run on flat rows",
        )
        assert [line in messages for line in expected] == [debug] * 4
        assert messages.count("ValueError: it fails on purpose") == (5 if debug else 0)
