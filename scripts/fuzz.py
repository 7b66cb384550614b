"""Fuzzing of configs, rows and adapter directories: each case ends in a result or in one of loratune's own errors.

    python scripts/fuzz.py --cases 10000 [config rows adapters]

Hypothesis makes the cases: valid ones with values replaced, keys added and removed, and bytes flipped, deleted and
inserted. Any other exception fails, as does a case that takes longer than 20 s, and one that uses the network or starts
a process. Prints how the cases ended.
"""

import argparse
import faulthandler
import json
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from loratune import config, data
from loratune.adapter import loading
from loratune.adapter.directory import AdapterDirectory
from loratune.api.self_test import byte_tokenizer
from loratune.config import DataSection
from loratune.data.rendering import Renderer
from loratune.errors import LoratuneError
from loratune.training import preflight
from loratune.training import run as training_run
from loratune.training.checkpoints import run_dir

MAX_SECONDS = 20
"""How long a case may take."""
FORBIDDEN = (
    "socket.connect",
    "socket.getaddrinfo",
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "pickle.find_class",
)

Ends = Counter[str]


class ForbiddenCall(BaseException):
    """A case used the network, started a process, or unpickled a foreign class."""


def install_audit_hook(armed: list[bool]) -> None:
    """Raise ForbiddenCall at each forbidden call while `armed` is not empty. The hook cannot be removed."""

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        # tokenized rows are sent as pickles from the process that renders them
        own = event == "pickle.find_class" and str(arguments[0]).startswith("loratune.")
        if armed and event in FORBIDDEN and not own:
            raise ForbiddenCall(f"{event} {arguments}")

    sys.addaudithook(refuse)


def run_case(ends: Ends, case: Callable[[], object]) -> Any:
    """Run a case and count how it ended; its result, or None after one of loratune's errors."""
    start = time.monotonic()
    result = None
    faulthandler.dump_traceback_later(3 * MAX_SECONDS, exit=True)  # in case it hangs
    try:
        result = case()
        ends["valid"] += 1
    except LoratuneError as error:
        assert error.problems and all(problem.what for problem in error.problems)
        ends[type(error).__name__] += 1
    finally:
        faulthandler.cancel_dump_traceback_later()
    assert time.monotonic() - start < MAX_SECONDS, "too slow"
    return result


# What cases are made of

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
    | st.sampled_from(["", "0", "1e-4", "no", "~", "../../x", "/dev/zero", "train[:1]", "\ud800", "\0", "[q", "a" * 99])
    | st.sampled_from([-1, 0, 1, 2**31, 2**63, 1e308, -100, 256, 264])
)  # fmt: skip
NAMES = """prompt completion messages conversations instruction input output text input_ids labels tools role content
from value weight tool_calls system history user assistant human gpt function name arguments type"""
KEYS = st.sampled_from(NAMES.split())
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS | st.text(max_size=6), inner, max_size=4)
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["system", "user", "assistant", "tool", "x"]),
            "content": st.text(max_size=20) | VALUES,
        }
    ),
    max_size=4,
)
KINDS = (
    st.fixed_dictionaries({"prompt": st.text(max_size=30), "completion": st.text(max_size=30)}),
    st.fixed_dictionaries({"messages": MESSAGES}),
    st.fixed_dictionaries({"prompt": MESSAGES, "completion": MESSAGES}),
    st.fixed_dictionaries({"text": st.text(max_size=60)}),
    st.fixed_dictionaries({"input_ids": st.lists(st.integers(-1, 300), max_size=9)}),
    st.fixed_dictionaries({"instruction": st.text(max_size=9), "output": st.text(max_size=9)}),
    st.dictionaries(KEYS, VALUES, max_size=4),
    VALUES,
)
FILES = st.one_of(*(st.lists(kind, max_size=5) for kind in KINDS), st.lists(st.one_of(*KINDS), max_size=5))
EDITS = st.tuples(st.sampled_from(["flip", "delete", "insert", "repeat"]), st.integers(0), st.integers(0))
BYTES: st.SearchStrategy[list[tuple[str, int, int]]] = st.just([]) | st.lists(EDITS, max_size=3)


