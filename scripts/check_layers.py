"""Compares the models of every family with and without kernels, and writes the results.

    python scripts/check_layers.py                   # the whole table, about 20 minutes on one core
    python scripts/check_layers.py llama olmo        # these families, the others stay as they are

`tests/golden_kernels.txt` is the table of whole models, each beside itself as transformers computes it: model type,
dtype, what is replaced, and the largest differences of loss and of gradients, packed and padded. Which layers may be
replaced is found in each run (`kernels.recognition`); after a release of transformers, the differences of this table
show what it has changed.
"""

import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from families import FAMILIES, small
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from loratune import kernels
from loratune.config import LoraSection
from loratune.data.batches import flatten, pad
from loratune.errors import ModelError
from loratune.kernels import acceleration
from loratune.kernels.parity_check import relative_rms
from loratune.lora import attach
from loratune.lora.targets import find

ALL_LINEAR = LoraSection(target_modules="all-linear")
TABLE = Path(__file__).parent.parent / "tests" / "golden_kernels.txt"


def disturb(model: PreTrainedModel) -> None:
    """Give weights of norms and biases values of their own, in place: initialised as ones and zeros they hide whether
    and how they are used."""
    drawn = torch.Generator().manual_seed(4)
    for weight in model.parameters():
        if weight.dim() == 1:
            weight.data += 0.2 * torch.randn(weight.shape, generator=drawn)


@dataclass
class Row:
    """A line of the table.

    losses, gradients: differences to the stock model, packed and padded; gradients as shares of their size. own: loss
    and gradient of the stock model beside itself: in bfloat16, on the same weights in float32; in float32, where it
    differs, with embeddings rounded to a number beside the right one, and with other draws where it drops out.
    """

    model_type: str
    dtype: str
    parts: str
    losses: list[float] = field(default_factory=list)
    gradients: list[float] = field(default_factory=list)
    own: list[float] = field(default_factory=list)
    note: str = ""

    def __str__(self) -> str:
        numbers = (" ".join(f"{value:.0e}" for value in pair) for pair in (self.losses, self.gradients, self.own))
        return " | ".join([self.model_type, self.dtype, self.parts, *numbers, self.note])

    @classmethod
    def read(cls, line: str) -> "Row":
        """A line as `str` gave it."""
        model_type, dtype, parts, *numbers, note = line.split(" | ")
        losses, gradients, own = ([float(value) for value in cell.split()] for cell in numbers)
        return cls(model_type, dtype, parts, losses, gradients, own, note)

    @property
    def same(self) -> bool:
        """Whether the model gives what it gave, but for rounding."""
        loss, gradient = (1e-5, 1e-4) if self.dtype == "float32" else (2e-3, 0.05)
        loss, gradient = (max(least, 4 * own) for least, own in zip((loss, gradient), self.own or (0, 0), strict=True))
        return max(self.losses, default=0) <= loss and max(self.gradients, default=0) <= gradient


LENGTHS = (40, 7, 100, 1, 90)


def rows() -> list[dict[str, list[int]]]:
    """Longer and shorter than the windows and than the limits that configurations call original."""
    drawn = torch.Generator().manual_seed(1)
    every = [torch.randint(8, 300, (length,), generator=drawn).tolist() for length in LENGTHS]
    return [{"input_ids": ids, "labels": [-100 if at % 5 == 0 else one for at, one in enumerate(ids)]} for ids in every]


