"""Compares the layers of every family with the kernels that may replace them, and writes the results.

    python scripts/check_layers.py                   # both files, about half an hour on one core
    python scripts/check_layers.py llama olmo        # prints what it finds of some families, writes nothing
    python scripts/check_layers.py --add llama olmo  # puts it into both files, which keep what they hold of others
    python scripts/check_layers.py --add             # adds the installed transformers to the releases in the list

`loratune/kernels/checked_layers.json` lists the classes whose layers may be replaced, see `kernels.recognition`. A
layer is compared with its replacement alone, in float32, in training mode and in eval mode, on inputs of mean 0 and of
another mean, of size 1 and 10, in rows longer than every window and every limit that the configuration calls original.
All layers with the same source and switches must agree, in all families, or none is listed. With `--add`, layers of
other releases of transformers stay in the list: run it in an environment of each release. Classes that are in the list
but have changed so that no kernel computes the same are printed.

`tests/golden_kernels.txt` is the table of whole models, each beside itself as transformers computes it: model type,
dtype, what is replaced, and the largest differences of loss and of gradients, packed and padded.
"""

import json
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from families import FAMILIES, POSITIONS, WINDOW, configure, small
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from loratune import kernels
from loratune.config import LoraSection
from loratune.data.batches import flatten, pad
from loratune.errors import ModelError
from loratune.kernels import acceleration, masks, replacements
from loratune.kernels.layout import Layout, PerBatch
from loratune.kernels.parity_check import relative_rms
from loratune.kernels.recognition import LIST, Layer, checked
from loratune.lora import attach
from loratune.lora.targets import find

