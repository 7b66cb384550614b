"""Several adapters on one base: what it costs to switch, and tokens per second of a batch over all of them.

    python scripts/measure_adapters.py models/SmolLM2-135M-Instruct

makes adapters of random weights. A switch is all that stands between an answer with one adapter and the first token
with another: the layers of the other one take their places. The rates are those of the same batch of prompts: all with
one adapter; spread over all adapters; spread, and computed by PEFT (`adapter_names`); spread, one adapter after the
other. Each round runs them there and back; the medians of the rounds' ratios are printed, and their range. With
--cpu-time the seconds are those of the processor, for a machine on which other programs run.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import GenerationConfig

from loratune.adapter import generation, loading
from loratune.adapter.directory import AdapterDirectory
from loratune.config import LoraSection, ModelSection
from loratune.data.packing import pad
from loratune.lora import attach
from loratune.lora.tensors import weights
from loratune.model.load import load_base, load_tokenizer

PROMPT = "Question number {}: what is the capital of a country whose name begins with the letter {}?"


def main(
    model: Annotated[Path, typer.Argument(help="A base model.")],
    adapters: int = 4,
    rank: int = 16,
    batch: int = 32,
    new_tokens: int = 48,
    rounds: int = 3,
    cpu_time: bool = False,
) -> None:
    """Measure, and print a line per round."""
    with tempfile.TemporaryDirectory() as folder:
        section = ModelSection(name_or_path=str(model.resolve()))
        directories = [_random_adapter(section, Path(folder) / str(seed), rank, seed) for seed in range(adapters)]
        loaded = loading.load_all([AdapterDirectory.open(directory) for directory in directories])
    assert all(adapter.mixes for adapter in loaded)
    switches = [_switch(loaded[number % adapters]) for number in range(8 * adapters)]
    median, most = 1e3 * statistics.median(switches), 1e3 * max(switches)
    print(f"switch: median {median:.2f} ms, {1e3 * min(switches):.2f} to {most:.2f}, over {len(switches)}", flush=True)

    tokenizer = load_tokenizer(section)
    ids = [tokenizer(PROMPT.format(number, "ABCDEFGH"[number % 8]))["input_ids"] for number in range(batch)]
    spread = [loaded[number % adapters] for number in range(batch)]
    runs: dict[str, Callable[[], None]] = {
        "one adapter": partial(_answer, [loaded[0]] * batch, ids, new_tokens),
        "spread": partial(_answer, spread, ids, new_tokens),
        "spread, by PEFT": partial(_answer_by_peft, spread, ids, new_tokens),
        "one after the other": partial(_one_after_the_other, spread, ids, new_tokens),
    }
    ratios: dict[str, list[float]] = {}
    for number in range(rounds):
        rates = _round(runs, batch * new_tokens, time.process_time if cpu_time else time.monotonic)
        print(
            f"round {number + 1}: " + ", ".join(f"{name} {rate:.1f}" for name, rate in rates.items()) + " tokens/s",
            flush=True,
        )
        for name in list(rates)[1:]:
            ratios.setdefault(f"{name} / one adapter", []).append(rates[name] / rates["one adapter"])
    for name, values in ratios.items():
        print(f"{name}: {statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})")


def _random_adapter(section: ModelSection, directory: Path, rank: int, seed: int) -> Path:
    """Write an adapter of all linear layers whose B is random too."""
    lora = LoraSection(r=rank, target_modules="all-linear")
    model, _ = attach.adapt(load_base(section), lora, seed=seed, origin=(section.name_or_path, None))
    for name, tensor in weights(model).items():
        if "lora_B" in name:
            tensor.normal_(std=1e-3)
    attach.write(model, directory, weights(model))
    return directory


@torch.inference_mode()
def _switch(adapter: generation.LoadedAdapter) -> float:
    """Seconds to be ready for an adapter after another one."""
    start = time.perf_counter()
    with generation.adapters_of_rows([adapter]):
        return time.perf_counter() - start


def _settings(new_tokens: int) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0)


def _answer(adapters: Sequence[generation.LoadedAdapter], ids: Sequence[list[int]], new_tokens: int) -> None:
    model: Any = adapters[0].model
    with generation.adapters_of_rows(adapters):
        model.generate(**pad([{"input_ids": one} for one in ids], 0, "left"), generation_config=_settings(new_tokens))


def _answer_by_peft(adapters: Sequence[generation.LoadedAdapter], ids: Sequence[list[int]], new_tokens: int) -> None:
    model: Any = adapters[0].model
    model.generate(
        **pad([{"input_ids": one} for one in ids], 0, "left"),
        generation_config=_settings(new_tokens),
        adapter_names=[adapter.key for adapter in adapters],
    )


def _one_after_the_other(
    adapters: Sequence[generation.LoadedAdapter], ids: Sequence[list[int]], new_tokens: int
) -> None:
    for adapter in dict.fromkeys(adapter.key for adapter in adapters):
        numbers = [number for number, other in enumerate(adapters) if other.key == adapter]
        _answer([adapters[number] for number in numbers], [ids[number] for number in numbers], new_tokens)


@torch.inference_mode()
def _round(runs: dict[str, Callable[[], None]], tokens: int, clock: Callable[[], float]) -> dict[str, float]:
    """Tokens per second of each, there and back."""
    seconds = dict.fromkeys(runs, 0.0)
    for name in [*runs, *reversed(runs)]:
        start = clock()
        runs[name]()
        seconds[name] += clock() - start
    return {name: 2 * tokens / seconds[name] for name in runs}


if __name__ == "__main__":
    typer.run(main)
