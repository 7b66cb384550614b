"""`loratune merge`: what makes something else of an adapter."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from loratune.cli.application import Debug, Force, Json, app, check_paths, importing
from loratune.cli.boundary import boundary, checked_output


class Dtype(StrEnum):
    """The dtypes of a merged model."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


@app.command()
def merge(
    adapter: Annotated[Path, typer.Option("--adapter", metavar="DIR", help="The adapter directory.")],
    out: Annotated[Path, typer.Option("--output", metavar="DIR", help="The directory of the merged model.")],
    dtype: Annotated[Dtype | None, typer.Option(help="Dtype of the merged model; by default that of the base.")] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", metavar="FILE", help="Rows for the verification; by default prompts recorded by training."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export at --output.")] = False,
    as_json: Json = False,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Merge an adapter into its base. The merged model is verified against the adapter and the base."""
    with boundary(debug, memory_fix="free memory, or merge on a larger machine"):
        check_paths(adapter=adapter, output=out, data=data)
        with importing():
            from loratune.adapter.directory import AdapterDirectory
            from loratune.config import Source
            from loratune.data import read_source
            from loratune.export import output
            from loratune.model.source import local_or_hub

        info = AdapterDirectory.open(adapter, forced=force)
        inputs = {"--adapter": adapter, "the base": Path(local_or_hub(info.base.name_or_path))}
        inputs |= {"--data": Path(data)} if data is not None else {}
        directory = output.check(out, overwrite=overwrite, inputs=inputs)
        split = read_source(Source(path=data), info.data) if data is not None else None

        with importing():
            from loratune.cli import printing
            from loratune.commands.merge import merge

        chosen = dtype.value if dtype else None
        merged = merge(
            info,
            directory,
            split,
            dtype=chosen,
        )
        with checked_output():
            printing.print_merged(merged, as_json)