ALL_LINEAR = LoraSection(target_modules="all-linear")
TABLE = Path(__file__).parent.parent / "tests" / "golden_kernels.txt"
TOLERANCE = 2e-4
"""Of the size of outputs and gradients of a layer; float32 rounds less than a tenth of it."""
INPUTS: list[Callable[[Tensor], Tensor]] = [
    lambda x: x, lambda x: 10 * x, lambda x: x + 3, lambda x: 10 * x - 20, lambda x: 30 * x,
]  # fmt: skip
LARGE: list[Callable[[Tensor], Tensor]] = [lambda x: 1000 * x + 300, lambda x: x / 1000]
"""Where nothing but clamps and epsilons can tell; the softmax of attention would be that of a single key."""
VARIANTS: list[dict[str, Any]] = [
    {},
    {"sliding_window": None},
    {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    {"use_qk_norm": True, "qk_layernorm": True},
    {"attention_bias": True, "qkv_bias": True, "mlp_bias": True},
]
"""Changes of a configuration, each made where it has all of the keys that are named first."""


@dataclass
class Findings:
    """The results for the layers of all families. verdicts: layer → form → whether every one of them agreed."""

    verdicts: dict[Layer, dict[str, bool]] = field(default_factory=dict)
    kinds: dict[Layer, str] = field(default_factory=dict)

    def note(self, layer: Layer, form: str, agreed: bool) -> None:
        """The result of comparing one layer with one form."""
        forms = self.verdicts.setdefault(layer, {})
        forms[form] = forms.get(form, True) and agreed

    @property
    def forms(self) -> dict[Layer, str | None]:
        """The form that computes the same as each layer; None if none does."""
        return {
            layer: next((form for form, agreed in forms.items() if agreed), None)
            for layer, forms in self.verdicts.items()
        }

    def listed(self, known: Mapping[Layer, str | None], releases: Iterable[str]) -> dict[str, Any]:
        """The list, as JSON.

        Args:
            known: What it holds of layers of other families or releases.
            releases: The releases of transformers whose families were all compared.
        """
        layers: dict[str, dict[str, list[dict[str, Any]]]] = {}
        for layer, form in sorted(
            {**known, **self.forms}.items(), key=lambda one: (one[0].name, one[0].digest, one[0].switches)
        ):
            if form is not None:
                by_digest = layers.setdefault(layer.name, {})
                entry = {"form": form, "switches": json.loads(layer.switches)}
                by_digest.setdefault(layer.digest, []).append(entry)
        return {"checked_with": {"transformers": sorted(releases, key=Version)}, "layers": layers}

    def lost(self, known: Mapping[Layer, str | None]) -> list[str]:
        """Classes of the list without any layer that still agreed."""
        forms = self.forms
        agreeing = {layer.name for layer, form in forms.items() if form is not None}
        return sorted({layer.name for layer in forms} & {layer.name for layer in known} - agreeing)


def variants(model_type: str) -> Iterator[dict[str, Any]]:
    """Changes of the configuration of a family that turn its switches, none first."""
    inner = vars(configure(model_type).get_text_config())
    kinds = set(inner.get("layer_types") or ())
    for changes in VARIANTS:
        chosen = {name: value for name, value in changes.items() if name in inner}
        if changes and not chosen:
            continue
        if kinds and "sliding_window" in chosen:
            if not kinds <= {"full_attention", "sliding_attention"}:
                continue
            other = "sliding_attention" if chosen["sliding_window"] else "full_attention"
            chosen["layer_types"] = (["full_attention", other] * 64)[: inner["num_hidden_layers"]]
        yield chosen


def check_family(model_type: str, findings: Findings) -> None:
    """Compare the layers of a family with their replacements, in every variant that can be built and run."""
    for changes in variants(model_type):
        try:
            check(small(model_type, **changes), findings)
        except Exception as error:
            message = f"{model_type} with {changes}: {type(error).__name__}: {str(error)[:100]}"
            print(message, file=sys.stderr, flush=True)


def disturb(model: PreTrainedModel) -> None:
    """Give weights of norms and biases values of their own, in place: initialised as ones and zeros they hide whether
    and how they are used."""
    drawn = torch.Generator().manual_seed(4)
    for weight in model.parameters():
        if weight.dim() == 1:
            weight.data += 0.2 * torch.randn(weight.shape, generator=drawn)


def adapted(model: PreTrainedModel) -> PreTrainedModel:
    """The model with an adapter that has been trained on all linear layers, if PEFT can."""
    torch.manual_seed(1)
    try:
        targets = find(model, ALL_LINEAR).peft()
        lora: Any = get_peft_model(model, LoraConfig(r=4, lora_dropout=0.0, **targets))
    except (ModelError, ValueError, TypeError):
        model.requires_grad_(False)
        return model
    for name, weight in lora.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.05)
    return lora.get_base_model()


