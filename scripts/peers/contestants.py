"""Who takes part: the virtual environment of each, and its own settings."""

from dataclasses import dataclass, field
from typing import Literal

TUNED = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
}
"""glibc keeps what was freed, so large tensors do not fault in their pages anew at each step."""

STOCK = ("torch", "transformers==5.24.*", "peft==0.21.*", "accelerate==1.15.*")
LLAMAFACTORY = ("llamafactory==0.9.5",)


@dataclass(frozen=True)
class Contestant:
    """One way to train. module: of this folder; venv: its environment, "" for that of loratune itself.

    batch: what a micro-step takes: rows padded to the longest of them, rows padded to max_length, or one row; of no
    account where rows are packed. converter: a module of this folder that converts the model once. device: the only
    one that it is for, "" for all.
    """

    module: str
    venv: str
    requirements: tuple[str, ...]
    note: str
    environment: dict[str, str] = field(default_factory=dict)
    batch: Literal["padded", "whole", "single"] = "padded"
    converter: str = ""
    device: str = ""


CONTESTANTS = {
    "loratune": Contestant("loratune", "", (), "bf16, packing: full"),
    "loratune-compiled": Contestant(
        "loratune", "", (), "with torch_compile", {"SETTINGS": '{"model": {"torch_compile": true}}'}, device="cuda"
    ),
    "loratune-liger": Contestant(
        "loratune",
        "",
        (),
        "with Liger's kernels (pip install liger-kernel)",
        {"SETTINGS": '{"model": {"use_liger_kernel": true}}'},
        device="cuda",
    ),
    **{
        f"loratune-{bits}bit": Contestant(
            "loratune",
            "",
            (),
            f"quantization: {bits}bit",
            {"SETTINGS": f'{{"model": {{"quantization": "{bits}bit"}}}}'},
            device="cuda",
        )
        for bits in (8, 4)
    },
    "loratune-trees": Contestant(
        "loratune",
        "",
        (),
        "prefixes are shared, with FlexAttention",
        {"SETTINGS": '{"data": {"share_prefixes": true}}'},
        device="cuda",
    ),
    "textbook": Contestant(
        "textbook", "trainer", STOCK, "Trainer + PEFT, fp32, rows padded to max_length", batch="whole"
    ),
    "trainer": Contestant("trainer", "trainer", STOCK, "Trainer + PEFT, bf16 and autocast, grouped by length"),
    "trl": Contestant(
        "trl", "trl", ("trl==1.16.0", "peft", "torch"), "bf16 and autocast, packing (bfd), no checkpointing"
    ),
    "llamafactory": Contestant(
        "llamafactory",
        "llamafactory",
        LLAMAFACTORY,
        "bf16 and autocast, neat_packing, no checkpointing",
    ),
    "llamafactory-alloc": Contestant(
        "llamafactory", "llamafactory", LLAMAFACTORY, "the same, allocator tuned by environment", TUNED
    ),
    "unsloth": Contestant("unsloth", "unsloth", ("unsloth==2026.10.*",), "16 bit, grouped by length, no checkpointing"),
    "litgpt": Contestant(
        "litgpt",
        "litgpt",
        ("litgpt==0.5.13", "torch", "requests"),
        "bf16-true (LoRA weights too), rows one by one; a step of warmup, then cosine; no clipping; the rows left over "
        "after its last update teach nothing",
        batch="single",
        converter="litgpt_weights",
    ),
}
