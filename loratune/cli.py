"""The command line: parse, call one story, print. Everything heavy is imported inside the commands."""

import gc
import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loratune import __version__, launched
from loratune.boundary import boundary, printed, stopped
from loratune.errors import ConfigError, DataError, Problem, ResourceError, is_disk_full
from loratune.launched import Group

if TYPE_CHECKING:
    from loratune import preflight

app = typer.Typer(
    help="LoRA fine-tuning of causal language models: a YAML file in, a small checked adapter directory out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback when something fails.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Force = Annotated[bool, typer.Option("--force", help="Use the adapter on another base, or with edited files.")]
Assignments = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. training.learning_rate=1e-4.")
]


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
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at output_dir.")] = False,
    allow_worse: Annotated[
        bool, typer.Option("--allow-worse", help="Publish the adapter even if it does worse than its base.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be trained, and stop.")] = False,
    rows: Annotated[int, typer.Option("--rows", min=1, metavar="N", help="With --dry-run: show N rendered rows.")] = 1,
    debug: Debug = False,
) -> None:
    """Train an adapter as CONFIG says, and write it to its output_dir."""
    with boundary(debug, _join) as group:
        if resume and overwrite:
            raise ConfigError(Problem("--resume and --overwrite contradict each other; keep one"))
        if changes and not resume:
            raise ConfigError(Problem("a run that starts takes every value as it is", key="--allow-change"))
        checked = None
        if group.main:
            checked = _checked(config_file, assignments, changes if resume else None, overwrite=overwrite)

        with _loading():
            from loratune import preflight

        ready = preflight.shared(checked, group)

        with _loading():
            from loratune import show
            from loratune import train as story
            from loratune.console import TrainingProgress, note, watched

        try:
            if dry_run:
                planned = story.plan(ready, watched, group)
                group.part()
                if group.main:
                    show.plan(planned, rows)
                return
            teller = story.Teller(note, show.announce, watched, TrainingProgress())
            made = story.train(ready, teller, group, allow_worse=allow_worse)
        except KeyboardInterrupt as stop:
            fix = "the rows that were tokenised are kept, and the same command goes on from there"
            if not dry_run and ready.space.has_checkpoints():
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
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest completion, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0: take the likeliest token; above: sample.")] = 0.0,
    base: Annotated[bool, typer.Option("--base", help="Show the base model's answer beside it.")] = False,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Complete prompts with an adapter on its base."""
    with boundary(debug):
        if prompts and source:
            raise ConfigError(Problem("give prompts, or --input, not both"))
        if output is not None:
            _check_output(output)

        rows = _prompt_rows(prompts, source)

        with _loading():
            from loratune import preflight
            from loratune.console import note

        opened = preflight.open_adapter(adapter, note, forced=force)

        with _loading():
            from loratune import generate as story

        stream = len(rows) == 1 and output is None and not base and sys.stdout.isatty()
        answers = story.generate(
            opened, rows, max_new_tokens=max_new_tokens, temperature=temperature, base=base, stream=stream, note=note
        )
        if output is not None:
            _write_answers(answers, output)
            return
        for answer in answers:
            if base:
                print(f"{answer.asked}\n  base     {_one_line(answer.base)}")
                print(f"  adapter  {_one_line(answer.completion)}", flush=True)
            elif not stream:
                print(answer.completion, flush=True)


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
        if adapter and assignments:
            raise ConfigError(Problem("an adapter is read as it is", key="--set", fix="leave it out"))

        from loratune import config

        if adapter:
            from loratune import header as reader
            from loratune import saved, show

            show.header(str(adapter), reader.header(saved.inspect(adapter)), as_json)
            return
        run = config.load(config_file, assignments) if config_file else config.of_model(str(model), assignments)
        _tell(config.portability(run.lora))

        with _loading():
            from loratune import params as story
            from loratune import show

        show.params(story.params(run), as_json)


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
    with boundary(debug):
        with _loading():
            from loratune import preflight
            from loratune.config import Source
            from loratune.console import note, watched
            from loratune.data import check_source

        if not data:
            raise ConfigError(Problem("the path is empty", key="--data"))
        opened = preflight.open_adapter(adapter, note, forced=force, assignments=assignments)
        part = check_source(Source(path=data), opened.data, watched)

        with _loading():
            from loratune import show
            from loratune.evaluate import evaluate as story

        scores, remarks = story(opened, part, watched, note)
        for line in remarks:
            note(line)
        show.scores(scores, as_json)


def _join() -> Group:
    """The processes of this run; torch is imported for it only where there are several."""
    if launched.count() == 1:
        return launched.Alone()

    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # what torch says of connections that end is ours to say

    with _loading():
        from loratune import ranks

    return ranks.join()


def _checked(
    config_file: Path, assignments: list[str], resume: list[str] | None, *, overwrite: bool
) -> "preflight.Ready":
    """What can be known of a run before torch is imported, see `preflight.check`. resume: keys with new values."""
    from loratune import config, workspace

    run = config.load(config_file, assignments)
    if run.model.device_map is not None and launched.count() > 1:
        what = f"auto spreads one model over all GPUs, and each of {launched.count()} processes would do so"
        fix = f"leave it out, or start one process: loratune train {shlex.quote(str(config_file))}"
        raise ConfigError(Problem(what, str(config_file), "model.device_map", fix))
    _tell(config.portability(run.lora))
    space = workspace.inspect(run.output_dir, resume=resume is not None, overwrite=overwrite)

    with _loading():
        from loratune import preflight
        from loratune.console import watched

    return preflight.check(run, space, watched, resume)


def _tell(lines: Iterable[str]) -> None:
    """What is lawful, and better known before the run than after it."""
    from loratune.console import note

    for line in lines:
        note(line)


def _resume_line(config_file: Path, assignments: Iterable[str], changes: Iterable[str]) -> str:
    """The command that goes on with a run."""
    given = [part for one in assignments for part in ("--set", one)]
    allowed = [part for one in changes for part in ("--allow-change", one)]
    return shlex.join([_program(), "train", str(config_file), *given, "--resume", *allowed])


def _program() -> str:
    """What to type for this program: its path, where the shell would not find it by its name."""
    called = sys.argv[0]
    return called if Path(called).name == "loratune" and shutil.which("loratune") is None else "loratune"


def _prompt_rows(prompts: list[str] | None, source: Path | None) -> list[Any]:
    """The prompts as rows; they come from arguments, a file, or stdin as a whole."""
    from loratune.config import Source
    from loratune.data import sources

    if source:
        return sources.read(Source(path=str(source)))
    if not prompts:
        if sys.stdin is not None and sys.stdin.isatty():
            print("type one prompt, and end it with Ctrl-D", file=sys.stderr)
        text = "" if sys.stdin is None or sys.stdin.closed else sys.stdin.read()
        if not text.strip():
            raise DataError(Problem("no prompt", fix="give it as an argument, with --input, or on stdin"))
        prompts = [text.rstrip("\n")]
    return [sources.Row(f"prompt {number}", {"prompt": prompt}) for number, prompt in enumerate(prompts, start=1)]


def _check_output(output: Path) -> None:
    if output.is_dir():
        raise ConfigError(Problem("is a directory, not a file", str(output), "--output"))
    if not output.resolve().parent.is_dir():
        raise ConfigError(Problem(f"its directory {output.parent} does not exist", str(output), "--output"))
    if not os.access(output if output.exists() else output.resolve().parent, os.W_OK):
        raise ConfigError(Problem("cannot be written", str(output), "--output", "choose another place"))


def _write_answers(answers: Any, output: Path) -> None:
    """One row per answer: the row as it was read, with `completion`, and `base`; its own `completion` is `reference`.

    A regular file appears, or is replaced, when the last answer is in it; a pipe or device is written to as it is.
    """
    output = output.resolve()
    in_place = output.exists() and not output.is_file()
    unfinished = output if in_place else output.with_name(f".{output.name}.unfinished")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            for answer in answers:
                row = dict(answer.row.values)
                if "completion" in row:
                    row["reference"] = row.pop("completion")
                row["completion"] = answer.completion
                if answer.base is not None:
                    row["base"] = answer.base
                print(json.dumps(row, ensure_ascii=False), file=file)
        if not in_place:
            unfinished.replace(output)
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise ResourceError(Problem("no room for the answers", str(output), "--output", "make room")) from None
    finally:
        if not in_place:
            unfinished.unlink(missing_ok=True)


def _one_line(text: str | None) -> str:
    text = text or ""
    return " ↵ ".join(line.strip() for line in text.strip().splitlines() if line.strip())