def compare(model_type: str, dtype: torch.dtype, *, mean: float = 0.0, **changes: Any) -> Row:
    """A whole model in training mode beside itself, with the kernels and without.

    mean: added to the embeddings; changes: of the decoder's configuration.
    """
    row = Row(model_type, str(dtype).removeprefix("torch."), "")
    if dtype == torch.bfloat16 and model_type in UNWIELDY:
        row.note = "not run"
        return row
    base = small(model_type, 64 if dtype == torch.float32 else 512, **changes)
    disturb(base)
    base.get_input_embeddings().weight.data += mean
    torch.manual_seed(1)
    try:
        model: Any = get_peft_model(base, LoraConfig(r=4, **find(base, ALL_LINEAR).peft()))
    except (ModelError, ValueError, TypeError) as error:
        row.note = f"no adapter: {type(error).__name__}"
        return row
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.05)
        if "lora_" not in name:
            weight.data = weight.data.to(dtype)
    model.train()
    batches = {"packed": flatten(rows()), "padded": dict(pad(rows(), 0))}
    stock = {name: step(model, batch) for name, batch in batches.items()}
    with kernels.accelerated(model, attach.adapted_linear) as fallbacks:
        fast = {name: step(model, batch) for name, batch in batches.items()}
    row.parts = ", ".join(part for part in (*acceleration.KINDS, "loss") if part not in fallbacks) or "nothing"
    _compare(row, stock, fast)
    if dtype == torch.bfloat16:
        exact = model.float()
        row.own = _own(exact, batches, stock)
        row.own = (
            row.own if row.same else [max(pair) for pair in zip(row.own, _own(exact, batches, stock, 1), strict=True)]
        )
    elif not row.same:
        weight = model.get_input_embeddings().weight
        signs = 2 * torch.randint(2, weight.shape, generator=torch.Generator().manual_seed(5)) - 1
        weight.data *= 1 + torch.finfo(dtype).eps / 2 * signs
        row.own = [max(pair) for pair in zip(_own(model, batches, stock), _own(model, batches, stock, 1), strict=True)]
    return row


UNWIELDY = ("bailing_hybrid", "blt", "gemma3n", "gemma3n_text", "kimi_linear", "longcat_flash")
"""With states of 512, they take minutes or many GiB. Their attention is not replaced."""
Steps = dict[str, tuple[float, Tensor] | str]


def _compare(row: Row, stock: Steps, fast: Steps) -> None:
    """Fill in the differences, and what failed."""
    for name, old in stock.items():
        new = fast[name]
        if isinstance(old, str):
            row.note += f" {name}: stock fails"
        elif isinstance(new, str):
            row.note += f" {name} fails: {new}"
        else:
            row.losses.append(abs(old[0] - new[0]))
            row.gradients.append(relative_rms(old[1], new[1]))


def _own(model: Any, batches: dict[str, dict[str, Tensor]], stock: Steps, seed: int = 0) -> list[float]:
    """Differences of the stock model to itself in float32, of loss and gradient. seed: of what it drops out."""
    largest = [0.0, 0.0]
    for name, batch in batches.items():
        exact, old = step(model, batch, seed), stock[name]
        if not isinstance(exact, str) and not isinstance(old, str):
            loss = max(largest[0], abs(exact[0] - old[0]))
            largest = [loss, max(largest[1], relative_rms(exact[1], old[1]))]
    return largest


def step(model: Any, batch: dict[str, Tensor], seed: int = 0) -> tuple[float, Tensor] | str:
    """The loss of a batch and all gradients as one vector; what went wrong, where the model fails."""
    inputs = dict(batch)
    labels = inputs.pop("labels")
    torch.manual_seed(seed)
    try:
        kernels.set_loss_targets(model, labels)
        total, count = kernels.next_token_loss(model, model(**inputs, use_cache=False).logits, labels)
        (total / count).backward()  # type: ignore[no-untyped-call]
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"
    finally:
        model_gradients = [p.grad.float().flatten() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
    return float(total.detach() / count), torch.cat(model_gradients)


def main(chosen: list[str]) -> None:
    """Compare these families, or all, and write the table."""
    lines = TABLE.read_text(encoding="utf-8").splitlines() if chosen else []
    table = {(row.model_type, row.dtype): str(row) for row in map(Row.read, lines)}
    for row in tabulated(chosen or FAMILIES):
        table[row.model_type, row.dtype] = str(row)
        print(row, flush=True)
    TABLE.write_text("\n".join(table.values()) + "\n", encoding="utf-8")


def tabulated(model_types: Iterable[str]) -> Iterator[Row]:
    """The lines of the table."""
    for model_type in model_types:
        for dtype in (torch.float32, torch.bfloat16):
            try:
                yield compare(model_type, dtype)
            except Exception as error:
                name = str(dtype).removeprefix("torch.")
                yield Row(model_type, name, "", note=f"not built: {type(error).__name__}: {str(error)[:80]}")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    main(sys.argv[1:])
