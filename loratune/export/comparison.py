"""Compares an export with its adapter: weights, logits on texts, and answers to prompts.

For PEFT and vLLM the output is a plain LoRA directory with one scale: older releases of vLLM, and llama.cpp,
ignore `rank_pattern`, `alpha_pattern` and `use_rslora` without a warning.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch

from loratune import data
from loratune.adapter import card
from loratune.adapter.clients import CLIENTS
from loratune.adapter.directory import AdapterDirectory
from loratune.adapter.generation import LoadedAdapter
from loratune.codes import Code
from loratune.config.template_arguments import FIELD, problem
from loratune.data import DatasetSplit
from loratune.data.rendering import Renderer
from loratune.errors import AdapterError, Problem
from loratune.events import progress
from loratune.export import experts
from loratune.export.answers import ScoredAnswer
from loratune.export.experts import Placement
from loratune.lora import merging, tensors
from loratune.lora.adapter_config import factors_in
from loratune.lora.adapter_files import RECORD_FILE, WEIGHTS_FILE, AdapterFiles
from loratune.lora.merging import PlainAdapter
from loratune.lora.module_names import endings, join_first
from loratune.lora.tensors import PARAMETERS, read_adapter, read_weights
from loratune.text import plural

MOST_TEXTS = 32
"""The most rows of a file, or recorded prompts, that are used for the comparison."""
FIXED = (
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Q: What is the largest planet of the solar system?\nA:",
    "Once upon a time, in a small village by the sea, there lived",
    "1, 1, 2, 3, 5, 8, 13,",
    "Translate to German: Good morning, how are you?",
    "The opposite of cold is",
    "Water boils at a temperature of",
    "Write a haiku about the moon.",
    "SELECT name FROM users WHERE",
    "The three primary colours are",
    "Why is the sky blue?",
)
"""Texts for adapters whose training rows are not known."""

_AT_ONCE = 64
"""Positions whose logits are in memory in float64, with what is computed of them."""
_BATCH_TOKENS = 2048
"""The most tokens of a batch of prompts and answers, with padding."""
_LONGEST_ANSWER = 16
"""The maximum number of tokens of a scored answer."""

Row = Mapping[str, Any]
"""A prompt as `card.recorded_prompts` makes it: `prompt`, `messages` (with `tools`), or `input_ids`."""


@dataclass(frozen=True)
class Texts:
    """The texts of a comparison.

    Attributes:
        origin: Where the texts come from, for the user.
        ids: The token ids of each text.
        complete: Whether the texts include answers; otherwise each is a prompt.
    """

    origin: str
    ids: tuple[tuple[int, ...], ...]
    complete: bool


def texts(
    source: AdapterDirectory, renderer: Renderer, vocabulary_size: int, split: DatasetSplit | None = None
) -> Texts:
    """The rows of a file; otherwise the prompts recorded by training; otherwise fixed texts.

    Args:
        source: The adapter.
        renderer: Renders its rows.
        vocabulary_size: The vocabulary size of the model.
        split: The rows of the file that the user named.

    Raises:
        DataError: Rows of the file cannot be used.
        AdapterError: The recorded prompts are not valid.
    """
    if split is not None:
        rows = data.prepare(split, renderer, source.data, vocabulary_size).rows
        ids = tuple(tuple(row.ids) for row in islice(rows.rows(), MOST_TEXTS))
        names = [Path(file.source.name).name for file in split.files]  # no paths: the record is published
        files = names[0] if len(names) == 1 else plural(len(names), "file")
        return Texts(f"{plural(len(ids), 'row')} of {files}", ids, complete=True)
    if prompts := tuple(ids for _, ids in _recorded(source, renderer, vocabulary_size)):
        return Texts(f"{plural(len(prompts), 'prompt')} of the training rows", prompts, complete=False)
    fixed = tuple(renderer.prompt(text, "") for text in FIXED)
    return Texts(f"{len(fixed)} fixed texts", fixed, complete=False)


@torch.inference_mode()
def logits(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """The logits of a text, of shape (tokens, vocabulary), in float32 on the CPU."""
    row = torch.tensor([[*ids]], device=model.device)
    result: torch.Tensor = model(input_ids=row, use_cache=False).logits[0].float().cpu()
    return result


def answered(loaded: LoadedAdapter, prompts: Sequence[Sequence[int]], most: int) -> list[list[int]]:
    """The adapter's answers of at most `most` tokens, in batches of limited memory; a long prompt is one by itself."""
    answers, batch = list[list[int]](), list[Sequence[int]]()
    for number, prompt in enumerate(prompts):
        batch.append(prompt)
        following = prompts[number + 1 : number + 2]
        if not following or (len(batch) + 1) * (max(map(len, [*batch, *following])) + most) > _BATCH_TOKENS:
            answers += loaded.complete(batch, most)
            batch = []
    return answers