def damage(raw: bytes, edits: list[tuple[str, int, int]]) -> bytes:
    """The bytes after some edits."""
    for kind, position, number in edits:
        start = position % (len(raw) + 1)
        if kind == "flip" and start < len(raw):
            raw = raw[:start] + bytes([raw[start] ^ 1 << number % 8]) + raw[start + 1 :]
        elif kind == "delete":
            raw = raw[:start] + raw[start + number % 64 :]
        elif kind == "insert":
            raw = raw[:start] + bytes([number % 256]) * (number % 4) + raw[start:]
        elif kind == "repeat":
            raw = raw[:start] + raw[start : start + number % 64] + raw[start:]
    return raw


def replace(values: Any, path: list[int], new: Any, drop: bool) -> Any:
    """Nested values with one of them replaced or dropped; the path leads to it, as numbers of keys or items."""
    if not path or not isinstance(values, dict | list) or not values:
        return new
    keys = list(values) if isinstance(values, dict) else list(range(len(values)))
    key = keys[path[0] % len(keys)]
    if len(path) == 1 and drop:
        others = [other for other in keys if other != key]
        return {other: values[other] for other in others} if isinstance(values, dict) else [values[n] for n in others]
    value = replace(values[key], path[1:], new, drop)
    if isinstance(values, dict):
        return values | {key: value}
    return [value if number == key else values[number] for number in keys]


PATHS = st.lists(st.integers(0, 40), min_size=1, max_size=3)
CHANGES: st.SearchStrategy[list[Any]] = st.just([]) | st.lists(
    st.tuples(PATHS, VALUES | SCALARS, st.booleans()), max_size=3
)

# The three properties


def configs(scratch: Path, ends: Ends) -> Callable[..., None]:
    """A config file is read into one that `dump` writes and `load` reads back, or is refused."""
    valid = yaml.safe_load(
        (Path(__file__).parent.parent / "loratune" / "data" / "quickstart" / "config.yaml").read_text()
    )
    for name in ("model", "lora", "data", "training"):
        section = getattr(config, f"{name.capitalize()}Section")
        fields = {key: field.default for key, field in section.model_fields.items() if not field.is_required()}
        valid[name] = {key: value for key, value in fields.items() if value is not None} | valid.get(name, {})
    del valid["training"]["max_steps"]
    path, again = scratch / "config.yaml", scratch / "again.yaml"

    @given(CHANGES, BYTES, st.sampled_from([True, False]))
    def property(changes: list[Any], edits: list[Any], flow: bool) -> None:
        values = valid
        for change in changes:
            values = replace(values, *change)
        try:
            text = yaml.safe_dump(values, default_flow_style=flow, allow_unicode=True)
        except (yaml.YAMLError, UnicodeError):
            text = repr(values)
        path.write_bytes(damage(text.encode(errors="surrogatepass"), edits))
        run = run_case(ends, lambda: config.load(path))
        if run is not None:
            again.write_text(config.dump(run), encoding="utf-8")
            assert config.load(again) == run

    return property


def rows(scratch: Path, ends: Ends) -> Callable[..., None]:
    """A file of rows becomes tokens, some of them supervised, or is refused."""
    renderer, path = Renderer(byte_level()), scratch / "rows.jsonl"
    choices = st.sampled_from(["completion", "assistant", "all"])

    @example([{"prompt": "a", "completion": "b"}], [], "completion", "keep_completion")  # one that is valid
    @given(FILES, BYTES, choices, st.sampled_from(["keep_completion", "drop", "error"]))
    def property(file_rows: list[Any], edits: list[Any], loss_on: str, truncation: str) -> None:
        raw = b"".join(json.dumps(row).encode() + b"\n" for row in file_rows)
        path.write_bytes(damage(raw, edits))
        values = {"train": {"path": str(path)}, "loss_on": loss_on, "truncation": truncation, "max_length": 24}
        section = DataSection.model_validate(values | {"max_dropped": 1})

        def case() -> Any:
            return data.prepare(data.read_datasets(section, 0).train, renderer, section, 264)

        dataset = run_case(ends, case)
        for row in dataset.rows.rows() if dataset is not None else ():
            assert 0 < len(row.ids) <= 24 and row.supervised > 0
            assert all(0 <= start < end <= len(row.ids) for start, end in row.spans)

    return property