def check(model: PreTrainedModel, findings: Findings) -> None:
    """Compare every layer of a model that has the structure of a replacement with it."""
    disturb(model)
    model = adapted(model)
    specs = masks.survey(model).specs
    model.set_attn_implementation("eager")
    calls: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    decoder = model.get_decoder()
    modules = {}
    for module in decoder.modules():
        layer = Layer.of(module)
        forms = {form: fast for form, fast in candidates(module, specs) if fast is not None}
        if layer is not None and forms:
            modules[module] = (layer, forms)
            module.register_forward_pre_hook(_noted(calls), with_kwargs=True)
    ids = torch.randint(8, 300, (1, POSITIONS - 3), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        decoder.eval()(ids, position_ids=torch.arange(ids.shape[1])[None], use_cache=False)
    for module, (layer, forms) in modules.items():
        module._forward_pre_hooks.clear()
        for form, fast in forms.items() if module in calls else ():
            findings.note(layer, form, agrees(module, fast, *calls[module]))


def _noted(calls: dict[nn.Module, Any]) -> Callable[..., None]:
    def note(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        calls.setdefault(module, (given, named))

    return note


def candidates(
    module: nn.Module, specs: dict[nn.Module, masks.AttentionSpec]
) -> Iterator[tuple[str, nn.Module | None]]:
    """Forms, and the replacement of each whose structure the layer has."""
    layouts = PerBatch(Layout.of)
    reader = attach.adapted_linear
    for form, options in acceleration.NORM.items():
        yield form, replacements.replace_norm(module, **options)
    for form, options in acceleration.GATED.items():
        yield form, replacements.replace_gated(module, reader, **options)
    for form, options in acceleration.EXPERTS.items():
        yield form, replacements.replace_experts(module, **options)
    for form, options in acceleration.ATTENTION.items() if module in specs else ():
        yield form, replacements.replace_attention(module, reader, specs[module], layouts, **options)


def agrees(module: nn.Module, fast: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> bool:
    """Whether outputs and gradients are the same for all inputs, in both modes."""
    name = next((name for name, value in named.items() if isinstance(value, Tensor) and value.dim() > 1), "")
    if not given and not name:
        return False
    states = given[0] if given else named[name]
    if not isinstance(states, Tensor) or not states.is_floating_point():
        return False
    for change in INPUTS if isinstance(fast, replacements.FastAttention) else [*INPUTS, *LARGE]:
        drawn = torch.randn(states.shape, generator=torch.Generator().manual_seed(2))
        for training in (False, True):
            outcomes = []
            for one in (module, fast):
                x = change(drawn).requires_grad_()
                arguments = ((x, *given[1:]), named) if given else ((), named | {name: x})
                try:
                    outcomes.append(_step(one.train(training), x, *arguments))
                except Exception:
                    return False
            if not all(relative_rms(*pair) <= TOLERANCE for pair in zip(*outcomes, strict=True)):
                return False
    return True


def _step(module: nn.Module, x: Tensor, given: tuple[Any, ...], named: dict[str, Any]) -> list[Tensor]:
    """The output, and the gradients of the input and of each adapter."""
    result = module(*given, **named)
    result = result[0] if isinstance(result, tuple) else result
    weights = [one for one in module.parameters() if one.requires_grad]
    target = torch.randn(result.shape, generator=torch.Generator().manual_seed(3))
    gradients = torch.autograd.grad((result * target).sum(), [x, *weights])
    return [result.detach(), *gradients]


# --- whole models


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


def laid_out(listed: Mapping[str, Any]) -> str:
    """The list as JSON, a line for each class."""
    head = json.dumps(listed["checked_with"])
    lines = [f"{json.dumps(name)}: {json.dumps(releases)}" for name, releases in listed["layers"].items()]
    return f'{{"checked_with": {head},\n"layers": {{\n' + ",\n".join(lines) + "\n}}\n"


def main(chosen: list[str], *, add: bool) -> None:
    """Check the families, or all of them, and write. add: to what is known of other families and releases."""
    findings = Findings()
    for model_type in chosen or FAMILIES:
        check_family(model_type, findings)
    if chosen and not add:
        for layer, forms in findings.verdicts.items():
            print(layer.name.rpartition(".")[2], layer.switches, forms)
    else:
        known = checked() if add else {}
        releases = {*json.loads(LIST.read_text(encoding="utf-8"))["checked_with"]["transformers"]} if add else set()
        listed = findings.listed(known, releases if chosen else releases | {transformers.__version__})
        for name in findings.lost(known):
            print(f"no kernel computes the same as {name} any more", file=sys.stderr)
        LIST.write_text(laid_out(listed), encoding="utf-8")
        checked.cache_clear()
    lines = TABLE.read_text(encoding="utf-8").splitlines() if add and chosen else []
    table = {(row.model_type, row.dtype): str(row) for row in map(Row.read, lines)}
    for row in tabulated(chosen or FAMILIES):
        table[row.model_type, row.dtype] = str(row)
        print(row, flush=True)
    if add or not chosen:
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
    named = [one for one in sys.argv[1:] if not one.startswith("--")]
    main(named, add="--add" in sys.argv)
