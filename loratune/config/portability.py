"""Which clients cannot read the adapter that a config asks for; better known before the run than after it.

Portable is plain LoRA of linear layers with r ≤ 16, whole lora_alpha and no biases. Sources, as of 2026:
vllm/lora/peft_helper.py: one scale, lora_alpha / r, for all modules; no DoRA, biases or saved modules; ranks above 16
need --max-lora-rank. llama.cpp's convert_lora_to_gguf.py: lora_alpha as it stands, r by the tensors' shapes; A and B
only. Ollama reads what llama.cpp converts.
"""

from collections.abc import Callable, Iterator

from loratune.config.schema import LoraSection

VLLM_RANK = 16
"""The highest rank that vLLM reads without --max-lora-rank."""

Limit = tuple[Callable[[LoraSection], bool], str]

_LIMITS: tuple[Limit, ...] = (
    (lambda lora: lora.use_dora, "lora.use_dora: vLLM, llama.cpp and Ollama do not read DoRA"),
    (lambda lora: lora.bias != "none", "lora.bias: vLLM, llama.cpp and Ollama do not read biases"),
    (
        lambda lora: lora.modules_to_save is not None,
        "lora.modules_to_save: vLLM, llama.cpp and Ollama do not read whole modules",
    ),
    (
        lambda lora: lora.trainable_token_indices is not None,
        "lora.trainable_token_indices: vLLM, llama.cpp and Ollama do not read trained tokens",
    ),
    (
        lambda lora: lora.init_lora_weights == "loftq",
        "lora.init_lora_weights: loftq compensates for what 4bit loses, so the adapter is off on an unquantized base",
    ),
    (
        lambda lora: lora.use_rslora,
        "lora.use_rslora: llama.cpp and Ollama apply such an adapter with another scale, without saying so",
    ),
    (
        lambda lora: bool(lora.rank_pattern) and not lora.alpha_pattern,
        "lora.rank_pattern: vLLM applies such an adapter with one scale for all modules, without saying so",
    ),
    (
        lambda lora: bool(lora.alpha_pattern),
        "lora.alpha_pattern: vLLM, llama.cpp and Ollama apply one scale to all modules, without saying so",
    ),
)


def is_rank_doubled(lora: LoraSection) -> bool:
    """Whether the adapter's file has twice the rank that is trained."""
    return str(lora.init_lora_weights).startswith(("pissa", "olora"))


def highest_rank(lora: LoraSection) -> int:
    """The largest rank in the adapter's file."""
    return max([lora.r, *lora.rank_pattern.values()]) * (2 if is_rank_doubled(lora) else 1)


def portability(lora: LoraSection) -> Iterator[str]:
    """One line for each choice that is not portable, with the clients that cannot read the adapter."""
    yield from (line for applies, line in _LIMITS if applies(lora))
    init, rank = lora.init_lora_weights, highest_rank(lora)
    if is_rank_doubled(lora):
        yield f"lora.init_lora_weights: {init} is saved as plain LoRA of twice the rank, {rank}"
    if is_rank_doubled(lora) and lora.use_rslora:
        yield f"lora.use_rslora: with {init}, lora_alpha is saved times √2; llama.cpp and Ollama need a whole number"
    if rank > VLLM_RANK:
        key = "lora.r" if lora.r == max([lora.r, *lora.rank_pattern.values()]) else "lora.rank_pattern"
        yield f"{key}: the file's rank is {rank}; vLLM reads it with --max-lora-rank {rank} only"
