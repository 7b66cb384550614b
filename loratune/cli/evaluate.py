"""`loratune evaluate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loratune.cli.application import MAX_COUNT, Assignments, Debug, Force, Json, app, check_paths, importing, log_all
from loratune.codes import Code
from loratune.commands.boundary import boundary
from loratune.console import EscapedStream
from loratune.errors import ConfigError, Problem

if TYPE_CHECKING:
    from loratune.commands.output_file import Output
    from loratune.data import DatasetSplit
    from loratune.evaluation.results import Evaluation


@app.command()
def evaluate(
    adapter: Annotated[Path, typer.Option("--adapter", metavar="DIR", help="The adapter directory.")],
    data: Annotated[str, typer.Option("--data", metavar="FILE", help="Held-out rows, in the format of training.")],
    against: Annotated[
        Path | None, typer.Option("--against", metavar="DIR", help="Compare with this adapter, not with the base.")
    ] = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option("--metric", metavar="NAME", help="exact_match, label, contains, rouge_l, json or regex:PATTERN."),
    ] = None,
    forgetting: Annotated[
        str | None,
        typer.Option("--forgetting", metavar="FILE", help="Unrelated text that should not get worse, or `builtin`."),
    ] = None,
    worst: Annotated[
        int, typer.Option("--worst", metavar="N", min=0, max=MAX_COUNT, help="Show the N rows that got worse most.")
    ] = 0,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="Write rows, answers and scores as JSONL to FILE.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file that --output names.")] = False,
    assignments: Assignments = [],  # noqa: B006  typer copies it
    as_json: Json = False,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Score base and adapter on the same held-out rows."""
    with boundary(debug, memory_fix="free memory, or shorten the rows with --set data.max_length"):
        check_paths(adapter=adapter, data=data, against=against, forgetting=forgetting, output=output)
        if overwrite and output is None:
            raise ConfigError(Problem(Code.USAGE_NEEDS_OPTION, "only works with --output", key="--overwrite"))
        with importing():
            from loratune.commands import output_file
            from loratune.config import Source
            from loratune.console import log, show_count, show_progress
            from loratune.data import read_source
            from loratune.evaluation import metrics as known_metrics
            from loratune.training import preflight

        parsed = known_metrics.parse(metrics or [])
        inputs = [Path(path) for path in (adapter, data, against, forgetting) if path is not None]
        file = output_file.output(output, "--output", overwrite=overwrite, inputs=inputs) if output else None
        info = preflight.open_adapter(adapter, log, forced=force, assignments=assignments)
        other = preflight.open_adapter(against, log, forced=force) if against is not None else None
        if file is not None:
            file = file.reading(Path(info.base.name_or_path))
        split = read_source(Source(path=data), info.data, show_progress)
        unrelated = _unrelated_text(forgetting, info.data.max_length) if forgetting is not None else None

        with importing():
            from loratune.commands import printing
            from loratune.commands.evaluate import evaluate
            from loratune.evaluation.scoring import Judging

        found = evaluate(
            info, split, against=other, judging=Judging(parsed, file is not None), forgetting=unrelated,
            watch=show_progress, count=show_count, log=log,
        )  # fmt: skip
        log_all(found.remarks)
        if file is not None:
            _write_rows(found, file)
        printing.print_evaluation(found, worst, as_json)


def _unrelated_text(name: str, max_length: int) -> "DatasetSplit":
    """The rows of a file, or of the text that comes with loratune, in whatever format they are."""
    from loratune import data, evaluation
    from loratune.config import DataSection, Source

    path = str(Path(evaluation.__file__).parent / "unrelated.txt") if name == "builtin" else name
    source = Source(path=path)
    return data.read_source(source, DataSection(train=source, max_length=max_length))


def _write_rows(found: "Evaluation", file: "Output") -> None:
    """Write a line for each distinct row."""
    from loratune.console import log
    from loratune.data.sources.rows import to_json_line

    with file.opened(log) as writable:
        stream = EscapedStream(writable) if writable.isatty() else writable
        for row in found.rows:
            print(to_json_line(row.as_json()), file=stream)
