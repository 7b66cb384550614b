"""`loratune generate`."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from loratune.cli.application import (
    STDOUT,
    Adapters,
    Debug,
    Force,
    MaxNewTokens,
    Temperature,
    app,
    check_paths,
    importing,
    rows_output,
    write_rows,
)
from loratune.cli.boundary import boundary
from loratune.codes import Code
from loratune.console import log, print_raw
from loratune.errors import ConfigError, DataError, Problem

if TYPE_CHECKING:
    from loratune.commands.generate import Answer


@app.command()
def generate(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT", help="Prompts to complete; by default stdin is one prompt.")
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
    source: Annotated[
        Path | None,
        typer.Option("--input", metavar="FILE", help="A file of rows with prompts or messages; - is JSONL on stdin."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", metavar="FILE", help="Write rows to FILE: CSV if it ends in .csv, else JSONL; - is stdout."
        ),
    ] = None,
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
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file that --output names.")] = False,
    base: Annotated[bool, typer.Option("--base", help="Also print the base model's answer.")] = False,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Complete prompts with one or several adapters of a base."""
    with boundary(debug, memory_fix="free memory, lower --max-new-tokens, or give fewer prompts at once"):
        check_paths(input=source, output=output)
        _check_answers(prompts, source, output, overwrite=overwrite)

        from loratune.adapter import selection
        from loratune.adapter.sampling import Sampling

        sampling = Sampling(temperature, top_p, top_k, seed, tuple(stop))
        sampling.check("--")

        selected = selection.parse(adapters, use, mix)
        inputs = (*selected.directories.values(), *([source] if source and str(source) != STDOUT else []))
        file = rows_output(output, overwrite=overwrite, inputs=inputs)

        rows = _prompt_rows(prompts, source)

        with importing(computes=True):
            from loratune.adapter.directory import AdapterDirectory

        opened = {name: AdapterDirectory.open(path, forced=force) for name, path in selected.directories.items()}
        if file is not None:
            file = file.reading(*(Path(adapter.base.name_or_path) for adapter in opened.values()))

        with importing():
            from loratune.commands.generate import generate

        stream = len(rows) == 1 and output is None and not base and not stop and sys.stdout.isatty()
        answers = generate(
            opened, selected, rows, max_new_tokens=max_new_tokens, sampling=sampling, base=base, stream=stream,
            shows_progress=output is not None or not sys.stdout.isatty(),
        )  # fmt: skip
        if output is not None:
            write_rows(map(_as_row, answers), file)
        else:
            _print_answers(answers, base=base, streamed=stream)


def _prompt_rows(prompts: list[str] | None, source: Path | None) -> list[Any]:
    """The prompts as rows; they come from arguments, a file, or stdin as a whole."""
    from loratune.config import Source
    from loratune.data import sources
    from loratune.data.sources.rows import Row

    if source is not None and str(source) == STDOUT:
        return sources.read_rows(Source(path="stdin"), _stdin("rows as JSON, one a line").buffer)
    if source is not None:
        named = Source(path=str(source))
        rows = sources.read_rows(named)
        if line := sources.left_out(named):
            log(line)
        return rows
    texts = {f"prompt {number}": prompt for number, prompt in enumerate(prompts or [], start=1)} or {
        "stdin": _read_prompt()
    }
    for name, prompt in texts.items():
        if any("\ud800" <= character <= "\udfff" for character in prompt):  # how Python represents undecodable bytes
            raise DataError(Problem(Code.USAGE_BAD_VALUE, "not UTF-8", name, fix="give the prompt as text"))
    return [Row(name, {"prompt": prompt}) for name, prompt in texts.items()]


def _stdin(what: str) -> TextIO:
    """Returns stdin; who is at a terminal is asked to type. what: that which is read."""
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


def _check_answers(prompts: list[str] | None, source: Path | None, output: Path | None, *, overwrite: bool) -> None:
    """Raises ConfigError: options of `generate` that do not go together."""
    if prompts and source:
        raise ConfigError(Problem(Code.USAGE_CONFLICT, "give prompts or --input, not both"))
    if overwrite and output is None:
        raise ConfigError(Problem(Code.USAGE_CONFLICT, "only works with --output", key="--overwrite"))


def _print_answers(answers: Iterable["Answer"], *, base: bool, streamed: bool) -> None:
    """Print answers as soon as they are there. streamed: they have been printed already, token by token."""
    for answer in answers:
        if base:
            print(f"{answer.prompt}\n  base     {_one_line(answer.base)}")
            print(f"  {answer.adapter:<7}  {_one_line(answer.completion)}", flush=True)
        elif not streamed:
            print_raw(answer.completion)


def _as_row(answer: "Answer") -> dict[str, Any]:
    """The row with its answer as `completion`, and as `base` that of the base."""
    from loratune.system.records import with_own_fields

    found = {"completion": answer.completion} | ({"base": answer.base} if answer.base is not None else {})
    return with_own_fields(answer.row.values, found)


def _one_line(text: str | None) -> str:
    text = text or ""
    return " ↵ ".join(line.strip() for line in text.strip().splitlines() if line.strip())
