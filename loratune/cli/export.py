"""`loratune export`: options and output."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from loratune.adapter import selection
from loratune.cli.application import Debug, Force, Json, app, check_paths, importing
from loratune.cli.boundary import boundary, checked_output
from loratune.codes import Code
from loratune.errors import ConfigError, Problem
from loratune.export.clients import ExportOptions


@app.command()
def export(
    adapters: Annotated[
        list[str], typer.Option("--adapter", metavar="[NAME=]DIR", help="The adapter directory; several with --mix.")
    ],
    to: Annotated[str, typer.Option("--to", metavar="CLIENT", help="peft, vllm, gguf or ollama.")],
    output: Annotated[Path, typer.Option("--output", metavar="OUT", help="The directory to write.")],
    merged: Annotated[
        str | None, typer.Option("--merged", metavar="TYPE", help="Export the merged model, as f32, f16, bf16 or q8_0.")
    ] = None,
    llama_cpp: Annotated[
        Path | None, typer.Option("--llama-cpp", metavar="DIR", help="A checkout of llama.cpp, for its converters.")
    ] = None,
    base_gguf: Annotated[
        Path | None,
        typer.Option(
            "--base-gguf",
            metavar="FILE",
            help="A GGUF file of the base, to verify with; --merged copies its tokenizer.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", metavar="FILE", help="Rows for the verification, in the same format as the training rows."
        ),
    ] = None,
    mix: Annotated[
        str | None, typer.Option("--mix", metavar="NAME:WEIGHT,...", help="Export the weighted sum of adapters.")
    ] = None,
    verify: Annotated[
        bool | None,
        typer.Option("--verify/--no-verify", help="Verify the export in its program; by default if that is installed."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export at OUT.")] = False,
    as_json: Json = False,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Export an adapter for vLLM, llama.cpp, Ollama or PEFT. The export is verified."""
    with boundary(debug):
        check_paths(output=output, data=data, **{"llama-cpp": llama_cpp, "base-gguf": base_gguf})
        options = ExportOptions(to, merged, llama_cpp, base_gguf, verify)
        selected = selection.parse(adapters, mix=mix)
        if len(selected.directories) > 1 and not selected.mix:
            what, fix = "several adapters are exported as one, their sum", "give weights, like --mix sql:0.7,tone:0.3"
            raise ConfigError(Problem(Code.USAGE_CONFLICT, what, key="--mix", fix=fix))
        with importing(computes=True):
            from loratune.adapter.directory import AdapterDirectory
            from loratune.config import Source
            from loratune.data import read_source
            from loratune.export import output as outputs
            from loratune.model.source import local_or_hub

        given = {"--llama-cpp": llama_cpp, "--base-gguf": base_gguf, "--data": data and Path(data)}
        inputs = {option: path for option, path in given.items() if path}
        opened = {name: AdapterDirectory.open(path, forced=force) for name, path in selected.directories.items()}
        for name, one in opened.items():
            inputs[f"--adapter {name}".strip()] = one.path
            inputs[f"the base of {name}" if name else "the base"] = Path(local_or_hub(one.base.name_or_path))
        directory = outputs.check(output, overwrite=overwrite, inputs=inputs)
        source = next(iter(opened.values()))
        split = read_source(Source(path=data), source.data) if data else None

        with importing():
            from loratune.adapter import loading
            from loratune.cli import printing
            from loratune.commands.export import export

        with TemporaryDirectory() as place:
            if selected.mix:
                weighted = [(opened[name], weight) for name, weight in selected.mix.items()]
                source = loading.write_mixture(Path(place), weighted)
            result = export(source, directory, options, mix=selected.mix, split=split)
        with checked_output():
            printing.print_exported(result, as_json)
