"""The command line: parse, call one command, print. Everything heavy is imported inside the commands."""

import gc
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from typer.core import TyperGroup

from loratune import __version__, escaping
from loratune.codes import Code
from loratune.commands.boundary import boundary, checked_output, stop_error
from loratune.console import EscapedStream, escape_output, print_raw
from loratune.errors import ConfigError, DataError, Problem
from loratune.system import launcher
from loratune.system.files import path_problem
from loratune.system.launcher import Group

if TYPE_CHECKING:
    from loratune.commands.generate import Answer
    from loratune.training import preflight


class _EscapedGroup(TyperGroup):
    """The commands, with all that they print, usage errors too, escaped for the terminal."""

    def main(self, *arguments: Any, **keywords: Any) -> Any:
        """Run a command as upstream does, with its output escaped."""
        with escape_output():
            return super().main(*arguments, **keywords)


app = typer.Typer(
    cls=_EscapedGroup,
    help="LoRA fine-tuning of causal language models: a YAML file in, a small checked adapter directory out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks, of what is passed over too.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Force = Annotated[bool, typer.Option("--force", help="Use the adapter on another base, or with edited files.")]
Assignments = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. training.learning_rate=1e-4.")
]

_MAX_COUNT = 2**31 - 1
"""The largest number of tokens or rows that an option takes."""


@contextmanager
def _importing() -> Iterator[None]:
    """Keep the garbage collector from walking the million objects that imports make and that stay, now and later."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _version(requested: bool) -> None:
    if requested:
        print(f"loratune {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def train(
    config_file: Annotated[Path, typer.Argument(metavar="CONFIG", help="The YAML file of the run.")],
    assignments: Assignments = [],  # noqa: B006  typer copies it
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint.")] = False,
    changes: Annotated[
        list[str], typer.Option("--allow-change", metavar="KEY", help="With --resume: accept a changed value of KEY.")
    ] = [],  # noqa: B006  typer copies it
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the adapter at output_dir, or an unfinished run.")
    ] = False,
    allow_worse: Annotated[
        bool, typer.Option("--allow-worse", help="Publish the adapter even if it does worse than its base.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be trained, and stop.")] = False,
    rows: Annotated[
        int, typer.Option("--rows", min=1, max=_MAX_COUNT, metavar="N", help="With --dry-run: show N rendered rows.")
    ] = 1,
    debug: Debug = False,
) -> None:
    """Train an adapter as CONFIG says, and write it to its output_dir."""
    memory_fix = "free memory, or load the base in fewer bits with --set model.quantization=4bit"
    with boundary(debug, _join, memory_fix=memory_fix) as group:
        if resume and overwrite:
            what = "--resume and --overwrite contradict each other"
            raise ConfigError(Problem(Code.USAGE_CONFLICT, what, fix="give one of them"))
        if changes and not resume:
            raise ConfigError(Problem(Code.USAGE_NEEDS_OPTION, "only works with --resume", key="--allow-change"))
        checked = None
        if group.main:
            checked = _check_run(config_file, assignments, changes if resume else None, overwrite=overwrite)

        with _importing():
            from loratune.training import preflight

        ready = preflight.broadcast_run(checked, group)

        with _importing():
            from loratune.commands import report
            from loratune.commands import train as training
            from loratune.console import TrainingProgress, log, show_progress

        try:
            if dry_run:
                plan = training.make_plan(ready, show_progress, group)
                group.close()
                if group.main:
                    report.print_plan(plan, rows)
                return
            reporter = training.Reporter(log, report.log_plan, show_progress, TrainingProgress())
            result = training.train(ready, reporter, group, allow_worse=allow_worse)
        except KeyboardInterrupt as stop:
            fix = "the tokenized rows are kept, so that the same command continues from there"
            if not dry_run and ready.directory.is_resumable():
                processes = f"on {group.count} processes, as before, " if group.count > 1 else ""
                fix = f"{processes}continue with: {_resume_command(config_file, assignments, changes)}"
            raise stop_error(stop, fix) from None
        if result is not None:
            with checked_output():
                report.print_result(result, _program())


@app.command()
def generate(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT", help="Without any, stdin is one prompt.")
    ] = None,
    adapter: Annotated[Path, typer.Option("--adapter", metavar="DIR", help="The adapter directory.")] = ...,  # type: ignore[assignment]
    source: Annotated[
        Path | None, typer.Option("--input", metavar="FILE", help="Rows with prompts or messages.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="Write rows as JSONL to FILE.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=_MAX_COUNT, help="Longest completion, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0: the likeliest token; 0.001 to 1000: sample.")] = 0.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file that --output names.")] = False,
    base: Annotated[bool, typer.Option("--base", help="Show the base model's answer beside it.")] = False,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Complete prompts with an adapter on its base."""
    with boundary(debug, memory_fix="free memory, lower --max-new-tokens, or give fewer prompts at once"):
        _check_paths(adapter=adapter, input=source, output=output)
        _check_answers(prompts, source, output, temperature, overwrite=overwrite)

        from loratune.commands import output_file

        inputs = (adapter, source) if source else (adapter,)
        file = output_file.output(output, "--output", overwrite=overwrite, inputs=inputs) if output else None

        rows = _prompt_rows(prompts, source)

        with _importing():
            from loratune.console import log
            from loratune.training import preflight

        info = preflight.open_adapter(adapter, log, forced=force)
        if file is not None:
            file = file.reading(Path(info.base.name_or_path))

        with _importing():
            from loratune.commands.generate import generate

        stream = len(rows) == 1 and output is None and not base and sys.stdout.isatty()
        answers = generate(
            info, rows, max_new_tokens=max_new_tokens, temperature=temperature, base=base, stream=stream, log=log
        )
        if file is not None:
            with file.opened(log) as opened:
                _write_answers(answers, opened)
            return
        _print_answers(answers, base=base, streamed=stream)


