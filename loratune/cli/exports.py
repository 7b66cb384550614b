"""The commands `export`, `merge` and `push`, which write output for other programs and the hub."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from loratune.api import Client, MergedDtype, MergedType
from loratune.cli.application import (
    AdapterPath,
    AdapterScale,
    DataAssignments,
    Debug,
    Force,
    Json,
    app,
    check_paths,
    show,
)
from loratune.cli.boundary import boundary, stop_error
from loratune.console import log

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export at --output.")]
Data = Annotated[
    str | None,
    typer.Option("--data", metavar="FILE", help="Rows for the verification; by default prompts recorded by training."),
]


@app.command()
def export(
    adapters: Annotated[
        list[str],
        typer.Option("--adapter", metavar="[NAME=]DIR", help="The adapter directory; for --mix, repeat with names."),
    ],
    to: Annotated[Client, typer.Option("--to", metavar="CLIENT", help="peft, vllm, sglang, gguf or ollama.")],
    output: Annotated[Path, typer.Option("--output", metavar="OUT", help="The directory to write.")],
    merged: Annotated[
        MergedType | None,
        typer.Option("--merged", metavar="TYPE", help="Export the merged model, as f32, f16, bf16 or q8_0."),
    ] = None,
    llama_cpp: Annotated[
        Path | None, typer.Option("--llama-cpp", metavar="DIR", help="A checkout of llama.cpp, for its converters.")
    ] = None,
    base_gguf: Annotated[
        Path | None,
        typer.Option(
            "--base-gguf",
            metavar="FILE",
            help="A GGUF file of the base, for the verification; --merged copies its tokenizer.",
        ),
    ] = None,
    rows: Data = None,
    mix: Annotated[
        str | None, typer.Option("--mix", metavar="NAME:WEIGHT,...", help="Export the weighted sum of adapters.")
    ] = None,
    verify: Annotated[
        bool | None,
        typer.Option(
            "--verify/--no-verify", help="Verify the export in the target program; by default if it is installed."
        ),
    ] = None,
    vllm_python: Annotated[
        Path | None,
        typer.Option("--vllm-python", metavar="FILE", help="The Python of an environment with vLLM, for --verify."),
    ] = None,
    scale: AdapterScale = 1.0,
    overrides: DataAssignments = [],  # noqa: B006  typer copies it
    overwrite: Overwrite = False,
    as_json: Json = False,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Export an adapter for vLLM, SGLang, llama.cpp, Ollama or PEFT. The export is verified."""
    with boundary(debug):
        check_paths(output=output, rows=rows, llama_cpp=llama_cpp, base_gguf=base_gguf, vllm_python=vllm_python)

        import loratune

        result = loratune.Adapters(adapters, mix=mix, scale=scale, force=force, overrides=overrides).export(
            to, output, merged=merged, llama_cpp=llama_cpp, base_gguf=base_gguf, verify=verify,
            vllm_python=vllm_python, rows=rows, overwrite=overwrite,
        )  # fmt: skip

        from loratune.cli import display

        show(display.exported(result), result.to_dict())


@app.command()
def merge(
    adapter: AdapterPath,
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="The directory of the merged model.")],
    dtype: Annotated[
        MergedDtype | None, typer.Option(help="Dtype of the merged model; by default that of the base.")
    ] = None,
    rows: Data = None,
    scale: AdapterScale = 1.0,
    overwrite: Overwrite = False,
    as_json: Json = False,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Merge an adapter into its base. The merged model is verified against the adapter and the base."""
    with boundary(debug, memory_fix="free memory, or merge on a larger machine"):
        check_paths(adapter=adapter, output=output, rows=rows)

        import loratune

        result = loratune.Adapter(adapter, scale=scale, force=force).merge(
            output, dtype=dtype, rows=rows, overwrite=overwrite
        )

        from loratune.cli import display

        log(*display.merged_notes(result))
        show(display.merged(result), result.to_dict())


@app.command()
def push(
    repository: Annotated[str, typer.Argument(metavar="USER/NAME", help="The repository on the hub.")],
    adapter: AdapterPath,
    public: Annotated[
        bool, typer.Option("--public", help="Make the repository public; by default it is private.")
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="USER/MODEL",
            help="The name of the base on the hub; required if the base is a local path.",
        ),
    ] = None,
    with_system: Annotated[
        bool, typer.Option("--with-system", help="Also upload the system message that all training rows had.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Upload an adapter to the hub. The upload is one commit without local paths, and is verified."""
    with boundary(debug):
        check_paths(adapter=adapter)
        from huggingface_hub import utils as bars

        from loratune.api.push import push

        silenced = not sys.stderr.isatty() and not bars.are_progress_bars_disabled()  # type: ignore[attr-defined]
        if silenced:
            bars.disable_progress_bars()  # type: ignore[attr-defined]
        try:
            upload = push(adapter, repository, public=public, base=base, with_system=with_system)
        except KeyboardInterrupt as stop:
            fix = "the repository holds the whole adapter or nothing of it; the same command completes it"
            raise stop_error(stop, fix) from None
        finally:
            if silenced:
                bars.enable_progress_bars()  # type: ignore[attr-defined]

        from loratune.cli import display

        show(display.upload(upload), upload.to_dict())
