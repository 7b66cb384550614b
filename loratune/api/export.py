"""The verb `export` of one or several adapters."""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import loratune
from loratune.api import Client, MergedType, Rows, StrPath, computing, libraries
from loratune.api.rows import source_of
from loratune.codes import Code
from loratune.config.arguments import checked
from loratune.errors import ConfigError, LoratuneError, Problem
from loratune.events import Listener, listening

if TYPE_CHECKING:
    from loratune.export.export import Exported


@checked
def export(
    adapters: "loratune.Adapter | loratune.Adapters",
    to: Client,
    output: StrPath,
    *,
    merged: MergedType | None = None,
    llama_cpp: StrPath | None = None,
    base_gguf: StrPath | None = None,
    verify: bool | None = None,
    vllm_python: StrPath | None = None,
    rows: Rows | None = None,
    overwrite: bool = False,
    on_event: Listener | None = None,
) -> "Exported":
    """Write the adapter, or the weighted sum, for another program, read it back, and compare.

    Args:
        to: The target program.
        output: The directory.
        merged: For gguf and ollama: write the merged model in this type, instead of the adapter alone.
        llama_cpp: A checkout of llama.cpp, for its converters.
        base_gguf: A GGUF file of the base, whose tokenizer is used.
        verify: Run the export in the target program and compare; by default if the program is installed.
        vllm_python: The Python of an environment with vLLM; by default this one, if it has vLLM.
        rows: Rows to compare on; by default prompts recorded in training.
        overwrite: Replace an earlier export at `output`.
        on_event: Receives events.

    Raises:
        AdapterError: The program cannot read the adapter, or its results differ.
        ConfigError, ModelError, DataError, ResourceError: Output, base or rows cannot be used.
    """
    from loratune.adapter.clients import ExportOptions

    with listening(on_event), TemporaryDirectory() as place:
        named = (Path(path) if path else None for path in (llama_cpp, base_gguf, vllm_python))
        converters, tokenizer, python = named
        options = ExportOptions(to, merged, converters, tokenizer, verify, python)
        opened, weights = adapters.opened, adapters.opened.selection.mix
        if len(opened.selection.directories) > 1 and not weights:
            what, fix = "several adapters are exported as one, their sum", "give weights: `mix='sql:0.7,tone:0.3'`"
            raise ConfigError(Problem(Code.USAGE_CONFLICT, what, key="mix", fix=fix))
        files = {"llama_cpp": converters, "base_gguf": tokenizer}
        directory = opened.output_directory(output, rows, overwrite=overwrite, **files)
        with libraries():
            from loratune import data
            from loratune.adapter import loading
            from loratune.export import export as exporting

        source = opened.first
        split = data.read_source(source_of(rows), source.data) if rows is not None else None
        made_of = {"mix": dict(weights), "adapter_scale": opened.scale}
        with computing():
            if not weights:
                return exporting.export(source, directory, options, made_of, split=split)
            weighted = [(opened.directories[name], weight) for name, weight in weights.items()]
            try:
                mixture = loading.write_mixture(Path(place), weighted)
                return exporting.export(mixture, directory, options, made_of, split=split)
            except LoratuneError as error:
                mix = f"`mix='{','.join(f'{name}:{weight:g}' for name, weight in weights.items())}'`"
                problems = [_of_mixture(problem, place, mix, source.path) for problem in error.problems]
                raise type(error)(problems) from None


def _of_mixture(problem: Problem, place: str, named: str, first: Path) -> Problem:
    """A problem of the sum of adapters, which is in the directory `place`, in terms of what the user has named."""
    where = named if problem.where.startswith(place) else problem.where
    what, fix = problem.what.replace(place, named), problem.fix.replace(place, str(first))
    return replace(problem, where=where, what=what, fix=fix)