@app.command()
def params(
    config_file: Annotated[Path | None, typer.Argument(metavar="CONFIG", help="The YAML file of a run.")] = None,
    model: Annotated[str | None, typer.Option(metavar="NAME_OR_DIR", help="A model, with the default LoRA.")] = None,
    adapter: Annotated[Path | None, typer.Option(metavar="DIR", help="An adapter directory.")] = None,
    assignments: Assignments = [],  # noqa: B006  typer copies it
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Count what would be trained, from the model's configuration alone: no weights are loaded or downloaded."""
    with boundary(debug):
        if sum(value is not None for value in (config_file, model, adapter)) != 1:
            raise ConfigError(Problem(Code.USAGE_CONFLICT, "give exactly one of CONFIG, --model and --adapter"))
        _check_paths(adapter=adapter)
        if adapter and assignments:
            what = "does not work with --adapter, which has its settings"
            raise ConfigError(Problem(Code.USAGE_NOT_FOR_ADAPTERS, what, key="--set", fix="leave it out"))

        from loratune import config

        if adapter:
            from loratune.commands import adapter_stats
            from loratune.lora import adapter_files

            stats = adapter_stats.adapter_stats(adapter_files.inspect(adapter))
            adapter_stats.print_stats(str(adapter), stats, as_json)
            return
        run = config.load(config_file, assignments) if config_file else config.for_model(str(model), assignments)
        _log_all(config.portability(run.lora))

        with _importing():
            from loratune.commands import report
            from loratune.commands.params import params

        report.print_params(params(run), as_json)


@app.command()
def evaluate(
    adapter: Annotated[Path, typer.Option("--adapter", metavar="DIR", help="The adapter directory.")],
    data: Annotated[str, typer.Option("--data", metavar="FILE", help="Held-out rows, in the format of training.")],
    assignments: Assignments = [],  # noqa: B006  typer copies it
    as_json: Json = False,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Score base and adapter on the same held-out rows."""
    with boundary(debug, memory_fix="free memory, or shorten the rows with --set data.max_length"):
        _check_paths(adapter=adapter, data=data)
        with _importing():
            from loratune.config import Source
            from loratune.console import log, show_progress
            from loratune.data import read_source
            from loratune.training import preflight

        info = preflight.open_adapter(adapter, log, forced=force, assignments=assignments)
        split = read_source(Source(path=data), info.data, show_progress)

        with _importing():
            from loratune.commands import report
            from loratune.commands.evaluate import evaluate

        scores, remarks = evaluate(info, split, show_progress, log)
        _log_all(remarks)
        report.print_scores(scores, as_json)


def _join() -> Group:
    """Join the processes of this run; torch is imported for it only where there are several."""
    if launcher.world_size() == 1:
        return launcher.SingleProcess()

    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # loratune reports lost connections itself

    with _importing():
        from loratune.training import distributed

    return distributed.join()


def _check_run(
    config_file: Path, assignments: list[str], resume: list[str] | None, *, overwrite: bool
) -> "preflight.ValidatedRun":
    """Check what can be known of a run before torch is imported, see `preflight.check`.

    resume: the keys whose values may have changed; None to start a run.
    """
    from loratune import config
    from loratune.training import output_dir

    run = config.load(config_file, assignments)
    if run.model.device_map is not None and (size := launcher.world_size()) > 1:
        what = f"auto spreads one model over all GPUs, and each of {size} processes would do so"
        fix = f"leave it out, or start one process: loratune train {escaping.shell(str(config_file))}"
        raise ConfigError(Problem(Code.CONFIG_SEVERAL_PROCESSES, what, str(config_file), "model.device_map", fix))
    _log_all(config.portability(run.lora))
    inputs = config.input_paths(config_file, run)
    directory = output_dir.check(run.output_dir, resume=resume is not None, overwrite=overwrite, inputs=inputs)

    with _importing():
        from loratune.console import show_progress
        from loratune.training import preflight

    return preflight.check(run, directory, show_progress, resume)


def _log_all(lines: Iterable[str]) -> None:
    from loratune.console import log

    for line in lines:
        log(line)


def _resume_command(config_file: Path, assignments: Iterable[str], changes: Iterable[str]) -> str:
    """The command that continues a run."""
    overrides = [word for assignment in assignments for word in ("--set", assignment)]
    allowed = [word for key in changes for word in ("--allow-change", key)]
    words = [_program(), "train", str(config_file), *overrides, "--resume", *allowed]
    return " ".join(map(escaping.shell, words))


def _program() -> str:
    """What to type to run this program: its path, if the shell would not find it by its name."""
    path = sys.argv[0]
    return path if Path(path).name == "loratune" and shutil.which("loratune") is None else "loratune"


def _prompt_rows(prompts: list[str] | None, source: Path | None) -> list[Any]:
    """The prompts as rows; they come from arguments, a file, or stdin as a whole."""
    from loratune.config import Source
    from loratune.data import sources

    if source:
        return sources.read_rows(Source(path=str(source)))
    texts = {f"prompt {number}": prompt for number, prompt in enumerate(prompts or [], start=1)} or {"stdin": _stdin()}
    for name, prompt in texts.items():
        if any("\ud800" <= character <= "\udfff" for character in prompt):  # how Python represents undecodable bytes
            raise DataError(Problem(Code.USAGE_NOT_UTF8, "not UTF-8", name, fix="give the prompt as text"))
    return [sources.Row(name, {"prompt": prompt}) for name, prompt in texts.items()]


def _stdin() -> str:
    """All of stdin as one prompt. Raises DataError: it is empty."""
    if sys.stdin.isatty():
        print("type one prompt, and end it with Ctrl-D", file=sys.stderr)
    text = "" if sys.stdin.closed else sys.stdin.read()
    if not text.strip():
        fix = "give one as an argument, with --input, or on stdin"
        raise DataError(Problem(Code.USAGE_NO_PROMPT, "there is no prompt", fix=fix))
    return text.rstrip("\n")


def _check_paths(**options: str | Path | None) -> None:
    """Raises ConfigError: the value of an option cannot be a path."""
    for option, path in options.items():
        if path is not None and (reason := path_problem(str(path)) or ("" if str(path) else "is empty")):
            raise ConfigError(Problem(Code.USAGE_BAD_PATH, f"the path {reason}", key=f"--{option}"))


def _check_answers(
    prompts: list[str] | None, source: Path | None, output: Path | None, temperature: float, *, overwrite: bool
) -> None:
    """Raises ConfigError: options of `generate` that do not go together, or a temperature out of range."""
    if temperature and not 1e-3 <= temperature <= 1e3:  # logits divided by it would be inf, or all equal; or it is NaN
        what, fix = f"{temperature:g} is not between 0.001 and 1,000", "0 takes the likeliest token"
        raise ConfigError(Problem(Code.USAGE_OUT_OF_RANGE, what, key="--temperature", fix=fix))
    if prompts and source:
        raise ConfigError(Problem(Code.USAGE_CONFLICT, "give prompts or --input, not both"))
    if overwrite and output is None:
        raise ConfigError(Problem(Code.USAGE_NEEDS_OPTION, "only works with --output", key="--overwrite"))


def _print_answers(answers: Iterable["Answer"], *, base: bool, streamed: bool) -> None:
    """Print answers as soon as they are there. streamed: they have been printed already, token by token."""
    for answer in answers:
        if base:
            print(f"{answer.prompt}\n  base     {_one_line(answer.base)}")
            print(f"  adapter  {_one_line(answer.completion)}", flush=True)
        elif not streamed:
            print_raw(answer.completion)


def _write_answers(answers: Iterable["Answer"], file: TextIO) -> None:
    """Write each row with its `completion`, and `base`; the row's own `completion` becomes `reference`."""
    from loratune.data.sources.rows import to_json_line

    stream = EscapedStream(file) if file.isatty() else file
    for answer in answers:
        row = dict(answer.row.values)
        if "completion" in row:
            row["reference"] = row.pop("completion")
        row["completion"] = answer.completion
        if answer.base is not None:
            row["base"] = answer.base
        print(to_json_line(row), file=stream)


def _one_line(text: str | None) -> str:
    text = text or ""
    return " ↵ ".join(line.strip() for line in text.strip().splitlines() if line.strip())