def adapters(scratch: Path, ends: Ends) -> Callable[..., None]:
    """An adapter directory with one file changed computes finite numbers, or is refused."""
    good, bad = trained(scratch), scratch / "bad"
    names = sorted(path.name for path in good.iterdir())
    ids = torch.arange(60, 70)[None]

    @given(st.sampled_from(names), CHANGES, BYTES, st.booleans(), st.booleans())
    def property(name: str, changes: list[Any], edits: list[Any], recorded: bool, forced: bool) -> None:
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(good, bad)
        raw = (bad / name).read_bytes()
        if name.endswith(".json"):
            values = json.loads(raw)
            for change in changes:
                values = replace(values, *change)
            raw = json.dumps(values).encode()
        (bad / name).write_bytes(damage(raw, edits))
        if not recorded:
            (bad / "loratune.json").unlink()

        def case() -> None:
            tuned = loading.load(AdapterDirectory.open(bad, forced=forced))
            assert tuned.model(ids).logits.isfinite().all()

        run_case(ends, case)

    return property


def byte_level() -> PreTrainedTokenizerFast:
    """One token a byte, and a chat template."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]})
    tokenizer.chat_template = (
        "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    return tokenizer


def trained(scratch: Path) -> Path:
    """An adapter of one step on a tiny model."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=264, eos_token_id=256, **shape)).save_pretrained(scratch / "model")
    byte_level().save_pretrained(scratch / "model")
    (scratch / "good.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    values = {
        "model": {"name_or_path": str(scratch / "model"), "dtype": "float32"}, "lora": {"r": 2},
        "data": {"train": str(scratch / "good.jsonl")}, "training": {"learning_rate": 0.01},
        "output_dir": str(scratch / "good"),
    }  # fmt: skip
    (scratch / "good.yaml").write_text(yaml.safe_dump(values))
    run = config.load(scratch / "good.yaml")
    directory = run_dir.check(run.output_dir, resume=False, overwrite=False)
    ready = preflight.check(run, directory)
    training_run.train(ready)
    return scratch / "good"


PROPERTIES = {"config": configs, "rows": rows, "adapters": adapters}


def fuzz(name: str, cases: int, armed: list[bool]) -> Ends:
    """Run the cases of one property; how they ended. Raises AssertionError, or whatever went wrong."""
    ends: Ends = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        property = PROPERTIES[name](Path(scratch), ends)
        health = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
        phases = (Phase.explicit, Phase.generate, Phase.shrink)
        bounds = settings(
            max_examples=cases, deadline=None, suppress_health_check=health, phases=phases, database=None,
            derandomize=True,
        )  # fmt: skip
        armed.append(True)
        try:
            bounds(property)()
        finally:
            armed.clear()
    return ends


def main() -> None:
    """Fuzz the properties named on the command line, and print how their cases ended."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", default=list(PROPERTIES), help=", ".join(PROPERTIES))
    parser.add_argument("--cases", type=int, default=10_000, help="of each kind")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # as the command line does
    armed: list[bool] = []
    install_audit_hook(armed)
    for name in arguments.names:
        start = time.monotonic()
        ends = fuzz(name, arguments.cases, armed)
        counts = ", ".join(f"{count:,} {end}" for end, count in ends.most_common())
        print(f"{name}: {ends.total():,} cases in {time.monotonic() - start:.0f} s: {counts}", flush=True)


if __name__ == "__main__":
    main()
