"""Commands with a local model ask no hub, and no other server; and files that never end are not read as they start."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml
from conftest import Ran
from running import MakeConfig

SECONDS = 240
"""The limit of each process here; on a busy machine they take 15 s."""


class Server(ThreadingHTTPServer):
    """A hub, and a proxy, that has nothing. asked: the line of each request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []


class Handler(BaseHTTPRequestHandler):
    """Records a request, and answers 404."""

    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.requestline)
        self.send_error(404)

    do_HEAD = do_POST = do_PUT = do_CONNECT = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The hub of the processes that a test starts, and their way to all others."""
    with Server() as made:
        Thread(target=made.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{made.server_port}"
        for name in ("HF_ENDPOINT", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, url)
            monkeypatch.delenv(name.lower(), raising=False)
        for name in ("NO_PROXY", "no_proxy", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        yield made
        made.shutdown()


ONE_AFTER_ANOTHER = """
import json, sys
from typer.testing import CliRunner
from loratune.cli import app
for arguments in json.loads(sys.argv[1]):
    ran = CliRunner().invoke(app, arguments, prog_name="loratune")
    print(json.dumps([ran.exit_code, ran.stdout, ran.stderr]))
from kernels import get_kernel
from transformers.integrations.hub_kernels import get_kernel_hub
from transformers.utils import is_kernels_available
assert get_kernel_hub is get_kernel and is_kernels_available()
"""
"""At the end, what the program itself does with hub kernels is as before."""


def run(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, words)]
    settings = os.environ | environment
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=settings, timeout=SECONDS
    )


def task(folder: Path, rows: Path) -> Path:
    """A task of the harness on these rows."""
    files = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(rows)}}, "test_split": "test"}
    texts = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{prompt}}{{completion}}"}
    path = folder / "sums.yaml"
    path.write_text(yaml.safe_dump({"task": "sums"} | files | texts))
    return path


def commands(config: Path, base: Path, folder: Path) -> list[list[object]]:
    """All commands that need no server."""
    adapter, rows = folder / "out", folder / "rows.jsonl"
    chosen = ["--adapter", adapter]
    return [
        ["--version"], ["train", "--help"], ["explain", "lora.r"], ["schema"],
        ["train", config, "--set", "model.quantization=4bit", "--dry-run"], ["params", config], ["train", config],
        ["init", rows, "--model", base, "--output", folder / "made.yaml"],
        ["generate", *chosen, "1 and", "--max-new-tokens", 2], ["evaluate", *chosen, "--data", rows],
        ["evaluate", *chosen, "--tasks", task(folder, rows)],
        ["report", *chosen, "--output", folder / "page.html"], ["merge", *chosen, "--output", folder / "merged"],
        ["export", *chosen, "--to", "peft", "--output", folder / "peft"],
    ]  # fmt: skip


def test_commands_with_a_local_model_ask_nothing(
    server: Server, run_config: MakeConfig, tiny_dir: Path, tmp_path: Path
) -> None:
    """`env` alone asks whether the hub answers."""
    listed = [*commands(run_config(training={"max_steps": 2}), tiny_dir, tmp_path), ["env"]]
    arguments = json.dumps([[str(word) for word in command] for command in listed])
    done = run("-c", ONE_AFTER_ANOTHER, arguments)
    ran = [Ran(*json.loads(line)) for line in done.stdout.splitlines() if line.startswith("[")]
    assert [(command[0], one.err) for command, one in zip(listed, ran, strict=True) if one.code] == []
    assert done.returncode == 0, done.stderr
    assert "kernels-community" not in done.stderr + "".join(one.err for one in ran)
    assert [line.partition(" ")[0] for line in server.asked] == ["HEAD"], server.asked


def test_processes_read_no_file_of_the_hub_or_of_certificates(
    server: Server, run_config: MakeConfig, tmp_path: Path
) -> None:
    """Each is a pipe here that nobody writes to: whoever reads it waits for ever."""
    os.mkfifo(pipe := tmp_path / "pipe")
    pipes = dict.fromkeys(("SSL_CERT_FILE", "HF_TOKEN_PATH", "HF_HOME", "HF_HUB_CACHE"), str(pipe))
    trained = run("-m", "loratune", "train", run_config(training={"max_steps": 1}), **pipes)
    assert trained.returncode == 0, trained.stderr
    answered = run("-m", "loratune", "generate", "--adapter", tmp_path / "out", "1 and", "--max-new-tokens", 2, **pipes)
    assert answered.returncode == 0, answered.stderr
    assert server.asked == []
