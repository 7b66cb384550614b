"""Regular expressions that never finish, and values in an adapter's configuration that exhaust the memory."""

import json
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Ran, meanings

from loratune.codes import Code
from loratune.config.expressions import BadPatternError, TimeLimit, compile_pattern
from loratune.errors import AdapterError
from loratune.lora.adapter_config import AdapterConfig, check_values
from loratune.lora.adapter_files import CONFIG_FILE, inspect

Cli = Callable[..., Ran]
MakeConfig = Callable[..., Path]
ENDLESS = "(?:.|.)*?(?:.+)+[0-9]{2}"
"""It matches no path, but takes more attempts than the time allows."""
PROJECTION = "model.layers.0.self_attn.q_proj"


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lowers the limit from two seconds to 0.3."""
    monkeypatch.setattr(TimeLimit.__init__, "__defaults__", (0.3,))


def one_endless(cases: list[Any]) -> list[Any]:
    """Cases of which all but the first with `ENDLESS` are slow: each runs until the time limit."""
    _, *others = [case for case in cases if ENDLESS in str(case)]
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
        if case in others
        else case
        for case in cases
    ]


def within_memory_and_time(work: Callable[[], Any]) -> Any:
    """Check that a call takes less than a minute: many times the limit in seconds, but far less than without a
    limit."""
    began = time.monotonic()
    result = work()
    assert time.monotonic() - began < 60
    return result


# Matching


def test_matches_share_a_time_limit() -> None:
    """In another thread too, where no signals are handled."""
    limit, endless, quick = TimeLimit(0.5), compile_pattern(ENDLESS), compile_pattern(r"model\..*(q|v)_proj")
    errors: list[str] = []

    def match() -> None:
        try:
            limit(endless.fullmatch, PROJECTION)
        except BadPatternError as error:
            errors.append(str(error))

    assert limit(quick.fullmatch, PROJECTION) and not limit(quick.fullmatch, "model.x")
    for _ in range(3):
        thread = threading.Thread(target=match)
        began = time.process_time()
        thread.start()
        thread.join(60)
    assert errors == ["takes more than 0.5 s to match"] * 3
    assert time.process_time() - began < 0.2, "the third has no time left"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("(", "is not a regular expression: missing \\), unterminated subpattern"),
        ("a{99999999999999999999}", "is too large for a regular expression"),
        ("(" * 20_000 + ")" * 20_000, "is too large for a regular expression"),
        ("(?:(?:(?:a{1000}){1000}){1000})", "is too large for a regular expression"),
        ("a|" * 6000, "is too large for a regular expression"),
        ("(" * 6000, "is too large for a regular expression"),  # refused before it is compiled, which may take a minute
        ("(?:foo){e<=1}", r"has `\{e`, which needs a backslash"),
        ("[[:alpha:]]", r"has `\[\[:`, which needs a backslash"),
    ],
    ids=["open", "count", "deep", "counts", "long", "long, open", "approximate", "class"],
)
def test_invalid_expressions_are_refused(text: str, what: str) -> None:
    with pytest.raises(BadPatternError, match=what):
        compile_pattern(text)


# The config of a run


TEXTS = [ENDLESS, "a{99999999999999999999}", "(" * 9_000 + ")" * 9_000, "(" * 90]


@pytest.mark.parametrize(
    ("key", "text"),
    one_endless([(key, text) for key in ("target_modules", "rank_pattern", "alpha_pattern") for text in TEXTS]),
)
def test_slow_and_invalid_expressions_in_a_config_are_refused(
    key: str, text: str, run_config: MakeConfig, cli: Cli
) -> None:
    value = text if key == "target_modules" else {text: 4}
    ran = within_memory_and_time(lambda: cli("params", run_config(lora={key: value})))
    assert ran.code == 2 and f"lora.{key}: " in ran.err and len(ran.err) < 1000, ran.err
    assert (str(Code.CONFIG_BAD_VALUE) in ran.err) == (text != ENDLESS), ran.err


def test_many_slow_expressions_share_one_limit(run_config: MakeConfig, cli: Cli) -> None:
    slow = {f"{ENDLESS}{letter}": 4 for letter in "abcdefghijklmnopqrstuvwxyz"}
    ran = within_memory_and_time(lambda: cli("params", run_config(lora={"rank_pattern": slow})))
    assert ran.code == 2 and "lora.rank_pattern: " in ran.err, ran.err


# The configuration of an adapter


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path) -> Path:
    """An adapter directory without a record, so that only its configuration describes it."""
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    path = tmp_path_factory.mktemp("trained") / "adapter"
    base = AutoModelForCausalLM.from_pretrained(tiny_dir)
    get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")).save_pretrained(
        path
    )
    return path


def edited(trained: Path, where: Path, **changes: Any) -> Path:
    """A copy of an adapter with other values in its configuration."""
    where.mkdir()
    for file in trained.iterdir():
        (where / file.name).write_bytes(file.read_bytes())
    values = json.loads((where / CONFIG_FILE).read_text())
    (where / CONFIG_FILE).write_text(json.dumps(values | changes))
    return where


BAD: list[tuple[str, Any]] = [
    ("r", 10**9), ("r", 10**400), ("r", -1), ("r", True), ("r", "8"), ("r", float("nan")), ("r", float("inf")),
    ("r", 4.5), ("r", 1e-300), ("r", [4]),
    ("lora_alpha", float("nan")), ("lora_alpha", -1), ("lora_alpha", False), ("lora_alpha", 10**400),
    ("rank_pattern", {"q_proj": 10**9}), ("rank_pattern", {"q_proj": 0}), ("rank_pattern", {"q_proj": "4"}),
    ("rank_pattern", {"q_proj": None}), ("rank_pattern", {"q_proj": float("nan")}), ("rank_pattern", ["q_proj"]),
    ("rank_pattern", {"(": 4}), ("rank_pattern", {ENDLESS: 4}), ("rank_pattern", {f"a{n}": 4 for n in range(10**5)}),
    ("alpha_pattern", {"(": 4}), ("alpha_pattern", {ENDLESS: 4}), ("alpha_pattern", {"q_proj": float("inf")}),
    ("alpha_pattern", {"a{99999999999999999999}": 4}), ("use_rslora", "yes"), ("use_dora", 1), ("target_modules", {}),
    ("target_modules", [1]), ("modules_to_save", "x" * 3 and 3), ("layers_to_transform", "0"),
    ("layers_to_transform", [0.5]), ("layers_pattern", 3), ("layer_replication", [[0, 10**9]]),
    ("layer_replication", [[0, 1]] * 10**5), ("exclude_modules", {"a": 1}),
]  # fmt: skip


KINDS: list[tuple[dict[str, Any], Code, str]] = [
    ({"r": -1}, Code.ADAPTER_INVALID, "r"),
    ({"use_dora": 1}, Code.ADAPTER_INVALID, "use_dora"),
    ({"rank_pattern": {"(": 4}}, Code.ADAPTER_INVALID, "rank_pattern"),
    ({"alpha_pattern": {ENDLESS: 4}}, Code.ADAPTER_INVALID, "alpha_pattern"),
    ({"target_modules": ENDLESS}, Code.ADAPTER_INVALID, "target_modules"),
    ({"rank_pattern": {f"a{n}": 4 for n in range(10**5)}}, Code.ADAPTER_INVALID, "rank_pattern"),
    ({"target_modules": ["q"] * 10**6}, Code.ADAPTER_INVALID, "target_modules"),
    ({"layer_replication": [[0, 2]] * 500}, Code.ADAPTER_INVALID, "layer_replication"),
    ({"r": 8}, Code.ADAPTER_INVALID, PROJECTION),
]


@pytest.mark.parametrize(("values", "code", "key"), one_endless(KINDS), ids=lambda value: str(value)[:24])
def test_the_error_code_of_each_invalid_value(values: dict[str, Any], code: Code, key: str) -> None:
    config = {"base_model_name_or_path": "base", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]} | values
    tensors = {f"base_model.model.{PROJECTION}.lora_A.weight": (4, 8)}
    with pytest.raises(AdapterError) as caught:
        check_values(config, f"x/{CONFIG_FILE}")
        AdapterConfig(Path("x"), config, tensors).peft_values([PROJECTION], [])
    assert meanings(caught.value) == [(code, f"x/{CONFIG_FILE}", key)]


@pytest.mark.parametrize(("key", "value"), one_endless(BAD), ids=lambda one: str(one)[:24])
def test_invalid_adapter_values_are_refused_by_params(
    key: str, value: Any, trained: Path, tmp_path: Path, cli: Cli
) -> None:
    """Without the base."""
    path = edited(trained, tmp_path / "adapter", **{key: value})
    ran = within_memory_and_time(lambda: cli("params", "--adapter", path))
    assert ran.code == 5 and ran.out == "" and "unexpected" not in ran.err, ran.err
    assert key in ran.err or CONFIG_FILE in ran.err


ATTACHED: list[dict[str, Any]] = [
    {"target_modules": ENDLESS}, {"target_modules": "("}, {"exclude_modules": ENDLESS},
    {"modules_to_save": [ENDLESS]}, {"modules_to_save": ["("]}, {"layers_pattern": ENDLESS, "layers_to_transform": [0]},
    {"rank_pattern": {ENDLESS: 4}}, {"alpha_pattern": {"(": 4}}, {"target_modules": ["q"] * 10**6},
    {"target_modules": "all-linear", "r": 10**9, "rank_pattern": {".*": 4}},
    {"target_modules": "all-linear", "r": 10**9, "rank_pattern": {"q_proj": 4, "v_proj": 4}},
    {"rank_pattern": {"down_proj": 10**9}, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    {"layer_replication": [[0, 2]] * 500},
]  # fmt: skip


@pytest.mark.parametrize("changes", one_endless(ATTACHED), ids=lambda one: str(one)[:60])
def test_invalid_adapter_values_are_refused_by_generate(
    changes: dict[str, Any], trained: Path, tmp_path: Path, cli: Cli
) -> None:
    """Where PEFT would match the expressions and allocate the tensors."""
    path = edited(trained, tmp_path / "adapter", **changes)
    ran = within_memory_and_time(lambda: cli("generate", "--adapter", path, "--max-new-tokens", "1", "hello"))
    assert ran.code == 5 and "unexpected" not in ran.err and len(ran.err) < 3000, ran.err


def test_valid_expressions_keep_their_meaning(trained: Path, tmp_path: Path, cli: Cli) -> None:
    """Flags at the start of an expression, an `r` that no module uses, and the first of two matching patterns."""
    changes = {
        "target_modules": r"(?i).*\.(Q|V)_proj", "r": 10**9, "rank_pattern": {"q_proj|v_proj": 4, "q_proj": 5},
        "alpha_pattern": {r"0\.self_attn\.q_proj": 2},
    }  # fmt: skip
    path = edited(trained, tmp_path / "adapter", **changes)
    saved = inspect(path)
    settings = saved.settings()
    assert {module.rank for module in settings.values()} == {4.0}
    assert settings[PROJECTION].scaling == 0.5
    values = saved.peft_values([*settings, "model.layers.0.mlp.up_proj"], [])
    assert values["r"] == 5 and values["target_modules"] == {*settings}
    assert [*values["rank_pattern"].values()] == [4] and values["alpha_pattern"] == {re.escape(PROJECTION): 2}
    assert cli("generate", "--adapter", path, "--max-new-tokens", "1", "hello").code == 0


RESOLVED: list[dict[str, Any]] = [
    {"target_modules": r".*\.layers\.[01]\..*(q|k)_proj"},
    {"target_modules": "all-linear", "exclude_modules": r".*mlp.*|lm_head"},
    {"target_modules": ["q_proj", "mlp.up_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    {"rank_pattern": {r"layers\.0\..*": 3, "q_proj": 5, "proj": 9}, "alpha_pattern": {"^model.*v_proj": 7.5, "q": 1}},
    {"rank_pattern": {r"model\.layers\.(\d)\.mlp\.(up|down)_proj": 2, ".*": 6}},
]


@pytest.mark.parametrize("settings", RESOLVED, ids=lambda one: str(one)[:60])
def test_peft_reads_the_exact_names_like_the_expressions(settings: dict[str, Any]) -> None:
    from peft import LoraConfig  # noqa: PLC0415
    from peft.tuners.tuners_utils import check_target_module_exists  # noqa: PLC0415
    from peft.utils.other import get_pattern_key  # noqa: PLC0415

    kinds = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj", "mlp")
    modules = [f"model.layers.{layer}.{kind}" for layer in range(12) for kind in kinds] + ["model", "lm_head"]
    values: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]} | settings
    found = AdapterConfig(Path(), values, {}).peft_values(modules, [])
    original, exact = LoraConfig(**values), LoraConfig(**values | found | {"r": 4})
    for path in modules:
        assert bool(check_target_module_exists(original, path)) == bool(check_target_module_exists(exact, path)), path
        for key in ("rank_pattern", "alpha_pattern"):
            before, after = (getattr(config, key) for config in (original, exact))
            ranks = (before.get(get_pattern_key(before, path)), after.get(get_pattern_key(after, path)))
            assert ranks[0] == ranks[1] or (key == "rank_pattern" and ranks[1] == min(ranks[0], 1)), path


def test_deeply_nested_or_large_json_is_refused(trained: Path, tmp_path: Path, cli: Cli) -> None:
    path = edited(trained, tmp_path / "adapter")
    for text in ("[" * 100_000 + "]" * 100_000, '{"r": ' + "9" * 5000 + "}", " " * (17 << 20) + "{}"):
        (path / CONFIG_FILE).write_text(text)
        ran = cli("params", "--adapter", path)
        assert ran.code == 5 and CONFIG_FILE in ran.err and len(ran.err) < 1000, ran.err
