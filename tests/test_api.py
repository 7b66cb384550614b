"""The Python API: what `import loratune` offers does the same as the commands."""

import json
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import peft
import pytest
import torch
import transformers
from conftest import ROWS, meanings, run_command, write_rows
from datasets import Dataset
from huggingface_hub.utils.tqdm import are_progress_bars_disabled
from running import WEIGHTS, Cli, MakeConfig

import loratune
from loratune.codes import Code
from loratune.system import accelerator

pytestmark = pytest.mark.usefixtures("untraced_module")

pandas = pytest.importorskip("pandas")
HELD_OUT = [{"prompt": f"{number} and {number} make", "completion": f" {2 * number}"} for number in range(50, 70)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("api")


@pytest.fixture(scope="module")
def events() -> list[loratune.Event]:
    return []


@pytest.fixture(scope="module")
def config(folder: Path, tiny_dir: Path) -> loratune.RunConfig:
    write_rows(folder / "rows.jsonl", ROWS)
    write_rows(folder / "held-out.jsonl", HELD_OUT)
    values: dict[str, Any] = {
        "model": {"name_or_path": f"{tiny_dir}/../{tiny_dir.name}"}, "output_dir": str(folder / "out"),
        "data": {"train": str(folder / "rows.jsonl"), "validation": 0.2},
        "training": {"max_steps": 6, "learning_rate": 0.01, "logging_steps": 2},
    }  # fmt: skip
    (folder / "run.yaml").write_text(json.dumps(values))
    return loratune.load_config(folder / "run.yaml", {"training.max_steps": 4, "output_dir": folder / "out"})


@pytest.fixture(scope="module")
def adapter(config: loratune.RunConfig, events: list[loratune.Event]) -> loratune.Adapter:
    return loratune.train(config, on_event=events.append)


def test_importing_loratune_does_not_import_torch() -> None:
    code = "import sys, loratune; print(sorted({'torch', 'pydantic', 'typer', 'rich'} & {*sys.modules}))"
    done = run_command([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.slow
def test_what_was_frozen_is_collected_at_the_end_of_a_program(folder: Path, config: loratune.RunConfig) -> None:
    """Native code, such as nanobind in Triton 3.9, would otherwise report it as leaked."""
    told = "print(gc.get_freeze_count() > 100_000, flush=True)"
    code = (
        f"import atexit, gc, loratune; atexit.register(lambda: {told});"  # called last
        f"loratune.count_parameters(loratune.load_config({str(folder / 'run.yaml')!r})); {told}"
    )
    done = run_command([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\nFalse\n"


def test_all_exported_names_exist() -> None:
    assert all(getattr(loratune, name) is not None for name in loratune.__all__)
    with pytest.raises(AttributeError):
        loratune.nothing  # noqa: B018


def test_overrides_are_validated(folder: Path, config: loratune.RunConfig) -> None:
    assert config.training.max_steps == 4
    with pytest.raises(loratune.ConfigError) as refused:
        loratune.load_config(folder / "run.yaml", {"lora.rank": 8})
    assert [problem.code for problem in refused.value.problems] == [Code.CONFIG_UNKNOWN_KEY]


def test_a_config_may_be_a_plain_dict(folder: Path, config: loratune.RunConfig) -> None:
    values = json.loads((folder / "run.yaml").read_text())
    changes = {"training.max_steps": 4, "output_dir": folder / "out"}
    assert loratune.load_config(values, changes) == config and values["training"]["max_steps"] == 6
    with pytest.raises(loratune.ConfigError) as refused:
        loratune.load_config(values | {"training": {"learning_rate": -1.0, "steps": 3}})
    assert [problem.key for problem in refused.value.problems] == ["training.learning_rate", "training.steps"]


def test_training_gives_the_same_adapter_as_the_command(
    adapter: loratune.Adapter, folder: Path, cli: Cli, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ("--set", "training.max_steps=4", "--set", f"output_dir={folder / 'command'}")
    assert cli("train", folder / "run.yaml", *changes).code == 0
    assert (folder / "command" / WEIGHTS).read_bytes() == (adapter.path / WEIGHTS).read_bytes()
    assert adapter.config is not None and adapter.metrics["steps"] == 4


def test_events_report_the_progress_of_a_run(adapter: loratune.Adapter, events: list[loratune.Event]) -> None:
    kinds = {type(event).__name__ for event in events}
    assert kinds == {"NoteEvent", "PlanEvent", "ProgressEvent", "TrainingEvent", "StepEvent", "EvaluationEvent",
                     "FinishedEvent"}  # fmt: skip
    assert isinstance(events[-1], loratune.FinishedEvent)
    steps = [event for event in events if isinstance(event, loratune.StepEvent)]
    assert [event.step for event in steps] == [1, 2, 3, 4]
    assert [event.step for event in steps if event.loss is not None] == [1, 2, 4]
    (plan,) = [event for event in events if isinstance(event, loratune.PlanEvent)]
    assert plan.device in map(accelerator.describe, (torch.bfloat16, torch.float32))
    assert plan.trainable > 0 and any("train" in line for line in plan.rows)
    tasks = [event for event in events if isinstance(event, loratune.ProgressEvent)]
    assert {event.task for event in tasks if event.finished} == {event.task for event in tasks}
    later: list[Any] = [*steps, *(event for event in tasks if event.what == "writing texts of the base")]
    assert all(events.index(plan) < events.index(event) for event in later)  # it says how long writing takes


def test_nothing_is_printed_and_signal_handlers_are_kept(
    config: loratune.RunConfig, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    quiet = config.model_copy(update={"output_dir": str(folder / "quiet")})
    adapter = loratune.train(quiet)
    adapter.generate(["1 and 1 make"], max_new_tokens=2)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert transformers.logging.get_verbosity() == transformers.logging.WARNING
    assert transformers.logging.is_progress_bar_enabled() and not are_progress_bars_disabled()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", ["list", "dataset", "frame"])
def test_rows_may_be_python_objects(
    kind: str, config: loratune.RunConfig, adapter: loratune.Adapter, folder: Path
) -> None:
    """The adapter is byte-identical to one trained on a file of the same rows. Resuming compares the content."""
    rows = {"list": ROWS, "dataset": Dataset.from_list(ROWS), "frame": pandas.DataFrame(ROWS)}[kind]
    run = config.model_copy(update={"output_dir": str(folder / kind)})
    given = loratune.train(run, rows={"train": rows})
    assert (given.path / WEIGHTS).read_bytes() == (adapter.path / WEIGHTS).read_bytes()
    comparison = adapter.evaluate(rows)
    assert comparison.rows[0].where.startswith("rows[")


def test_an_interrupted_run_leaves_a_checkpoint(
    config: loratune.RunConfig, adapter: loratune.Adapter, folder: Path
) -> None:
    def interrupt(event: loratune.Event) -> None:
        if isinstance(event, loratune.StepEvent) and event.step == 2:
            signal.raise_signal(signal.SIGINT)

    run = config.model_copy(update={"output_dir": str(folder / "interrupted")})
    with pytest.raises(KeyboardInterrupt):
        loratune.train(run, on_event=interrupt)
    assert not (folder / "interrupted").exists()
    with pytest.raises(loratune.ConfigError):
        loratune.train(run)
    resumed = loratune.train(run, resume=True)
    assert (resumed.path / WEIGHTS).read_bytes() == (adapter.path / WEIGHTS).read_bytes()


def test_an_adapter_generates(adapter: loratune.Adapter) -> None:
    opened = loratune.Adapter(adapter.path)
    prompts = ["1 and 1 make", "2 and 2 make"]
    texts = opened.generate(prompts, max_new_tokens=4)
    assert len(texts) == 2 and texts == adapter.generate(prompts, max_new_tokens=4)
    sampled = [adapter.generate(prompts, max_new_tokens=8, temperature=1.5, top_p=0.9, seed=7) for _ in range(2)]
    assert sampled[0] == sampled[1]


def test_a_stream_gives_what_generate_gives_piece_by_piece(adapter: loratune.Adapter) -> None:
    base = loratune.Adapter(adapter.path, scale=0)  # which writes until the limit
    stop = base.generate("3 and 3 make", max_new_tokens=40)[0][10:13]
    for options in ({}, {"stop": [stop]}, {"temperature": 0.8, "seed": 3}):
        for one in (adapter, base):
            whole = one.generate("3 and 3 make", max_new_tokens=40, **options)[0]
            pieces = [*one.stream("3 and 3 make", max_new_tokens=40, **options)]
            assert "".join(pieces) == whole.removesuffix("\n") and "" not in pieces
    drawn = ([*base.stream("3 and 3 make", max_new_tokens=200, temperature=1.5, seed=seed)] for seed in range(9))
    assert max(map(len, drawn)) > 2
    with pytest.raises(loratune.ConfigError, match="exceed"):
        adapter.stream("3 and 3 make", max_new_tokens=10**6)


def test_a_stream_that_is_closed_ends_its_thread(adapter: loratune.Adapter) -> None:
    """And leaves the turn to others."""
    base, count = loratune.Adapter(adapter.path, scale=0), threading.active_count()
    made = {
        seed: base.generate("3 and 3 make", max_new_tokens=200, temperature=1.5, seed=seed)[0] for seed in range(20)
    }
    options: Any = {"temperature": 1.5, "seed": max(made, key=lambda seed: len(made[seed]))}  # one that ends late
    begun = base.stream("3 and 3 make", max_new_tokens=200, **options)
    first = next(begun)
    assert threading.active_count() == count + 1
    begun.close()  # type: ignore[attr-defined]
    assert threading.active_count() == count
    assert base.generate("3 and 3 make", max_new_tokens=200, **options)[0].startswith(first)


def test_the_model_and_tokenizer_of_an_adapter_are_those_of_peft(adapter: loratune.Adapter) -> None:
    ids = adapter.tokenizer("3 and 3 make", return_tensors="pt").input_ids
    with torch.no_grad():
        own = adapter.model(input_ids=ids).logits
        stock = transformers.AutoModelForCausalLM.from_pretrained(adapter.base, dtype=own.dtype)
        expected = peft.PeftModel.from_pretrained(stock, str(adapter.path)).eval()(input_ids=ids).logits
    assert torch.allclose(own.float(), expected.float(), atol=0.02)


def test_a_comparison_shows_itself(adapter: loratune.Adapter, folder: Path, cli: Cli) -> None:
    found = adapter.evaluate(folder / "held-out.jsonl")
    printed = cli("evaluate", "--adapter", adapter.path, "--data", folder / "held-out.jsonl").out
    lines = repr(found).splitlines()
    assert lines[0] in printed and all(line in printed for line in lines[2:]) and len(lines) > 5
    html = found._repr_html_()
    assert html.count("<table") == 2 and "exact match" in html and "<b>" in html
    rows = found.to_pandas()
    assert len(rows) == len(found.rows) and rows["adapter.answer"].iloc[0] == found.rows[0].answers["adapter"].text
    assert rows["base.loss"].iloc[0] == pytest.approx(found.rows[0].answers["base"].loss / found.rows[0].count)
    frame = found.to_pandas("metrics").set_index(["model", "metric"])
    interval = found.scores["adapter"].intervals["loss"]
    assert frame.loc[("adapter", "loss"), "value"] == found.metrics["adapter"]["loss"]
    assert interval is not None and frame.loc[("adapter", "loss"), "high"] == interval.high


def test_an_adapter_evaluates(adapter: loratune.Adapter, folder: Path, cli: Cli) -> None:
    comparison = adapter.evaluate(folder / "held-out.jsonl")
    ran = cli("evaluate", "--adapter", adapter.path, "--data", folder / "held-out.jsonl", "--json")
    assert json.loads(json.dumps(comparison.to_dict())) == json.loads(ran.out)
    events: list[loratune.Event] = []
    again = adapter.evaluate(folder / "held-out.jsonl", on_event=events.append)  # on the base that is already loaded
    assert again.to_dict() == comparison.to_dict()
    whats = {event.what for event in events if isinstance(event, loratune.ProgressEvent)}
    assert "scoring base" in whats and not any("loading" in what or "attaching" in what for what in whats)
    assert adapter.evaluate(folder / "held-out.jsonl", metrics="contains").to_dict()["adapter"]["contains"] is not None
    comparison.require("loss<base")
    with pytest.raises(loratune.RequirementError) as failed:
        comparison.require("exact_match>=0.99")
    assert failed.value.problems[0].code == Code.EVALUATE_REQUIREMENT


def test_options_without_effect_are_refused(adapter: loratune.Adapter, folder: Path) -> None:
    """By their names; without reading rows, or writing anything."""
    calls: dict[str, Callable[[], object]] = {
        "limit": lambda: adapter.evaluate("missing.jsonl", limit=3),
        "allow_overlap": lambda: adapter.evaluate("missing.jsonl", allow_overlap=True),
        "scales": lambda: adapter.report(folder / "unwritten.html", scales=[0.5]),
        "overrides": lambda: loratune.explain("lora.r", overrides={"lora.r": 4}),
    }
    for key, call in calls.items():
        with pytest.raises(loratune.ConfigError) as refused:
            call()
        assert meanings(refused.value) == [(Code.USAGE_CONFLICT, "", key)]
    assert not (folder / "unwritten.html").exists()


def test_an_adapter_merges_exports_and_reports(adapter: loratune.Adapter, folder: Path) -> None:
    merged = adapter.merge(folder / "merged")
    assert merged.directory == folder / "merged" and (folder / "merged" / "model.safetensors").is_file()
    exported = adapter.export("peft", folder / "plain")
    assert (exported.directory / WEIGHTS).is_file()
    page = adapter.report(folder / "page.html")
    assert "<html" in page.read_text()
    with pytest.raises(loratune.ConfigError):
        adapter.report(folder / "page.html")


def test_several_adapters_share_a_base(adapter: loratune.Adapter, folder: Path) -> None:
    paths = {"one": adapter.path, "two": shutil.copytree(adapter.path, folder / "two")}
    rows = [{"prompt": "1 and 1 make", "adapter": name} for name in ("two", "one")]
    named = loratune.Adapters(paths)
    _ = named.opened.directories
    (alone,) = adapter.generate(["1 and 1 make"], max_new_tokens=4)
    answers = list(named.answers(rows, max_new_tokens=4, base=True))
    assert [(one.adapter, one.completion) for one in answers] == [("two", alone), ("one", alone)]
    assert answers[0].base is not None and answers[0].to_dict()["completion"] == alone
    half = loratune.Adapters(paths, mix={"one": 0.5, "two": 0.5})
    assert [one.completion for one in half.answers(["1 and 1 make"], max_new_tokens=4)] == [alone]
    with pytest.raises(loratune.ConfigError):
        named.export("peft", folder / "both")


def test_a_chat_streams_the_same_answer_as_generate(adapter: loratune.Adapter) -> None:
    pieces: list[str] = []
    talk = adapter.chat(max_new_tokens=4)
    reply = talk.ask("1 and 1 make", on_text=pieces.append)
    assert (
        "".join(pieces) == f"{reply.text}\n" and reply.text == adapter.generate(["1 and 1 make"], max_new_tokens=4)[0]
    )


def test_loading_shows_no_warning_that_users_cannot_act_on(adapter: loratune.Adapter) -> None:
    """PEFT reads an attribute that transformers deprecates: a notebook showed it at each load."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        assert loratune.Adapter(adapter.path).generate(["1 and"], max_new_tokens=1)


def test_plan_explain_init_and_sweep(
    config: loratune.RunConfig, folder: Path, tiny_dir: Path, run_config: MakeConfig
) -> None:
    assert loratune.count_parameters(config).count.trainable > 0
    planned = loratune.plan(config, overwrite=True)
    assert planned.count.trainable == loratune.count_parameters(config).count.trainable
    (key,) = loratune.explain("learning_rate", folder / "run.yaml").to_dict()["keys"].values()
    assert key["in_force"][0]["value"] == 0.01
    chosen = loratune.init(str(folder / "rows.jsonl"), model=str(tiny_dir), overrides={"training.max_steps": 2})
    assert chosen.training.max_steps == 2
    run = config.model_copy(update={"output_dir": str(folder / "best")})
    before = optuna.logging.get_verbosity()
    with warnings.catch_warnings():
        warnings.simplefilter("error", optuna.exceptions.ExperimentalWarning)
        result = loratune.sweep(run, grid={"training.learning_rate": [1e-2, 1e-3]})
    assert optuna.logging.get_verbosity() == before
    assert len(result.results.trials) == 2 and (folder / "best" / WEIGHTS).is_file()


def test_an_invalid_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(loratune.LoratuneError) as refused:
        loratune.Adapter(tmp_path)
    assert isinstance(refused.value, loratune.AdapterError)


def test_invalid_arguments_raise_as_on_the_command_line(
    adapter: loratune.Adapter, config: loratune.RunConfig, folder: Path
) -> None:
    """Before anything is computed or written, as an exception of loratune."""
    calls: dict[str, Callable[[], object]] = {
        "rows": lambda: loratune.plan(config, rows={"trian": [{"prompt": "a", "completion": "b"}]}),  # type: ignore[dict-item]
        "max_new_tokens": lambda: adapter.generate(["a"], max_new_tokens=0),
        "dtype": lambda: adapter.merge(folder / "merged-int8", dtype="int8"),  # type: ignore[arg-type]
    }
    for key, call in calls.items():
        with pytest.raises(loratune.ConfigError) as caught:
            call()
        assert [problem.key for problem in caught.value.problems] == [key]
    assert not (folder / "merged-int8").exists()
    assert adapter.generate("1 and 2", max_new_tokens=2) == adapter.generate(["1 and 2"], max_new_tokens=2)