def shortened(ids: Iterable[list[int]], most: int) -> Iterator[list[int]]:
    """The first texts, the last one truncated, with at most `most` tokens in total."""
    for text in ids:
        if most <= 0:
            return
        yield text[:most]
        most -= len(text)


@dataclass(frozen=True)
class Agreement:
    """The agreement of the predictions of two models on the same texts.

    Attributes:
        positions: The number of predictions compared.
        largest: The largest absolute difference between two logits.
        divergence: The mean Kullback-Leibler divergence of the second model from the first, in nats per token.
        top1: The share of positions at which both predict the same token.
    """

    positions: int
    largest: float
    divergence: float
    top1: float

    def to_dict(self) -> dict[str, Any]:
        """Name → metric; non-finite values as text, because JSON cannot represent them."""
        return {name: value if math.isfinite(value) else str(value) for name, value in asdict(self).items()}


@torch.inference_mode()
def agreement(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Agreement:
    """Compare logits.

    Args:
        pairs: For each text the logits of both models, of shape (tokens, vocabulary).
    """
    positions, largest, divergence, same = 0, 0.0, 0.0, 0
    parts = (zip(*(torch.split(one, _AT_ONCE) for one in pair), strict=True) for pair in pairs)
    for first, other in chain.from_iterable(parts):
        one, two = first.double(), other.double()
        largest = max(largest, float((one - two).abs().max()))
        log_one, log_two = one.log_softmax(-1), two.log_softmax(-1)
        divergence += float((log_one.exp() * (log_one - log_two)).sum())
        same += int((one.argmax(-1) == two.argmax(-1)).sum())
        positions += one.shape[0]
    return Agreement(positions, largest, divergence / positions, same / positions)


def scored_answers(loaded: LoadedAdapter, source: AdapterDirectory, split: DatasetSplit | None) -> list[ScoredAnswer]:
    """The adapter's greedy answers to prompts of rows, otherwise to the recorded and the fixed prompts.

    Args:
        loaded: The adapter on its base.
        source: Its directory.
        split: The rows of the file that the user named.

    Raises:
        AdapterError: The recorded prompts are not valid.
    """
    rows: list[Row] = []
    prompts: list[tuple[Row, tuple[int, ...]]] = []
    if split:
        rows += card.recorded_prompts(split.examples(), MOST_TEXTS)
    else:
        prompts = _recorded(source, loaded.renderer, loaded.model.config.get_text_config().vocab_size)
        rows += [
            {"messages": [{"role": "user", "content": text}]} if source.chat else {"prompt": text} for text in FIXED
        ]
    prompts += [(row, _prompt_ids(row, loaded.renderer)) for row in rows]
    with progress("answering prompts"):
        answers = answered(loaded, [prompt for _, prompt in prompts], _LONGEST_ANSWER)
        pairs = [(prompt, answer) for (_, prompt), answer in zip(prompts, answers, strict=True)]
        adapted = [_log_probabilities(loaded, *pair) for pair in pairs]
        with loaded.without_adapter():
            base = [_log_probabilities(loaded, *pair) for pair in pairs]
    return [
        ScoredAnswer(_request(row, loaded.renderer), prompt, answer, first, alone)
        for (row, prompt), answer, first, alone in zip(prompts, answers, adapted, base, strict=True)
    ]


def _request(row: Row, renderer: Renderer) -> Row:
    """A prompt as a server gets it; empty if there are only ids."""
    if "input_ids" in row:
        return {}
    arguments = renderer.arguments | row.get(FIELD, {})
    return {**row, FIELD: arguments} if arguments and "messages" in row else row


def _log_probabilities(loaded: LoadedAdapter, prompt: Sequence[int], answer: Sequence[int]) -> list[float]:
    """The log-probability of each token of an answer."""
    logprobs = logits(loaded.model, [*prompt, *answer])[len(prompt) - 1 : -1].double().log_softmax(-1)
    return list(logprobs.gather(1, torch.tensor(answer)[:, None])[:, 0].tolist())


def _recorded(source: AdapterDirectory, renderer: Renderer, vocabulary_size: int) -> list[tuple[Row, tuple[int, ...]]]:
    """The first prompts in the record of a run, with their ids. Raises AdapterError: they are not valid."""
    try:
        rows = [*islice(source.files.record.get("prompts", ()), MOST_TEXTS)]
        prompts = [(row, _prompt_ids(row, renderer)) for row in rows]
        if any(type(token) is not int or not 0 <= token < vocabulary_size for _, ids in prompts for token in ids):
            raise ValueError("input_ids are not token ids of the base")
    except Exception as error:  # the record may come from anybody, and anything may be wrong with it
        what = f"the prompts recorded there cannot be used: {error}"
        where = str(source.path / RECORD_FILE)
        raise AdapterError(Problem(Code.ADAPTER_INVALID, what, where, "prompts")) from None
    return [(row, ids) for row, ids in prompts if ids]


def _prompt_ids(row: Row, renderer: Renderer) -> tuple[int, ...]:
    if "input_ids" in row:
        return tuple(row["input_ids"])
    prompt, tools, arguments = row.get("messages", row.get("prompt")), row.get("tools"), row.get(FIELD) or {}
    if reason := problem(arguments):
        raise ValueError(reason)
    return renderer.prompt(prompt, "", tools or (), arguments)


# Plain LoRA

CLOSENESS = 1e-5
"""The largest allowed difference from the adapter: of logits, relative to the largest; of ΔW, relative to its norm."""
_DTYPES = {torch.float32, torch.bfloat16, torch.float16}
"""The dtypes that all programs support."""


def check_plain(files: AdapterFiles, client: str) -> None:
    """Check that an adapter can be expressed as plain LoRA. No weights are read.

    Args:
        files: The adapter.
        client: A key of `CLIENTS`.

    Raises:
        AdapterError: The adapter holds more than A and B of layers, or PEFT changes the base when it loads the adapter.
    """
    reasons = {reason: None for key, reason in tensors.obstacles(files).items() if key != PARAMETERS}
    if client != "peft" and any(".lora_embedding_" in name for name in files.tensors):
        reasons[f"it adapts embeddings, and {CLIENTS[client]} reads that for few models only"] = None
    if reasons:
        fix = "`loratune merge` makes a model of it" + (", and PEFT reads the adapter itself" * (client == "peft"))
        what = f"cannot be plain LoRA for {CLIENTS[client]}: {'; '.join(reasons)}"
        raise AdapterError(Problem(Code.EXPORT_UNSUPPORTED, what, str(files.path), fix=fix))


def fold(files: AdapterFiles, paths: Collection[str], parameters: Mapping[str, str] | None = None) -> PlainAdapter:
    """An adapter as plain LoRA, in the dtype of its file if that represents the scaled values exactly.

    Args:
        files: The adapter.
        paths: The modules of its base.
        parameters: See `experts.adapted_parameters`.

    Raises:
        AdapterError: See `weighted_sum`; or the adapter uses other module names than the base.
    """
    plain = merging.weighted_sum([(files, 1.0)], parameters)
    chosen = plain.config["target_modules"]
    if renamed := sorted(set(chosen) - set(paths)):
        what = f"names {join_first(renamed, 2)}, which the base calls otherwise, and only PEFT renames them as it loads"
        fix = "merge it: loratune merge"
        raise AdapterError(Problem(Code.EXPORT_UNSUPPORTED, what, str(files.path), fix=fix))
    names, rest = endings(chosen, paths)
    plain = replace(plain, config={**plain.config, "target_modules": sorted({*names, *rest})})
    dtypes = {tensor.dtype for tensor in read_adapter(files).values()}
    if dtypes == {torch.float32}:
        return plain
    if len(dtypes) == 1 and dtypes <= _DTYPES:
        (dtype,) = dtypes
        tensors = {name: tensor.to(dtype) for name, tensor in plain.tensors.items()}
        if all(torch.equal(tensor.float(), plain.tensors[name]) for name, tensor in tensors.items()):
            return replace(plain, tensors=tensors)
    named = ", ".join(sorted(str(one).removeprefix("torch.") for one in dtypes))
    note = f"stored in float32, as {named} does not hold the folded scales exactly, or is not read everywhere"
    return replace(plain, notes=(note,))


def check_tensors(
    files: AdapterFiles,
    directory: Path,
    parameters: Mapping[str, str] | None = None,
    places: Sequence[Placement] | None = None,
) -> float:
    """Compare ΔW of each module, and of each expert, between the written files and the adapter.

    Args:
        files: The adapter.
        directory: The written files.
        parameters: See `experts.adapted_parameters`.
        places: Where the A and B are in the written files; None: where they are in the adapter.

    Returns:
        The largest difference of a module's ΔW, relative to the norm of ΔW.

    Raises:
        AdapterError: The difference is larger than `CLOSENESS`, or not finite.
    """
    stored, written = read_adapter(files), read_weights(directory / WEIGHTS_FILE)
    errors, names, held, settings = {}, factors_in(written), files.factors, files.settings(parameters)
    paths = {(parameters or {}).get(path, path): path for path in held}
    for one in [Placement(path, path) for path in held] if places is None else places:
        found = experts.products([written[names[one.target][kind]] for kind in "AB"], one, written=True)
        if (path := paths.get(one.source)) is None:  # a parameter that it does not adapt
            errors[one.target] = max(float(product.norm()) for product in found)
            continue
        own = experts.products([stored[held[path][kind]] for kind in "AB"], one, written=False)
        pairs = [(product, settings[path].scaling * change) for product, change in zip(found, own, strict=True)]
        total = math.hypot(*(float(change.norm()) for _, change in pairs))
        errors[one.target] = math.hypot(*(float((product - change).norm()) for product, change in pairs)) / (
            total or 1.0
        )
    return _largest(errors, "the change of {} differs by {:.1e} of itself from the adapter's", files)


@progress("comparing logits in PEFT")
def check_logits(files: AdapterFiles, model: Any, directory: Path, texts: Sequence[Sequence[int]]) -> float:
    """Compare the logits of an adapter with those of the written files, loaded by PEFT onto the same base.

    Args:
        files: The adapter.
        model: The `PeftModel` with the adapter. Afterwards it also has the written adapter.
        directory: The written files.
        texts: The token ids of each text; the first 256 are compared.

    Returns:
        The largest difference, relative to the largest logit.

    Raises:
        AdapterError: The difference is larger than `CLOSENESS`, or not finite.
    """
    own, scale, errors = model.active_adapter, 0.0, {}
    model.load_adapter(str(directory), "exported")
    for number, ids in enumerate(filter(None, texts), 1):
        model.set_adapter(own)
        expected = logits(model, ids[:256])
        model.set_adapter("exported")
        errors[f"text {number}"] = float((expected - logits(model, ids[:256])).abs().max())
        scale = max(scale, float(expected.abs().max()))
    shares = {name: error / scale for name, error in errors.items()}
    return _largest(shares, "read by PEFT, the logits of {} differ by {:.1e} of the largest from the adapter's", files)


def _largest(errors: Mapping[str, float], message: str, files: AdapterFiles) -> float:
    """Returns the largest error. Raises AdapterError: it is larger than `CLOSENESS`, or not finite."""
    name = max(errors, key=lambda name: (math.isnan(errors[name]), errors[name]))
    if not errors[name] <= CLOSENESS:
        raise AdapterError(Problem(Code.EXPORT_DIFFERS, message.format(name, errors[name]), str(files.path)))
    return errors[name]
