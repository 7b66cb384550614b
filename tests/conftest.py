"""Fixtures that all tests share: a tiny model and tokenizer built in process, the real model, and the command line."""

import fcntl
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from fork_server import ForkServer, SharedTraces, fork_server
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from loratune.cli import app, terminal
from loratune.codes import Code
from loratune.compare import behavior
from loratune.config import AUTO, LoraSection, TrainingSection
from loratune.errors import LoratuneError
from loratune.system import hub_kernels
from loratune.system.cache import LAYERS, RESULTS

with hub_kernels.hidden_from_bitsandbytes():
    from loratune import memory
    from loratune.memory import activations

ROOT = Path(__file__).parent.parent
LIMIT = 240.0
"""The seconds that anything in a test may wait for a process: less than a test may take, see `scripts/run_tests.py`."""
# Under nohup, or in the background of a script, these are ignored, and `loratune` leaves ignored signals alone.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.environ["LORATUNE_VERBOSE"] = "1"  # most tests look at choices, reasons and single steps
INSTRUCTIONS = behavior.INSTRUCTIONS
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that use the real model."""
    for item in items:
        if "smollm2" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.real_model)


def pytest_collection_finish() -> None:
    """Exempt the objects that imports have created from garbage collection, as commands do; see
    `loratune.api.libraries`."""
    gc.collect()
    gc.freeze()


@dataclass(frozen=True)
class Ran:
    """The result of a command: its exit code, and what it printed on stdout and stderr."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list["ErrorText"]:
        """The errors on stderr, from its lines or its line of JSON."""
        lines = self.err.splitlines()
        if lines and lines[-1].startswith('{"exit_code"'):
            found = [(one["code"], one["place"], one["key"], one["what"], one["fix"]) for one in _reported(lines[-1])]
            return [ErrorText(f"{': '.join(filter(None, head))}; {fix}", code) for code, *head, fix in found]
        return [problem_text(line) for line in lines if _ERROR.match(line)]


def _reported(line: str) -> list[dict[str, str]]:
    found: list[dict[str, str]] = json.loads(line)["errors"]
    return found


class ErrorText(str):
    """The text of an error without its code."""

    code: str

    def __new__(cls, text: str, code: str = "") -> "ErrorText":
        made = super().__new__(cls, text)
        made.code = code
        return made


_ERROR = re.compile(r"error(?:\[(?P<code>[a-z_.]+)\])?: (?P<text>.*)")


def problem_text(line: str) -> ErrorText:
    """The error in a line `error[code]: text`; another line as it is."""
    match = _ERROR.match(line)
    return ErrorText(match["text"], match["code"] or "") if match else ErrorText(line)


