"""`loratune export`: what makes something of an adapter for other programs."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from loratune.adapter import selection
from loratune.cli.application import Debug, Force, Json, app, check_paths, importing
from loratune.codes import Code
from loratune.commands.boundary import boundary, checked_output
from loratune.errors import ConfigError, Problem, missing_package

_CLIENTS = ("peft", "vllm", "gguf", "ollama")
_OF_LLAMA_CPP = ("gguf", "ollama")
_TYPES = ("f32", "f16", "bf16", "q8_0")


@app.command()
def export(
    adapters: Annotated[
        list[str], typer.Option("--adapter", metavar="[NAME=]DIR", help="The adapter directory; several with --mix.")
    ],
    to: Annotated[str, typer.Option("--to", metavar="CLIENT", help="peft, vllm, gguf or ollama.")],
    output: Annotated[Path, typer.Option("--output", metavar="OUT", help="The directory to write.")],
    merged: Annotated[
        str | None, typer.Option("--merged", metavar="TYPE", help="One file of base and adapter: f32, f16, bf16, q8_0.")
    ] = None,
    llama_cpp: Annotated[
        Path | None, typer.Option("--llama-cpp", metavar="DIR", help="A checkout of llama.cpp, for its converters.")
    ] = None,
    base_gguf: Annotated[
        Path | None, typer.Option("--base-gguf", metavar="FILE", help="A GGUF file of the base: its tokenizer is used.")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="FILE", help="Rows to compare on, in the format of training.")
    ] = None,
    mix: Annotated[
        str | None, typer.Option("--mix", metavar="NAME:WEIGHT,...", help="Export the weighted sum of adapters.")
    ] = None,
    verify: Annotated[
        bool | None,
        typer.Option("--verify/--no-verify", help="Compare it in its client; where that is installed, if not given."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export at OUT.")] = False,
    as_json: Json = False,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Write an adapter for vLLM, llama.cpp, Ollama or PEFT. It is read back as they do, and compared."""
    with boundary(debug):
        check_paths(output=output, data=data, **{"llama-cpp": llama_cpp, "base-gguf": base_gguf})
        _check_client(to, merged, llama_cpp, base_gguf)
        verify = _verifies(to, verify)
        selected = selection.parse(adapters, mix=mix)
        _check_number(selected)
        with importing(computes=True):
            from loratune.adapter.directory import AdapterDirectory
            from loratune.config import Source
            from loratune.console import log, show_progress
            from loratune.data import read_source
            from loratune.export import output as outputs
            from loratune.model.source import local_or_hub

        inputs = {f"--adapter {name}".strip(): path for name, path in selected.directories.items()}
        options = {"--llama-cpp": llama_cpp, "--base-gguf": base_gguf, "--data": data and Path(data)}
        inputs |= {option: path for option, path in options.items() if path}
        opened = {name: AdapterDirectory.open(path, log, forced=force) for name, path in selected.directories.items()}
        for name, one in opened.items():
            inputs[f"the base of {name}" if name else "the base"] = Path(local_or_hub(one.base.name_or_path))
        directory = outputs.check(output, overwrite=overwrite, inputs=inputs)
        info = next(iter(opened.values()))
        split = read_source(Source(path=data), info.data, show_progress) if data else None

        with importing():
            from loratune.adapter import loading
            from loratune.commands import clients, printing
            from loratune.commands.export import export
            from loratune.commands.export_request import ExportRequest

        called = clients.name_of(directory.output.name)
        request = ExportRequest(to, called, merged, llama_cpp, base_gguf, selected.mix, verify)
        with TemporaryDirectory() as place:
            if selected.mix:
                weighted = [(opened[name], weight) for name, weight in selected.mix.items()]
                info = loading.write_mixture(Path(place), weighted)
            result = export(info, directory, request, split, show_progress, log)
        with checked_output():
            printing.print_exported(result, as_json)


def _check_number(selected: selection.Selection) -> None:
    """Raises ConfigError: there are several adapters, and no weights."""
    if len(selected.directories) > 1 and not selected.mix:
        what, fix = "several adapters are exported as one, their sum", "give weights, like --mix sql:0.7,tone:0.3"
        raise ConfigError(Problem(Code.USAGE_NEEDS_OPTION, what, key="--mix", fix=fix))


def _verifies(to: str, wanted: bool | None) -> bool:
    """Whether the export is compared in its client. Raises ConfigError: that is wanted, and it is not installed."""
    from loratune.export import llama_cpp

    can = to not in _OF_LLAMA_CPP or llama_cpp.is_installed()
    if wanted and not can:
        code = Code.USAGE_MISSING_PACKAGE
        raise ConfigError(missing_package(code, llama_cpp.PACKAGE, "runs llama.cpp", "llama-cpp", key="--verify"))
    return can if wanted is None else wanted


def _check_client(to: str, merged: str | None, llama_cpp: Path | None, base_gguf: Path | None) -> None:
    """Raises ConfigError: there is no such client or type, or an option is of no use for it."""
    for option, value, choices in (("--to", to, _CLIENTS), ("--merged", merged, _TYPES)):
        if value not in (None, *choices):
            what, fix = f"{value} is not one of its values", f"choose {', '.join(choices)}"
            raise ConfigError(Problem(Code.USAGE_OUT_OF_RANGE, what, key=option, fix=fix))
    given = {"--merged": merged, "--llama-cpp": llama_cpp, "--base-gguf": base_gguf}
    what = "only works with --to gguf and --to ollama"
    if to not in _OF_LLAMA_CPP and (wrong := [option for option, value in given.items() if value is not None]):
        raise ConfigError([Problem(Code.USAGE_NEEDS_OPTION, what, key=option) for option in wrong])
