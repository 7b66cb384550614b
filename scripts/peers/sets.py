"""The sets of rows, and how they are batched."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers.common import IGNORED, Row


@dataclass(frozen=True)
class Kind:
    """A set. shares: of each source; rows, held_out: how many; max_length, min_length: tokens of a row.

    pack_length x packs: tokens of an update where rows are packed; padded_batch: rows of a micro-batch where they are
    padded to the longest of them, whole_batch: to max_length; as many micro-batches make an update as come closest to
    the tokens of a packed one; most_prompt: the part of max_length that a prompt stays below.
    """

    name: str
    shares: dict[str, float]
    rows: int
    max_length: int
    pack_length: int
    packs: int
    padded_batch: int
    whole_batch: int
    min_length: int = 0
    held_out: int = 32
    most_prompt: float = 0.5


SETS = (
    Kind("natural", {"pairs": 0.3125, "mails": 0.6875}, 128, 512, 512, 4, padded_batch=2, whole_batch=4),
    Kind("long", {"mails": 1.0}, 16, 4096, 4096, 1, padded_batch=1, whole_batch=1, min_length=512, held_out=8),
    Kind("full", {"mails": 1.0}, 128, 2048, 2048, 4, padded_batch=2, whole_batch=2, min_length=2048),
    Kind("short", {"pairs": 1.0}, 512, 128, 512, 4, padded_batch=2, whole_batch=44),
    Kind("prefix", {"calls": 1.0}, 64, 1024, 2048, 2, padded_batch=2, whole_batch=2, most_prompt=0.75),
)
_WINDOW = {"sliding_window": 128, "layer_types": [*["sliding_attention"] * 3, "full_attention"]}
_EXPERTS = {"num_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen3": {}, "mistral": {"sliding_window": 128}, "gemma2": _WINDOW, "gemma3_text": _WINDOW, "phi3": {},
    "mixtral": {**_EXPERTS, "intermediate_size": 768}, "qwen3_moe": {**_EXPERTS, "moe_intermediate_size": 768},
}  # fmt: skip
"""The families of the benchmark, which are compared with four layers of equal sizes."""
_SIZES = {
    "vocab_size": 49152, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "1.7b": {
        "vocab_size": 49152, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
        "num_attention_heads": 32, "num_key_value_heads": 32, "tie_word_embeddings": True,
    },
    "8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
    },
    **{name: {"model_type": name, **_SIZES, **changes} for name, changes in FAMILIES.items()},
}  # fmt: skip
"""SmolLM2-1.7B and Llama 3 8B, and the families."""
FILLED = 0.9
"""The part of a pack that whole rows fill, about."""


@dataclass(frozen=True)
class Census:
    """What a set holds. attended: the mean length of the row that a token stands in."""

    rows: int
    tokens: int
    supervised: int
    longest: int
    attended: float

    @property
    def mean(self) -> float:
        """Tokens of a row."""
        return self.tokens / self.rows


def rows_file(work: Path, name: str, loss: str, part: str, count: int) -> Path:
    """Where the rows of a set lie. part: train or held-out; count: see `peers.data`."""
    return work / f"{name}-{loss}-{part}{f'-{count}' if count else ''}.jsonl"


def census(rows: list[Row]) -> Census:
    """Count a set."""
    lengths = [len(row["input_ids"]) for row in rows]
    supervised = sum(label != IGNORED for row in rows for label in row["labels"])
    return Census(len(rows), sum(lengths), supervised, max(lengths), sum(n * n for n in lengths) / sum(lengths))


def accumulate(kind: Kind, mean: float, batch: int) -> int:
    """Micro-batches of `batch` padded rows that make an update."""
    return max(1, round(FILLED * kind.packs * kind.pack_length / (mean * batch)))
