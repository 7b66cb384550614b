"""Whatever a program passes to a public function: it is taken, or an error of loratune names it."""

import inspect
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROWS, Ran, config_in

import loratune
from loratune import config as configs
from loratune.api.params import adapter_stats
from loratune.api.push import push
from loratune.cli import options

pytestmark = pytest.mark.usefixtures("untraced_module")

pandas = pytest.importorskip("pandas")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("arguments")


@pytest.fixture(scope="module")
def config(folder: Path, tiny_dir: Path) -> loratune.RunConfig:
    return loratune.load_config(config_in(folder, tiny_dir)(training={"max_steps": 1}, data={"validation": 0.2}))


@pytest.fixture(scope="module")
def adapter(config: loratune.RunConfig) -> loratune.Adapter:
    return loratune.train(config)


def circle() -> list[Any]:
    made: list[Any] = []
    made.append(made)
    return made


def values(kinds: str) -> Iterator[Any]:
    """What somebody might pass where something else is expected: one value of each kind, or all others."""
    if kinds == "one of each kind":
        yield from (None, "a\0b", b"a", True, -1, 1 << 70, math.nan, object(), lambda *_: None, (1 for _ in ""))
        yield from (np.int64(1), np.array([0.5, 1.0]), [None], circle(), {"a": None}, set(), Path("a"))
        yield from (pandas.DataFrame({"a": [1]}), torch.tensor(0.5))
    else:
        yield from ("", "a", b"", 0, 0.5, math.inf, np.float32(0.5), np.float64("nan"), np.array(["a"]), np.array([]))
        yield from ([], [b"a"], [""], (), {}, {1: 2}, {"": ""}, {"a": circle()})
        yield from (pandas.Series([0.5]), torch.tensor([1]))