def mainly(fast: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """The cases of a parametrized test, those that are not among the fast ones marked as slow."""
    return [
        one if one in fast else pytest.param(*(one if isinstance(one, tuple) else (one,)), marks=pytest.mark.slow)
        for one in cases
    ]


@cache
def printed_schema(name: str) -> Draft202012Validator:
    """Validates what a command prints with `--json`, or `error`, by the schema of `loratune schema --for NAME`.

    The schema allows keys that later releases may add; here, keys that it does not have are errors.
    """
    schemas = json.loads((ROOT / "loratune" / "cli" / "schemas.json").read_text(encoding="utf-8"))
    return Draft202012Validator(closed(schemas[name]))


def closed(schema: Any) -> Any:
    """The schema, in which objects with listed properties have no others."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: closed(one) for name, one in schema.items()}
    return {"additionalProperties": False, **found} if {"type", "properties"} <= {*schema} else found


COMMANDS_WITH_JSON = {*json.loads((ROOT / "loratune" / "cli" / "schemas.json").read_text(encoding="utf-8"))} - {"error"}


def check_printed(command: str, ran: Ran) -> None:
    """Check what a command has printed with `--json`: values of its schema on stdout; if it failed, an error of its
    schema as the last line of stderr."""
    texts = ran.out.splitlines() if command in ("generate", "classify") else [ran.out] if ran.out.strip() else []
    for text in texts:
        printed_schema(command).validate(json.loads(text))
    if ran.code:
        failure = json.loads(ran.err.splitlines()[-1])
        printed_schema("error").validate(failure)
        assert failure["exit_code"] == ran.code


Expected = tuple[Code, str, str]
"""A problem by its meaning: code, place, key."""


def is_problem(line: str, expected: Expected) -> bool:
    """Whether a printed problem has this code, and begins with this place and this key."""
    code, *head = expected
    found = line.code if isinstance(line, ErrorText) else ""
    is_right = found == code or f" [{code}]" in line
    return is_right and line.startswith(": ".join([*filter(None, head), ""]) if any(head) else "")


def check_refused(ran: Ran, exit_code: int, *expected: Expected) -> None:
    """Check that the command ended with this exit code and reported exactly these problems, in this order."""
    assert ran.code == exit_code, ran.err
    assert len(ran.errors) == len(expected), ran.err
    for line, one in zip(ran.errors, expected, strict=True):
        assert is_problem(line, one), (line, one)


def meanings(error: LoratuneError) -> list[Expected]:
    """Code, place and key of each problem of an error."""
    return [(problem.code, problem.where, problem.key) for problem in error.problems]


def resolve(model: Any, target_modules: list[str] | str, layers: list[int] | None = None, **values: Any) -> Any:
    """The targets of a lora section with these values. The section itself is not validated."""
    from loratune.lora import targets  # noqa: PLC0415

    values |= {"target_modules": target_modules, "layers_to_transform": layers}
    return targets.find(model, LoraSection.model_construct(**values))


@pytest.fixture(scope="session", autouse=True)
def _a_cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the cache of tokenized rows in a temporary folder, for this process and those it starts."""
    path = tmp_path_factory.mktemp("datasets-cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(path))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", path)  # which was read when `datasets` was imported
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_kept_results_at_first(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Results of checks are kept for the fixtures of a session."""
    path = tmp_path_factory.mktemp("results") / "kept"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loratune.system.cache.RESULTS", replace(RESULTS, place=lambda: path))
        yield


@pytest.fixture(scope="session", autouse=True)
def _shared_layers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is found of the layers of families depends on their code alone, and is kept for all tests of a session."""
    path = once(tmp_path_factory, "layers", lambda folder: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loratune.system.cache.LAYERS", replace(LAYERS, place=lambda: path))
        yield


@pytest.fixture
def own_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that break a kernel: what is found of layers then is of no use to others."""
    monkeypatch.setattr("loratune.system.cache.LAYERS", replace(LAYERS, place=lambda: tmp_path / "kept-layers"))


@pytest.fixture(autouse=True)
def kept(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the results of checks are kept in a test: a test that breaks something must not decide others."""
    path = tmp_path_factory.getbasetemp() / f"kept-{uuid.uuid4().hex}"
    monkeypatch.setattr("loratune.system.cache.RESULTS", replace(RESULTS, place=lambda: path))
    yield path


@pytest.fixture(scope="session", autouse=True)
def _shared_traces(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Share the traces of training steps, which take half of the time of a short run, among all processes of the
    session."""
    path = once(tmp_path_factory, "traces", lambda folder: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHARED_TRACES", str(path))
        patch.setattr(activations, "_TRACED", SharedTraces(path))
        yield


@pytest.fixture(scope="session", autouse=True)
def _few_everyday_instructions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compare the answers to six everyday instructions after a run, as many as are shown. All of them take a third of
    the time of a short run; tests about them use `all_instructions`."""

    def make(folder: Path) -> None:
        lines = behavior.INSTRUCTIONS.read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / "instructions.txt").write_text("".join(lines[: behavior.SHOWN]), encoding="utf-8")

    path = once(tmp_path_factory, "instructions", make) / "instructions.txt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEW_INSTRUCTIONS", str(path))
        patch.setattr(behavior, "INSTRUCTIONS", path)
        yield


@pytest.fixture
def all_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use all everyday instructions, see `_few_everyday_instructions`."""
    monkeypatch.setattr(behavior, "INSTRUCTIONS", INSTRUCTIONS)


@contextmanager
def formula_for_memory() -> Iterator[None]:
    """Inside, memory is estimated by the formula for models that cannot be traced. For tests that are about something
    else: tracing takes half a second or more for each model and each length of rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "trace", lambda *arguments, **keywords: None)
        yield


@pytest.fixture
def untraced() -> Iterator[None]:
    """Estimate memory by formula, see `formula_for_memory`."""
    with formula_for_memory():
        yield


@pytest.fixture(scope="module")
def untraced_module() -> Iterator[None]:
    """Like `untraced`, for all tests of a file and their fixtures."""
    with formula_for_memory():
        yield


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Show no progress: on a busy machine any step may take two seconds. `test_progress.py` tests what is shown."""
    monkeypatch.setattr(terminal, "PATIENCE", 3600.0)


@pytest.fixture(autouse=True)
def _no_accounts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level: one token per byte, ids 0 to 255, then the special tokens; no BOS, no pad token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>")
    made.add_special_tokens({"additional_special_tokens": special[1:]})
    made.chat_template = CHAT_TEMPLATE
    return made


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """See `byte_tokenizer`."""
    return byte_tokenizer()


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    """A random Llama of 2 layers and hidden size 32, identical on every call."""
    shape = {
        "vocab_size": 264, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": 256,
    }  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(shape | changes)))


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """The tiny Llama and the byte-level tokenizer as a model directory, in float32."""
    path = tmp_path_factory.mktemp("tiny") / "llama"
    tiny_llama().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@contextmanager
def alone(what: str) -> Iterator[None]:
    """Hold a lock while something is fetched once for all: other test processes wait."""
    with (Path(tempfile.gettempdir()) / f"loratune-test-{what}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that is filled once per session, by the first test process that asks for it; the others wait."""
    base = factory.getbasetemp()
    path = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"shared-{name}"
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            unfinished = path.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            make(unfinished)
            unfinished.rename(path)
    return path


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, fetched by the script that the quickstart uses."""
    path = ROOT / "models" / "SmolLM2-135M-Instruct"
    with alone("smollm2"):
        run_command([sys.executable, ROOT / "scripts" / "fetch_smollm2.py", path], check=True)
    return path


@pytest.fixture(scope="session")
def cli() -> Callable[..., Ran]:
    """Runs `loratune ARGS` in this process, where the libraries are already imported. What it prints with `--json` is
    checked against its schema."""

    def run(*arguments: object, stdin: str | None = None) -> Ran:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        ran = Ran(result.exit_code, result.stdout, result.stderr)
        if "--json" in arguments and "--" not in arguments and arguments[0] in COMMANDS_WITH_JSON:
            check_printed(str(arguments[0]), ran)
        return ran

    return run


class Process(subprocess.Popen[Any]):
    """A process for which every wait ends: after a limit it is killed with all of its process group."""

    def __init__(self, command: Sequence[object], **options: Any):
        """Start a command. options: those of `subprocess.Popen`."""
        options |= {} if options.get("start_new_session") else {"process_group": 0}
        super().__init__([*map(str, command)], **options)

    def wait(self, timeout: float | None = LIMIT) -> int:
        """The exit code. Raises subprocess.TimeoutExpired: it took longer than the limit, and was killed."""
        with self._killed_if_it_fails():
            return super().wait(timeout)

    def communicate(self, input: Any = None, timeout: float | None = LIMIT) -> tuple[Any, Any]:
        """What it prints until it ends. Raises subprocess.TimeoutExpired: as in `wait`."""
        with self._killed_if_it_fails():
            return super().communicate(input, timeout)

    @contextmanager
    def _killed_if_it_fails(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            if self.poll() is None:
                os.killpg(self.pid, signal.SIGKILL)
            raise


def run_command(
    command: Sequence[object], *, input: str | bytes | None = None, timeout: float = LIMIT, **options: Any
) -> subprocess.CompletedProcess[Any]:
    """`subprocess.run` with a limit of time, after which all that the command has started is killed too."""
    check = options.pop("check", False)
    if options.pop("capture_output", False):
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    if input is not None:
        options["stdin"] = subprocess.PIPE
    with Process(command, **options) as child:
        out, err = child.communicate(input, timeout)
    done = subprocess.CompletedProcess(child.args, child.returncode, out, err)
    if check:
        done.check_returncode()
    return done


def process(*arguments: object, **environment: str) -> Ran:
    """Runs `python -m loratune ARGS` as a process of its own."""
    command = [sys.executable, "-m", "loratune", *map(str, arguments)]
    done = run_command(command, capture_output=True, text=True, env=os.environ | environment, stdin=subprocess.DEVNULL)
    return Ran(done.returncode, done.stdout, done.stderr)


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def decided_training(**settings: Any) -> TrainingSection:
    """The section with plain values for what is still `auto`, for tests that hand it to the trainer themselves."""
    section = TrainingSection(**settings)
    plain = {"learning_rate": 2e-4, "num_train_epochs": 1.0, "warmup_steps": 0.0, "lr_scheduler_type": "linear"}
    return section.model_copy(update={key: value for key, value in plain.items() if getattr(section, key) == AUTO})


ROWS = [{"prompt": f"{number} and {number} make", "completion": f" {number + number}"} for number in range(40)]


ATTENTION: dict[str, Any] = {"target_modules": ["q", "k", "v", "o"]}
"""The targets of the adapters that most tests are written for."""
PLAIN: dict[str, Any] = {"lora": ATTENTION, "retention": {"kl_weight": 0}}
"""Sections of runs that train such an adapter on their rows alone."""


def config_in(folder: Path, model: Path) -> Callable[..., Path]:
    """Like `run_config`, in the given folder and with the given model."""

    def make(name: str = "run.yaml", **sections: Any) -> Path:
        values: dict[str, Any] = {
            "model": {"name_or_path": str(model), "dtype": "float32"},
            **PLAIN,
            "data": {"train": str(write_rows(folder / "rows.jsonl", ROWS))},
            "training": {"learning_rate": 1e-2, "logging_steps": 1},
            "output_dir": str(folder / "out"),
        }
        for key, value in sections.items():
            values[key] = values.get(key, {}) | value if isinstance(value, dict) else value
        if not {"max_steps", "max_minutes"} & values["training"].keys():
            values["training"].setdefault("num_train_epochs", 1)
        path = folder / name
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return path

    return make


@pytest.fixture
def run_config(tmp_path: Path, tiny_dir: Path) -> Callable[..., Path]:
    """Writes a config of the tiny model on 40 short rows; sections given as keywords are merged over it.

    `run_config(training={"max_steps": 2})` → path of the YAML; its output_dir is `tmp_path / "out"`.
    """
    return config_in(tmp_path, tiny_dir)


def tree(path: Path) -> dict[str, bytes]:
    """Every file below a path with its content. Equal trees mean that nothing was changed."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


@pytest.fixture(scope="session")
def processes(tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path) -> Iterator[ForkServer]:
    """A server that forks commands as separate processes. It has already trained and used the tiny model once."""
    folder = tmp_path_factory.mktemp("processes")
    make = config_in(folder, tiny_dir)
    train = ("train", make(training={"max_steps": 2, "save_steps": 1}, data={"validation": 0.2}))
    generate = ("generate", "--adapter", folder / "out", "1 and", "--max-new-tokens", 2)
    with fork_server(folder, (train, ("train", make("all.yaml"), "--overwrite"), generate), PYTHONHASHSEED="2") as made:
        yield made


@pytest.fixture
def forked(processes: ForkServer) -> Callable[..., Ran]:
    """Runs `loratune ARGS` as a forked process, which is spared the imports that `process` repeats."""

    def run(*arguments: object, **keywords: Any) -> Ran:
        child = processes.start(*arguments, **keywords)
        code = child.wait()
        return Ran(code, child.out.read_text(), child.said())

    return run
