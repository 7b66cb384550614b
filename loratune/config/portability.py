"""Which programs can read an adapter of a section `lora`, and with what limits."""

from collections.abc import Iterator

from loratune.config.sections import AUTO, LoraSection, decided

VLLM_RANK = 16
"""The highest rank that vLLM loads without --max-lora-rank."""
_NOT_PLAIN = {
    "use_dora": "vLLM, llama.cpp and Ollama do not read DoRA",
    "bias": "vLLM, llama.cpp and Ollama do not read biases",
    "target_parameters": "vLLM, SGLang and llama.cpp read experts in forms of their own, which loratune export writes "
    "for most models; loratune merge makes a model for any program",
    "modules_to_save": "vLLM, llama.cpp and Ollama do not read whole modules",
    "trainable_token_indices": "vLLM, llama.cpp and Ollama do not read trained tokens",
}
"""Key → the limitation in clients if it differs from its default: the adapter is not plain LoRA."""
_LOFTQ = "loftq compensates for what 4bit loses, so the adapter is off on an unquantized base"
_SCALES = {
    "use_rslora": "llama.cpp and Ollama apply such an adapter with another scale, without saying so",
    "alpha_pattern": "vLLM, llama.cpp and Ollama apply one scale to all modules, without saying so",
}
"""The same for keys that change the scale of the update."""
_RANKS = "vLLM applies such an adapter with one scale for all modules, without saying so"


def is_rank_doubled(lora: LoraSection) -> bool:
    """Whether the adapter is saved with twice its trained rank."""
    return str(lora.init_lora_weights).startswith(("pissa", "olora"))


def highest_rank(lora: LoraSection) -> int:
    """The largest rank in the adapter's file."""
    return max([decided(lora.r), *lora.rank_pattern.values()]) * (2 if is_rank_doubled(lora) else 1)


def is_plain(lora: LoraSection) -> bool:
    """Whether the adapter is plain LoRA, which `loratune export` can convert for vLLM and llama.cpp."""
    return lora.init_lora_weights != "loftq" and not _NOT_PLAIN.keys() & lora.model_dump(exclude_defaults=True)


def has_one_scale(lora: LoraSection) -> bool:
    """Whether all modules have the same scale, as vLLM requires."""
    return not lora.rank_pattern and not lora.alpha_pattern


def portability(lora: LoraSection) -> Iterator[str]:
    """One line for each setting that is not portable, with the clients that cannot read the adapter.

    A rank that is still `auto` counts as portable.
    """
    changed = lora.model_dump(exclude_defaults=True)
    yield from (f"lora.{key}: {reason}" for key, reason in (_NOT_PLAIN | _SCALES).items() if key in changed)
    if lora.rank_pattern and not lora.alpha_pattern:
        yield f"lora.rank_pattern: {_RANKS}"
    if lora.init_lora_weights == "loftq":
        yield f"lora.init_lora_weights: {_LOFTQ}"
    if lora.r == AUTO:
        return
    init, rank = lora.init_lora_weights, highest_rank(lora)
    if is_rank_doubled(lora):
        yield f"lora.init_lora_weights: {init} is saved as plain LoRA of twice the rank, {rank}"
    if is_rank_doubled(lora) and lora.use_rslora:
        yield f"lora.use_rslora: with {init}, lora_alpha is saved times √2; llama.cpp and Ollama need a whole number"
    if rank > VLLM_RANK:
        key = "lora.r" if lora.r == max([lora.r, *lora.rank_pattern.values()]) else "lora.rank_pattern"
        yield f"{key}: the file's rank is {rank}; vLLM reads it with --max-lora-rank {rank} only"
