"""The command `generate`."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from loratune.cli.application import (
    STDOUT,
    AdapterPath,
    Adapters,
    AdapterScale,
    DataAssignments,
    Debug,
    Force,
    Json,
    MaxNewTokens,
    NoSystem,
    System,
    Temperature,
    app,
    check_paths,
    needs,
    rows_output,
    system_message,
    write_rows,
)
from loratune.cli.boundary import boundary
from loratune.codes import Code
from loratune.console import log, raw_output
from loratune.errors import ConfigError, DataError, Problem
from loratune.system.output_file import Output
from loratune.text import one_line

if TYPE_CHECKING:
    from loratune.adapter.answering import Answer
    from loratune.api.opened import OpenedAdapters


InputRows = Annotated[
    Path | None,
    typer.Option("--input", metavar="FILE", help="A file of rows with prompts or messages; - is JSONL on stdin."),
]
OutputRows = Annotated[
    Path | None,
    typer.Option(
        "--output", metavar="FILE", help="Write rows to FILE: CSV if it ends in .csv, else JSONL; - is stdout."
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the file that --output names.")]


@app.command()
def generate(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT", help="Prompts to complete; by default one prompt, from stdin."),
    ] = None,
    adapters: Adapters = ...,  # type: ignore[assignment]
    use: Annotated[
        str | None,
        typer.Option(
            "--use", metavar="NAME", help="The adapter for rows without the field `adapter`; by default the first."
        ),
    ] = None,
    mix: Annotated[
        str | None, typer.Option("--mix", metavar="NAME:WEIGHT,...", help="Answer with the weighted sum of adapters.")
    ] = None,
    rows: InputRows = None,
    output: OutputRows = None,
    system: System = None,
    no_system: NoSystem = False,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: Annotated[
        float | None, typer.Option("--top-p", help="Sample from the most probable tokens with this total probability.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option("--top-k", help="Sample from this number of most probable tokens.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Random seed: the same seed gives the same text.")] = None,
    stop: Annotated[
        list[str], typer.Option("--stop", metavar="TEXT", help="End the completion before this text; repeatable.")
    ] = [],  # noqa: B006
    overwrite: Overwrite = False,
    base: Annotated[bool, typer.Option("--base", help="Also print the base model's answer.")] = False,
    scale: AdapterScale = 1.0,
    overrides: DataAssignments = [],  # noqa: B006  typer copies it
    as_json: Json = False,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Complete prompts with one or several adapters of a base."""
    with boundary(debug, memory_fix="free memory, lower --max-new-tokens, or give fewer prompts at once"):
        check_paths(rows=rows, output=output)
        if prompts and rows:
            raise ConfigError(Problem(Code.USAGE_CONFLICT, "give prompts or --input, not both"))
        if output is None and (problems := needs({"overwrite": overwrite}, "--output")):
            raise ConfigError(problems)
        given = system_message(system, none=no_system)
        output = Path(STDOUT) if as_json and output is None else output

        import loratune

        sampling = loratune.Sampling(temperature, top_p, top_k, seed, tuple(stop))
        sampling.check()
        named = loratune.Adapters(adapters, use=use, mix=mix, scale=scale, force=force, overrides=overrides)
        file = _file(output, [*named.paths.values()], rows, named.opened, overwrite=overwrite)
        asked = _rows(prompts, rows)
        on_terminal = sys.stdout.isatty() and output is None
        streams = on_terminal and not (base or stop or rows) and len(prompts or [""]) == 1
        answers = named.answers(
            asked, max_new_tokens=max_new_tokens, sampling=sampling, system=given, base=base, progress=not on_terminal,
            on_text=(lambda text: print(text, end="", flush=True)) if streams else None,
        )  # fmt: skip
        if output is not None:
            write_rows((answer.to_dict() for answer in answers), file)
            if file is not None:
                log(f"the answers are in {file.named}")
        else:
            _print_answers(answers, base=base, streamed=streams)