@pytest.mark.parametrize("kinds", ["one of each kind", pytest.param("all others", marks=pytest.mark.slow)])
def test_no_argument_ends_in_an_error_of_python(
    kinds: str,
    config: loratune.RunConfig,
    adapter: loratune.Adapter,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each parameter of each public function gets each of the values, while the others are valid."""
    monkeypatch.chdir(folder)
    config = config.model_copy(update={"output_dir": str(folder / "other")})  # which a run may replace
    chat, compared = adapter.chat(max_new_tokens=2), adapter.evaluate(ROWS[:2])
    chat.ask("3 and")
    path, rows, prompts = adapter.path, ROWS[:2], ["3 and"]
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # whose imports take half a minute

    def answered(rows: Any = None, **options: Any) -> list[Any]:
        return [*adapter.answers(rows, **options)]

    def sampled(**options: Any) -> None:
        loratune.Sampling(**options).check()

    def required(texts: Any) -> None:
        compared.require(*texts if isinstance(texts, list) else [texts])

    answered.__signature__ = inspect.signature(adapter.answers)  # type: ignore[attr-defined]
    sampled.__signature__ = inspect.signature(loratune.Sampling)  # type: ignore[attr-defined]
    few: dict[str, Any] = {"max_new_tokens": 2}
    calls: list[tuple[Callable[..., Any], dict[str, Any]]] = [
        (loratune.load_config, {"source": config.resolved(), "overrides": {"lora.r": 2}}),
        (loratune.explain, {"key": "lora.r", "path": None, "overrides": ()}),
        (loratune.plan, {"config": config, "overwrite": True, "rows": {"train": ROWS}}),
        (loratune.sweep, {"config": config, "grid": {"lora.r": [2]}, "overwrite": True, "trials": 1}),
        (loratune.init, {"rows": folder / "rows.jsonl", "model": config.model.name_or_path}),
        (loratune.count_parameters, {"config": config}),
        (loratune.Adapters, {"adapters": {"one": path}, "use": None, "mix": None, "scale": 1.0}),
        (loratune.Adapter, {"path": path, "scale": 1.0}),
        (sampled, {"temperature": 0.5}),
        (adapter_stats, {"path": path}),
        (push, {"adapter": path, "repository": "me/skill"}),
        (answered, {"rows": prompts, **few}),
        (adapter.generate, {"prompts": prompts, **few}),
        (adapter.chat, few),
        (adapter.evaluate, {"rows": rows}),
        (adapter.evaluate_scales, {"rows": rows, "scales": [0.5]}),
        (adapter.run_tasks, {"tasks": "none"}),
        (adapter.merge, {"output": folder / "none" / "merged"}),
        (adapter.export, {"to": "peft", "output": folder / "none" / "plain"}),
        (adapter.push, {"repository": "me/skill"}),
        (adapter.report, {"output": folder / "page.html", "overwrite": True}),
        (chat.ask, {"question": "3 and"}),
        (chat.ask_base, {}),
        (chat.use, {"name": "one"}),
        (chat.set_system, {"text": ""}),
        (required, {"texts": ["loss<base"]}),
    ]  # fmt: skip
    # as `plan`, but for one parameter; and without the self-test, which takes half a minute
    less = [(loratune.train, "allow_worse"), (loratune.train, "config"), (loratune.environment, "on_event")]
    named: dict[str, Any] = {"config": config, "overwrite": True}
    tried = [(function, name, valid) for function, valid in calls for name in inspect.signature(function).parameters]
    tried += [(function, name, named if function is loratune.train else {}) for function, name in less]
    for function, name, valid in tried:
        for value in values(kinds):
            if name != "options":
                refused(lambda: function(**valid | {name: value}), f"{function.__qualname__}({name}={value!r})")  # noqa: B023


def refused(call: Callable[[], object], what: str) -> None:
    """Nothing but an error of loratune comes out."""
    try:
        call()
    except loratune.LoratuneError as error:
        assert all(problem.what for problem in error.problems)
    except Exception as error:
        raise AssertionError(what) from error


def test_the_message_names_the_parameter_and_what_it_got(
    config: loratune.RunConfig, adapter: loratune.Adapter, folder: Path
) -> None:
    deep: dict[str, Any] = {"prompt": "a"}
    for _ in range(5000):
        deep = {"prompt": deep}
    cases: dict[str, tuple[Callable[[], object], str]] = {
        "question": (lambda: adapter.chat().ask(""), "empty"),
        "stop": (lambda: adapter.generate("a", stop="a"), "a list"),
        "grid: lora.r": (lambda: loratune.sweep(config, {"lora.r": 2}), "a list"),  # type: ignore[dict-item]
        "adapters": (lambda: loratune.Adapters({}), "no adapter"),
        "mix: one": (lambda: loratune.Adapters({"one": "a"}, mix={"one": "a"}), "a number"),  # type: ignore[dict-item]
        "scale": (lambda: loratune.Adapter(adapter.path, scale="1"), "a number"),  # type: ignore[arg-type]
        "output": (lambda: adapter.report(b"page"), "a path"),  # type: ignore[arg-type]
        "dtype": (lambda: adapter.merge(folder / "merged", dtype="int8"), "float16"),  # type: ignore[arg-type]
        "rows": (lambda: loratune.plan(config, rows={"training": ROWS}), "train, validation, test"),  # type: ignore[dict-item]
        "config": (lambda: loratune.train(config.resolved()), "RunConfig"),  # type: ignore[arg-type]
        "max_new_tokens": (lambda: adapter.chat(max_new_tokens=0), "less than 1"),
        "lora.r": (lambda: loratune.load_config(config.resolved(), {"lora.r": circle()}), "contains itself"),
        "lora.lora_alpha": (lambda: loratune.load_config(config.resolved(), {"lora.lora_alpha": object()}), "object"),
    }
    for key, (call, what) in cases.items():
        with pytest.raises(loratune.ConfigError) as caught:
            call()
        (problem,) = caught.value.problems
        assert problem.key == key and what in problem.what, problem
    nested: list[Any] = [deep, {"prompt": circle()}, *ROWS[:2]]
    for number in range(2):
        with pytest.raises(loratune.DataError) as wrong:
            adapter.evaluate([ROWS[0], nested[number]])
        assert [problem.where for problem in wrong.value.problems] == ["rows[1]"]


def test_paths_and_numbers_of_numpy_are_taken(
    config: loratune.RunConfig, adapter: loratune.Adapter, tiny_dir: Path, folder: Path
) -> None:
    values = config.resolved()
    values["model"] |= {"name_or_path": tiny_dir}
    values["lora"] |= {"r": np.int64(4), "lora_dropout": np.float32(0.5), "target_modules": np.array(["q", "v"])}
    values["output_dir"] = folder / "numpy"
    made = loratune.load_config(values, {"training.max_steps": np.int32(3), "lora.layers_to_transform": np.arange(2)})
    assert (made.lora.r, made.lora.lora_dropout, made.lora.target_modules) == (4, 0.5, ["q", "v"])
    assert (made.training.max_steps, made.lora.layers_to_transform) == (3, [0, 1])
    assert made.model.name_or_path == str(tiny_dir) and made.output_dir == str(folder / "numpy")
    found = adapter.evaluate_scales(pandas.Series(ROWS[:2]), np.array([0.5, 1.0]))
    assert [*found.comparisons] == [0.5, 1.0]
    texts = adapter.generate(pandas.Series(["3 and", "4 and"]), max_new_tokens=np.int64(2), stop=("x",))
    assert texts == adapter.generate(["3 and", "4 and"], max_new_tokens=2, stop=["x"])
    assert loratune.Adapter(adapter.path, scale=np.float32(0.5)).scale == 0.5


def test_errors_name_parameters_and_those_of_a_command_its_options(
    config: loratune.RunConfig, adapter: loratune.Adapter, folder: Path, tmp_path: Path, cli: Callable[..., Ran]
) -> None:
    """The same error of a function and of the command that calls it: its place, its key, and words in it."""
    path, rows, out, taken = adapter.path, folder / "rows.jsonl", tmp_path / "out", tmp_path / "taken"
    taken.mkdir()
    page = tmp_path / "page.html"
    page.write_text("<!DOCTYPE html>")
    file = tmp_path / "config.yaml"
    file.write_text(configs.dump(config))
    one, named = ["--adapter", path], {"one": path, "two": tmp_path}
    several = ["--adapter", f"one={path}", "--adapter", f"two={tmp_path}"]
    evaluate, sweep = ["evaluate", *one, "--data", rows], ["sweep", file]
    cases: list[tuple[Callable[[], object], list[Any], str, str, dict[str, str]]] = [
        (lambda: adapter.evaluate(rows, metrics="exact"), [*evaluate, "--metric", "exact"], "metrics", "--metric", {}),
        (lambda: adapter.evaluate(rows, limit=2), [*evaluate, "--limit", 2], "limit", "--limit",
         {"only works with `tasks=...`": "only works with --tasks"}),
        (lambda: adapter.evaluate(rows, require="a.b>0"), [*evaluate, "--require", "a.b>0"], "require", "--require",
         {"name it with `tasks='a'`": "name it with --tasks a"}),
        (lambda: adapter.evaluate(rows, require="loss<9"), [*evaluate, "--require", "loss<9"],
         f"{rows}: require", f"{rows}: --require", {"use `allow_overlap=True`": "use --allow-overlap"}),
        (lambda: adapter.evaluate_scales(rows, [3.0, 1.0]), [*evaluate, "--adapter-scale", "3,1"],
         "scales", "--adapter-scale", {}),
        (lambda: loratune.Adapter(path, scale=3.0), ["generate", *one, "--adapter-scale", 3, "a"],
         "scale", "--adapter-scale", {}),
        (lambda: adapter.generate("a", top_k=3), ["generate", *one, "--top-k", 3, "a"], "top_k", "--top-k", {}),
        (lambda: adapter.generate("a", max_new_tokens=600), ["generate", *one, "--max-new-tokens", 600, "a"],
         "prompt 1", "prompt 1", {"set `max_new_tokens=...` to 5": "set --max-new-tokens to 5"}),
        (lambda: loratune.Adapters(["a", "b"]), ["generate", "--adapter", "a", "--adapter", "b", "c"],
         "a: adapters", "a: --adapter", {"`adapters=['NAME=DIR']`": "--adapter NAME=DIR"}),
        (lambda: loratune.Adapters(named, use="one", mix="one:1"),
         ["generate", *several, "--use", "one", "--mix", "one:1", "a"],
         "give `use=...` or `mix=...`, not both", "give --use or --mix, not both", {}),
        (lambda: loratune.Adapters(named).export("peft", out), ["export", *several, "--to", "peft", "--output", out],
         "mix", "--mix", {"`mix='sql:0.7,tone:0.3'`": "--mix sql:0.7,tone:0.3"}),
        (lambda: adapter.export("vllm", out, base_gguf=rows),
         ["export", *one, "--to", "vllm", "--output", out, "--base-gguf", rows], "base_gguf", "--base-gguf",
         {"`to='gguf'` and `to='ollama'`": "--to gguf and --to ollama"}),
        (lambda: adapter.merge(taken), ["merge", *one, "--output", taken], f"{taken}: output", f"{taken}: --output",
         {"replace it with `overwrite=True`": "replace it with --overwrite"}),
        (lambda: adapter.report(page), ["report", *one, "--output", page], f"{page}: output", f"{page}: --output",
         {"replace the file with `overwrite=True`": "replace the file with --overwrite"}),
        (lambda: push(path, "me/it", base="a"), ["push", "me/it", *one, "--base", "a"], "a: base", "a: --base", {}),
        (lambda: loratune.load_config(file, {"lora.r": 0}), ["train", file, "--set", "lora.r=0"],
         "`overrides=...`: lora.r", "--set: lora.r", {}),
        (lambda: loratune.init(rows, model=config.model.name_or_path, overrides=["data.train=a"]),
         ["init", rows, "--model", config.model.name_or_path, "--set", "data.train=a"],
         "`overrides=...`: data.train", "--set: data.train", {"also given by `rows=...`": "also given by DATA"}),
        (lambda: loratune.train(config), ["train", file], f"{path}: output_dir", f"{path}: output_dir",
         {"`overwrite=True`": "--overwrite"}),
        (lambda: loratune.train(config, resume=["lora.r"]), ["train", file, "--resume"], str(path), str(path),
         {"without `resume=True`": "without --resume"}),
        (lambda: loratune.sweep(config, []), sweep, "`grid=...`", "--grid",
         {"`grid=['training.learning_rate=1e-4,3e-4,1e-3']`": "--grid training.learning_rate=1e-4,3e-4,1e-3"}),
        (lambda: loratune.sweep(config, ["lora.r=2..4"]), [*sweep, "--grid", "lora.r=2..4"], "grid", "--grid",
         {"give `trials=...` or `budget=...`": "give --trials or --budget"}),
    ]  # fmt: skip
    for call, command, parameter, option, words in cases:
        with pytest.raises(loratune.LoratuneError) as caught:
            call()
        said, ran = str(caught.value), cli(*command)
        assert said.startswith(parameter) and all(one in said for one in words), said
        assert "--" not in said.replace("--set output_dir=NEW", ""), said
        assert len(ran.errors) == 1 and ran.errors[0].startswith(option), ran.err
        assert all(one in ran.err for one in words.values()) and "=..." not in ran.err, ran.err


def test_what_users_write_is_not_translated(monkeypatch: pytest.MonkeyPatch) -> None:
    output = SimpleNamespace(name="output", opts=["--output"], param_type_name="option", secondary_opts=[])
    options.use_options([output])
    assert options.as_options("`output=x`: replace it, `overwrite=True`") == "--output x: replace it, --overwrite"
    monkeypatch.setattr(sys, "argv", ["loratune", "merge", "--output", "`output=x`/y"])
    assert options.as_options("`output=x`/y: replace it, `overwrite=True`") == "`output=x`/y: replace it, --overwrite"
