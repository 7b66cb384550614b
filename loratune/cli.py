"""The command line: parse, call one story, print. Everything heavy is imported inside the commands."""

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
from loratune.commands.boundary import boundary, printed, stopped
from loratune.console import Screen, screened, verbatim
from loratune.errors import ConfigError, DataError, Problem
from loratune.system import launcher
from loratune.system.files import path_problem
from loratune.system.launcher import Group

if TYPE_CHECKING:
    from loratune.commands.generate import Answer
    from loratune.training import preflight


class _Screened(TyperGroup):
    """The commands, with all that they print, usage errors too, made harmless for a terminal."""

    def main(self, *arguments: Any, **keywords: Any) -> Any:
        """As upstream, behind the door to the screen."""
        with screened():
            return super().main(*arguments, **keywords)


app = typer.Typer(
    cls=_Screened,
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

_MOST = 2**31 - 1
"""What a number of tokens or rows may be."""


@contextmanager
def _loading() -> Iterator[None]:
    """Imports make a million objects that stay; the collector need not walk them, neither now nor later."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _version(wanted: bool) -> None:
    if wanted:
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
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    changes: Annotated[
        list[str], typer.Option("--allow-change", metavar="KEY", help="With --resume: take on the new value of KEY.")
    ] = [],  # noqa: B006  typer copies it
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the adapter at output_dir, or an unfinished run.")
    ] = False,
    allow_worse: Annotated[
        bool, typer.Option("--allow-worse", help="Publish the adapter even if it does worse than its base.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be trained, and stop.")] = False,
    rows: Annotated[
        int, typer.Option("--rows", min=1, max=_MOST, metavar="N", help="With --dry-run: show N rendered rows.")
    ] = 1,
    debug: Debug = False,
) -> None:
    """Train an adapter as CONFIG says, and write it to its output_dir."""
    with boundary(debug, _join, scarce="free memory, or hold the base in less: model.quantization: 4bit") as group:
        if resume and overwrite:
            raise ConfigError(Problem("--resume and --overwrite contradict each other; keep one"))
        if changes and not resume:
            raise ConfigError(Problem("a run that starts takes every value as it is", key="--allow-change"))
        checked = None
        if group.main:
            checked = _checked(config_file, assignments, changes if resume else None, overwrite=overwrite)

        with _loading():
            from loratune.training import preflight

        ready = preflight.shared(checked, group)

        with _loading():
            from loratune.commands import show
            from loratune.commands import train as train_module
            from loratune.console import TrainingProgress, log, watched

        try:
            if dry_run:
                planned = train_module.plan(ready, watched, group)
                group.close()
                if group.main:
                    show.plan(planned, rows)
                return
            reporter = train_module.Reporter(log, show.announce, watched, TrainingProgress())
            made = train_module.train(ready, reporter, group, allow_worse=allow_worse)
        except KeyboardInterrupt as stop:
            fix = "the rows that were tokenised are kept, and the same command goes on from there"
            if not dry_run and ready.space.is_resumable():
                fix = f"continue with: {_resume_line(config_file, assignments, changes)}"
                fix += f", on {group.count} processes as before" if group.count > 1 else ""
            what, kind = stopped(stop)
            raise kind(Problem(what, fix=fix)) from None
        if made is not None:
            with printed():
                show.result(made, _program())


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
    max_new_tokens: Annotated[int, typer.Option(min=1, max=_MOST, help="Longest completion, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0: the likeliest token; 0.001 to 1000: sample.")] = 0.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file that --output names.")] = False,
    base: Annotated[bool, typer.Option("--base", help="Show the base model's answer beside it.")] = False,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Complete prompts with an adapter on its base."""
    with boundary(debug, scarce="free memory, lower --max-new-tokens, or give fewer prompts at once"):
        _check_paths(adapter=adapter, input=source, output=output)
        _check_answers(prompts, source, output, temperature, overwrite=overwrite)

        from loratune.commands import output_file

        read = (adapter, source) if source else (adapter,)
        place = output_file.output(output, "--output", overwrite=overwrite, inputs=read) if output is not None else None

        rows = _prompt_rows(prompts, source)

        with _loading():
            from loratune.console import log
            from loratune.training import preflight

        opened = preflight.open_adapter(adapter, log, forced=force)
        if place is not None:
            place = place.reading(Path(opened.base.name_or_path))

        with _loading():
            from loratune.commands import generate as generate_module

        stream = len(rows) == 1 and output is None and not base and sys.stdout.isatty()
        answers = generate_module.generate(
            opened, rows, max_new_tokens=max_new_tokens, temperature=temperature, base=base, stream=stream, log=log
        )
        if place is not None:
            with place.opened(log) as file:
                _write_answers(answers, file)
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
        if sum(given is not None for given in (config_file, model, adapter)) != 1:
            raise ConfigError(Problem("give one of CONFIG, --model and --adapter"))
        _check_paths(adapter=adapter)
        if adapter and assignments:
            raise ConfigError(Problem("an adapter is read as it is", key="--set", fix="leave it out"))

        from loratune import config

        if adapter:
            from loratune.commands import adapter_stats, show
            from loratune.lora import adapter_files

            show.header(str(adapter), adapter_stats.header(adapter_files.inspect(adapter)), as_json)
            return
        run = config.load(config_file, assignments) if config_file else config.of_model(str(model), assignments)
        _tell(config.portability(run.lora))

        with _loading():
            from loratune.commands import params as params_module
            from loratune.commands import show

        show.params(params_module.params(run), as_json)


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
    with boundary(debug, scarce="free memory, or shorten the rows with --set data.max_length"):
        _check_paths(adapter=adapter, data=data)
        with _loading():
            from loratune.config import Source
            from loratune.console import log, watched
            from loratune.data import read_source
            from loratune.training import preflight

        opened = preflight.open_adapter(adapter, log, forced=force, assignments=assignments)
        part = read_source(Source(path=data), opened.data, watched)

        with _loading():
            from loratune.commands import show
            from loratune.commands.evaluate import evaluate as story

        scores, remarks = story(opened, part, watched, log)
        for line in remarks:
            log(line)
        show.scores(scores, as_json)


def _join() -> Group:
    """The processes of this run; torch is imported for it only where there are several."""
    if launcher.count() == 1:
        return launcher.SingleProcess()

    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # what torch says of connections that end is ours to say

    with _loading():
        from loratune.training import distributed

    return distributed.join()


def _checked(
    config_file: Path, assignments: list[str], resume: list[str] | None, *, overwrite: bool
) -> "preflight.ValidatedRun":
    """What can be known of a run before torch is imported, see `preflight.check`. resume: keys with new values."""
    from loratune import config
    from loratune.training import run_dir

    run = config.load(config_file, assignments)
    if run.model.device_map is not None and launcher.count() > 1:
        what = f"auto spreads one model over all GPUs, and each of {launcher.count()} processes would do so"
        fix = f"leave it out, or start one process: loratune train {escaping.shell(str(config_file))}"
        raise ConfigError(Problem(what, str(config_file), "model.device_map", fix))
    _tell(config.portability(run.lora))
    read = config.inputs(config_file, run)
    space = run_dir.inspect(run.output_dir, resume=resume is not None, overwrite=overwrite, inputs=read)

    with _loading():
        from loratune.console import watched
        from loratune.training import preflight

    return preflight.check(run, space, watched, resume)


def _tell(lines: Iterable[str]) -> None:
    """What is lawful, and better known before the run than after it."""
    from loratune.console import log

    for line in lines:
        log(line)


def _resume_line(config_file: Path, assignments: Iterable[str], changes: Iterable[str]) -> str:
    """The command that goes on with a run."""
    given = [part for one in assignments for part in ("--set", one)]
    allowed = [part for one in changes for part in ("--allow-change", one)]
    words = [_program(), "train", str(config_file), *given, "--resume", *allowed]
    return " ".join(map(escaping.shell, words))


def _program() -> str:
    """What to type for this program: its path, where the shell would not find it by its name."""
    called = sys.argv[0]
    return called if Path(called).name == "loratune" and shutil.which("loratune") is None else "loratune"


def _prompt_rows(prompts: list[str] | None, source: Path | None) -> list[Any]:
    """The prompts as rows; they come from arguments, a file, or stdin as a whole."""
    from loratune.config import Source
    from loratune.data import sources

    if source:
        return sources.read_rows(Source(path=str(source)))
    given = {f"prompt {number}": prompt for number, prompt in enumerate(prompts or [], start=1)} or {"stdin": _typed()}
    for name, prompt in given.items():
        if any("\ud800" <= letter <= "\udfff" for letter in prompt):  # Python's stand-ins for bytes that are no text
            raise DataError(Problem("not UTF-8", name, fix="give the prompt as text"))
    return [sources.Row(name, {"prompt": prompt}) for name, prompt in given.items()]


def _typed() -> str:
    """All of stdin as one prompt. Raises DataError: there is none."""
    if sys.stdin.isatty():
        print("type one prompt, and end it with Ctrl-D", file=sys.stderr)
    text = "" if sys.stdin.closed else sys.stdin.read()
    if not text.strip():
        raise DataError(Problem("no prompt", fix="give it as an argument, with --input, or on stdin"))
    return text.rstrip("\n")


def _check_paths(**given: str | Path | None) -> None:
    """Raises ConfigError: the value of an option cannot be a path."""
    for option, path in given.items():
        if path is not None and (reason := path_problem(str(path)) or ("" if str(path) else "is empty")):
            raise ConfigError(Problem(f"the path {reason}", key=f"--{option}"))


def _check_answers(
    prompts: list[str] | None, source: Path | None, output: Path | None, temperature: float, *, overwrite: bool
) -> None:
    """Raises ConfigError: options of `generate` that do not go together, or a temperature out of range."""
    if temperature and not 1e-3 <= temperature <= 1e3:  # logits over it are inf, or all the same; NaN is neither
        what, fix = f"{temperature:g} is not between 0.001 and 1,000", "0: take the likeliest token"
        raise ConfigError(Problem(what, key="--temperature", fix=fix))
    if prompts and source:
        raise ConfigError(Problem("give prompts, or --input, not both"))
    if overwrite and output is None:
        raise ConfigError(Problem("replaces what --output names, and that is not given", key="--overwrite"))


def _print_answers(answers: Iterable["Answer"], *, base: bool, streamed: bool) -> None:
    """One after another, as they come. streamed: they are printed already, token by token."""
    for answer in answers:
        if base:
            print(f"{answer.asked}\n  base     {_one_line(answer.base)}")
            print(f"  adapter  {_one_line(answer.completion)}", flush=True)
        elif not streamed:
            verbatim(answer.completion)


def _write_answers(answers: Iterable["Answer"], file: TextIO) -> None:
    """One row per answer: as it was read, with `completion`, and `base`; its own `completion` becomes `reference`."""
    from loratune.data.sources.rows import to_json_line

    to = Screen(file) if file.isatty() else file
    for answer in answers:
        row = dict(answer.row.values)
        if "completion" in row:
            row["reference"] = row.pop("completion")
        row["completion"] = answer.completion
        if answer.base is not None:
            row["base"] = answer.base
        print(to_json_line(row), file=to)


def _one_line(text: str | None) -> str:
    text = text or ""
    return " ↵ ".join(line.strip() for line in text.strip().splitlines() if line.strip())
