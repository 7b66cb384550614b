"""Which clients will not read the adapter that a config asks for, told before the run rather than after it.

The portable set is plain LoRA of linear layers with r ≤ 16, whole lora_alpha and no biases. Sources, as of 2026:
vllm/lora/peft_helper.py: one scale, lora_alpha / r, for all modules; no DoRA, biases or saved modules; ranks above 16
need --max-lora-rank. llama.cpp's convert_lora_to_gguf.py: lora_alpha as it stands, r by the tensors' shapes; A and B
only. Ollama reads what llama.cpp converts.
"""

from collections.abc import Callable, Iterator

from loratune.config.schema import LoraSection

VLLM_RANK = 16

Rule = tuple[Callable[[LoraSection], bool], str]

_RULES: tuple[Rule, ...] = (
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
        "lora.init_lora_weights: loftq makes up for what 4bit loses; on a base in full precision the adapter is off",
    ),
    (
        lambda lora: lora.use_rslora,
        "lora.use_rslora: llama.cpp and Ollama apply such an adapter with another scale, and do not say so",
    ),
    (
        lambda lora: bool(lora.rank_pattern) and not lora.alpha_pattern,
        "lora.rank_pattern: vLLM applies such an adapter with one scale for all modules, and does not say so",
    ),
    (
        lambda lora: bool(lora.alpha_pattern),
        "lora.alpha_pattern: vLLM, llama.cpp and Ollama apply one scale to all modules, and do not say so",
    ),
)


def doubled(lora: LoraSection) -> bool:
    """Whether the adapter's file has twice the rank that is trained."""
    return str(lora.init_lora_weights).startswith(("pissa", "olora"))


def highest_rank(lora: LoraSection) -> int:
    """The largest rank in the adapter's file."""
    return max([lora.r, *lora.rank_pattern.values()]) * (2 if doubled(lora) else 1)


def portability(lora: LoraSection) -> Iterator[str]:
    """One line for each choice that leaves the portable set, with the clients that will not read the adapter."""
    yield from (line for leaves, line in _RULES if leaves(lora))
    start, rank = lora.init_lora_weights, highest_rank(lora)
    if doubled(lora):
        yield f"lora.init_lora_weights: {start} is saved as plain LoRA of twice the rank, {rank}"
    if doubled(lora) and lora.use_rslora:
        yield f"lora.use_rslora: with {start}, lora_alpha is saved times √2, and llama.cpp and Ollama want it whole"
    if rank > VLLM_RANK:
        key = "lora.r" if lora.r == max([lora.r, *lora.rank_pattern.values()]) else "lora.rank_pattern"
        yield f"{key}: the file's rank is {rank}; vLLM reads it with --max-lora-rank {rank} only"