@app.command()
def classify(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="TEXT", help="Texts to label; by default one text, from stdin.")
    ] = None,
    adapter: AdapterPath = ...,  # type: ignore[assignment]
    labels: Annotated[
        str, typer.Option("--labels", metavar="A,B,...", help="The labels; by default those of the training rows.")
    ] = "",
    abstain_below: Annotated[
        float,
        typer.Option("--abstain-below", metavar="P", min=0, max=1, help="Leave labels empty that are less probable."),
    ] = 0.0,
    rows: InputRows = None,
    output: OutputRows = None,
    system: System = None,
    no_system: NoSystem = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Label texts with an adapter that was trained on labels."""
    with boundary(debug, memory_fix="free memory, or give fewer texts at once"):
        check_paths(rows=rows, output=output, adapter=adapter)
        if prompts and rows:
            raise ConfigError(Problem(Code.USAGE_CONFLICT, "give texts or --input, not both"))
        if output is None and (problems := needs({"overwrite": overwrite}, "--output")):
            raise ConfigError(problems)
        given = system_message(system, none=no_system)
        output = Path(STDOUT) if as_json and output is None else output

        import loratune
        from loratune.api.classify import classify_rows, labelled

        opened = loratune.Adapter(adapter, force=force)
        file = _file(output, [adapter], rows, opened.opened, overwrite=overwrite)
        named = [one.strip() for one in labels.split(",")] if labels else []
        found = classify_rows(opened, _rows(prompts, rows), labels=named, system=given)
        if output is None:
            for _, one in found:
                print(f"{one.probability:6.1%}  {one_line(one.label) if one.probability >= abstain_below else '?'}")
            return
        write_rows((labelled(row, one, abstain_below) for row, one in found), file)
        if file is not None:
            log(f"the labels are in {file.named}")


def _file(
    output: Path | None, adapters: list[Path], rows: Path | None, opened: "OpenedAdapters", *, overwrite: bool
) -> Output | None:
    """The file that answers are written to, which is none that the command reads; None for stdout."""
    inputs = (*adapters, *([rows] if rows and str(rows) != STDOUT else []))
    file = rows_output(output, overwrite=overwrite, inputs=inputs)
    return None if file is None else file.reading(*opened.inputs())


def _rows(prompts: list[str] | None, source: Path | None) -> Any:
    """The prompts: from arguments, from a file, or all of stdin as one prompt."""
    if source is not None:
        return _stdin("rows as JSON, one a line").buffer if str(source) == STDOUT else source
    texts = {f"prompt {number}": text for number, text in enumerate(prompts or [], 1)} or {"stdin": _read_prompt()}
    for name, text in texts.items():
        if any("\ud800" <= character <= "\udfff" for character in text):  # how Python represents undecodable bytes
            raise DataError(Problem(Code.USAGE_BAD_VALUE, "not UTF-8", name, fix="give the prompt as text"))
    return [*texts.values()]


def _stdin(what: str) -> TextIO:
    """Returns stdin; on a terminal, asks the user to type. what: the expected input."""
    if sys.stdin.isatty():
        print(f"type {what}, and end with Ctrl-D", file=sys.stderr)
    return sys.stdin


def _read_prompt() -> str:
    """All of stdin as one prompt. Raises DataError: it is empty."""
    text = "" if sys.stdin.closed else _stdin("one prompt").read()
    if not text.strip():
        fix = "give one as an argument, with --input, or on stdin"
        raise DataError(Problem(Code.USAGE_NO_PROMPT, "there is no prompt", fix=fix))
    return text.rstrip("\n")


def _print_answers(answers: "Iterable[Answer]", *, base: bool, streamed: bool) -> None:
    """Print answers as soon as they are available. streamed: they were already printed, token by token."""
    from loratune.cli import display

    for answer in answers:
        if base:
            print(*display.both_answers(answer), sep="\n", flush=True)
        elif not streamed:
            print(answer.completion, file=raw_output(), flush=True)
