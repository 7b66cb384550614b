"""Selects the layers of a model that kernels replace during training, if the results are the same.

One safeguard decides, in three steps, before the first step of a run. A layer must compute the same as its replacement
(`recognition`), with the attention pattern that is read from the model's own mask (`masks`). Then the whole model must
compute the same, forward and backward (`parity_check`), and so it must for rows that are packed, padded or share
prefixes (`data.batch_check`, `tree_refusal`). What fails is computed by transformers; `Acceleration.notes` says why.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from loratune.kernels import gpu, masks, replacements, rowwise, sublayers
from loratune.kernels.compiled import reference
from loratune.kernels.compiled.fused_ops import fused_ops, refusal
from loratune.kernels.layer_sample import WHOLE_MODEL, LayerSample
from loratune.kernels.layout import Layout, PerBatch
from loratune.kernels.lora_linear import Reader
from loratune.kernels.loss import LossHead, Scaling, computes_loss, output_layer
from loratune.kernels.masks import AttentionSpec, AttentionSurvey
from loratune.kernels.parity_check import LONG_ROWS, ROWS, ParityCheck, computes_trees, kept_checks
from loratune.kernels.predictions import TeacherTargets
from loratune.kernels.recognition import ATTENTION, EXPERTS, GATED, NORM, UNEQUAL, UNKNOWN, Recognized, recognize
from loratune.kernels.replacements import restore
from loratune.kernels.upstream import attn_implementation, has_hooks
from loratune.system.cache import NOTHING_KEPT, REFUSAL, KeptResults

ALL_LAYERS = "all layers"
"""The kind in `fallbacks` if no layer may be replaced."""
KINDS = {"attention": "attn", "feed-forward layers": "mlp", "norms": "norm"}
"""Kind of layers that can be replaced → ending of their names."""
FLASH, STOCK_ATTENTION = ("flash_attention_2", "flash_attention_3"), "sdpa"
"""Attention implementations of other packages, which are compared with the stock one."""
LORA = "LoRA"
"""The kind of linear layers with LoRA in layers that are not replaced."""
_RUNS, _BY_ROWS = "runs on packed rows", "attends by rows"
"""What a check of a model finds, beside the kinds."""

Factory = Callable[[], nn.Module | None]
"""Function that returns the replacement of a layer, or None if there is none."""
Step = Callable[[Any], Iterable[tuple[str, nn.Module]]]
"""Function that replaces layers of a base. Yields path and module of each layer, just before it is replaced."""
Replaced = list[tuple[str, nn.Module]]
"""Path and module of layers that are replaced."""


@dataclass(frozen=True)
class Acceleration:
    """The layers of a model to accelerate, as determined by `accelerate`.

    Attributes:
        fallbacks: Kind of layers that are not accelerated → reason.
        steps: Functions that replace the layers, in this order.
        sample: Layers that stand for all layers of the model, in checks of what it computes.
        checks: What they found.
        attention: Why the model does not use the attention implementation that is set; empty if it does.
        unequal: Classes of layers that have the structure of a replacement, and compute something else.
    """

    fallbacks: Mapping[str, str]
    steps: Sequence[Step] = ()
    sample: LayerSample = WHOLE_MODEL
    checks: KeptResults = NOTHING_KEPT
    attention: str = ""
    unequal: Sequence[str] = ()

    def notes(self) -> Iterator[str]:
        """Lines for the user on what is not accelerated."""
        if self.attention:
            yield f"model.attn_implementation: chosen by transformers, as {self.attention}"
        for reason in dict.fromkeys(self.fallbacks.values()):
            kinds = ", ".join(kind for kind in self.fallbacks if self.fallbacks[kind] == reason)
            yield f"not accelerated, but computed by PyTorch: {kinds}: {reason}"

    @contextmanager
    def applied(self, model: Any) -> Iterator[list[str]]:
        """Inside, the layers are accelerated; they are not checked again. Yields the paths of those that are replaced.

        model: the model passed to `accelerate`; its adapter may be disabled. Batches must have no cache, and no padding
        except on the right.
        """
        with _restored(model.get_base_model()) as (base, replaced):
            for step in self.steps:
                replaced += step(base)
            yield [path for path, _ in replaced]

    def tree_refusal(self, model: Any) -> str | None:
        """See the function of this name."""
        return self.checks.once("trees", REFUSAL, partial(tree_refusal, model, self.sample))


def accelerate(
    model: Any, reader: Reader, *, sharded: bool = False, trees: bool = False, fingerprint: str = ""
) -> Acceleration:
    """Determine which layers of a model can be accelerated. The model is run for this, and is not changed; but an
    attention implementation with which it computes something else is replaced by the stock one.

    Args:
        model: A `PeftModel` around a causal language model of transformers; on a GPU, see `gpu.replace`.
        reader: Function that returns the linear layer and LoRA of a module.
        sharded: Whether the base is sharded in training; then no layer can be replaced.
        trees: Whether batches must be able to share prefixes. On a CPU they are where that is possible; on a GPU
            another attention function is used then, which no measurement has shown to be as fast.
        fingerprint: That of the base, to keep what checks find on this machine; empty to check anew.
    """
    attention = _check_attention(model.get_base_model())
    if sharded:
        return Acceleration({ALL_LAYERS: "the base is spread over processes"}, attention=attention)
    with _restored(model.get_base_model()) as (base, replaced):
        checks, is_cpu = kept_checks(model, fingerprint and f"{fingerprint} {trees}"), base.device.type == "cpu"
        survey = masks.survey(base) if is_cpu else AttentionSurvey()
        recognized = recognize(base, reader, survey if is_cpu else None)
        on_cpu = partial(_replace, survey=survey, checks=checks)
        replace = on_cpu if is_cpu else partial(gpu.replace, trees=trees)
        steps, fallbacks = replace(base, reader, replaced, recognized)
        head, sample = survey.sample.examined(partial(output_layer, base)), survey.sample
    if head is None:
        fallbacks["loss"] = (
            "the output layer is trained, or the model does something else with its output than to return it"
        )
    elif not checks.once("loss", bool, partial(computes_loss, *head[1:])):
        fallbacks["loss"] = "its kernel does not compute the same"
    else:
        steps.append(partial(_replace_head, *head))
    unequal = sorted({type(module).__name__ for module, known in recognized.items() if known.reason == UNEQUAL})
    return Acceleration(fallbacks, steps, sample, checks, attention, unequal)


@contextmanager
def accelerated(model: Any, reader: Reader, *, sharded: bool = False) -> Iterator[list[str]]:
    """Inside, the layers found by `accelerate` are accelerated. Yields the kinds of layers that are not."""
    acceleration = accelerate(model, reader, sharded=sharded)
    with acceleration.applied(model):
        yield [*acceleration.fallbacks]


def set_loss_targets(model: Any, labels: Tensor, places: Tensor | None = None, lengths: Tensor | None = None) -> None:
    """Make the next forward pass compute the summed loss of these labels instead of logits, if the model has a
    `LossHead`.

    places, lengths: see `LossHead`.
    """
    head = model.get_output_embeddings()
    if isinstance(head, LossHead):
        head.labels, head.places, head.lengths, head.teacher = labels, places, lengths, None
        head.weights = None


def set_loss_weights(model: Any, weights: Tensor) -> None:
    """Have the next forward pass weight the loss of each label; called after `set_loss_targets`.

    weights: see `LossHead`.
    """
    head = model.get_output_embeddings()
    if isinstance(head, LossHead):
        head.weights = weights


def set_teacher(model: Any, teacher: TeacherTargets) -> None:
    """Have the next forward pass compute the divergence from a teacher as well; called after `set_loss_targets`."""
    head = model.get_output_embeddings()
    if isinstance(head, LossHead):
        head.teacher = teacher


def tree_refusal(model: Any, sample: LayerSample = WHOLE_MODEL) -> str | None:
    """Check whether a batch may be a prefix tree of rows.

    All attention layers must be replaced, as the replacements derive from positions what each token attends to, and so
    must the output layer, as its loss can count a token several times. There must be no dropout, as a shared token
    would have one mask. Finally, the model must compute the same for a tree as for its rows, forward and backward.

    Args:
        model: A `PeftModel`, while it is accelerated.
        sample: See `Acceleration`.

    Returns:
        The reason if it may not, as the rest of a sentence about the model; None if it may.
    """
    base = model.get_base_model()
    if attn_implementation(base) != rowwise.UNMASKED:
        return "has attention that is not accelerated"
    if not isinstance(model.get_output_embeddings(), LossHead):
        return "has a loss that is not accelerated"
    if any(map(masks.drops_out, model.modules())):
        return "drops out values in training (as with lora_dropout above 0), and rows would share the mask of a prefix"
    return None if computes_trees(base, sample) else "computes something else for rows that share a prefix"


@contextmanager
def _restored(base: Any) -> Iterator[tuple[Any, Replaced]]:
    """Yields the base, and a list for the layers that are replaced inside; these are restored afterwards."""
    replaced: Replaced = []
    implementation = attn_implementation(base)
    try:
        yield base, replaced
    finally:
        if attn_implementation(base) != implementation:
            base.set_attn_implementation(implementation)
        restore(base, replaced)


def _check_attention(base: Any) -> str:
    """Replace the attention implementation of a model if it is one of `FLASH`, and the model then computes something
    else than with transformers' choice. Returns the reason, or an empty text."""
    own = attn_implementation(base)
    if own not in FLASH:
        return ""
    base.set_attn_implementation(STOCK_ATTENTION)
    check = ParityCheck(base)
    base.set_attn_implementation(own)
    if not check.runs or check.passes():
        return ""
    base.set_attn_implementation(STOCK_ATTENTION)
    return f"with {own} the model does not compute the same"


def _replace(
    base: Any,
    reader: Reader,
    replaced: Replaced,
    recognized: Mapping[nn.Module, Recognized],
    survey: AttentionSurvey,
    checks: KeptResults,
) -> tuple[list[Step], dict[str, str]]:
    """Replace layers on a CPU.

    Args:
        base: A causal language model of transformers.
        reader: Function that returns the linear layer and LoRA of a module.
        replaced: Receives path and module of each replaced layer.
        recognized: What is known of its layers.
        survey: The attention layers of the base.
        checks: What checks found before.

    Returns:
        The steps that replace the layers again, and the `fallbacks`.
    """
    weight = base.get_input_embeddings().weight
    kinds, reasons = _kinds(base, reader, survey, recognized)
    is_compiled = fused_ops(weight) is not reference
    if not is_compiled:
        kinds = []  # The model's own layers are faster than the reference.
    kinds.append(_lora(base, reader, kinds))
    found = checks.once("layers", list, partial(_compare, base, kinds, survey))
    differing = {kind.name: bool(kind.layers) for kind in kinds if kind.name not in found and _RUNS in found}
    reasons |= dict.fromkeys(differing, "with their kernels the model does not compute the same")
    if _RUNS not in found:
        reasons = dict.fromkeys(KINDS, "the model does not run on packed rows")
    kinds = [kind for kind in kinds if kind.name in found]
    steps: list[Step] = [kind.replace for kind in kinds]
    if _BY_ROWS in found:
        steps.append(partial(_register_rowwise, attn_implementation(base)))
    for step in steps:
        replaced += step(base)
    if not is_compiled:
        return steps, dict.fromkeys(KINDS, refusal(weight))
    complete = {kind.name for kind in kinds if kind.complete}
    if rowwise.attends_by_rows(base) and _all_fit(base, survey) and not differing.get("attention"):
        complete.add("attention")
    fallbacks = {name: reason for name, reason in reasons.items() if name not in complete}
    return steps, fallbacks


def _compare(base: Any, kinds: "Sequence[_Kind]", survey: AttentionSurvey) -> list[str]:
    """Compare what a model computes before and after layers are replaced. Returns the kinds of layers with which it
    computes the same; `_RUNS` if it runs on packed rows; `_BY_ROWS` if its own attention computes the same by rows."""
    check = ParityCheck(base, LONG_ROWS if any(kind.windows for kind in kinds) else ROWS, survey.sample)
    if not check.runs:
        return []
    with _restored(base) as (_, replaced):
        for kind in kinds:
            replaced += kind.replace(base)
        equal = [kind.name for kind in kinds]
        if kinds and not check.passes():
            for kind in reversed(kinds):
                kind.undo(base)
            check.prepare()
            equal = [kind.name for kind in kinds if kind.replace_if_equal(base, check, replaced)]
        is_own = survey.stock_masks and "attention" not in equal
        by_rows = is_own and rowwise.attend_by_rows(base, ParityCheck(base, LONG_ROWS, survey.sample).passes)
    return [_RUNS, *equal, *[_BY_ROWS] * by_rows]


@dataclass
class _Kind:
    """Layers that are replaced together, or not at all.

    Attributes:
        name: One of `KINDS`, or `LORA`.
        layers: Path, module and factory of each layer. The factory uses the weights and the adapter at call time.
        windows: Attention layers that are not replaced, but call the registered attention function → window, the most
            tokens that a token attends to.
        complete: Whether these are all layers of their kind.
        implementation: The model's own attention implementation.
    """

    name: str
    layers: list[tuple[str, nn.Module, Factory]]
    windows: dict[nn.Module, int | None]
    complete: bool
    implementation: str

    def replace(self, base: Any) -> Iterator[tuple[str, nn.Module]]:
        for name, module, factory in self.layers:
            replacement = factory()
            assert replacement is not None, name
            yield name, module
            base.set_submodule(name, replacement.train(module.training))
        if self.name == "attention" and self.complete:
            rowwise.register_by_positions(base, rowwise.UNMASKED, self.windows)
        elif self.name == "attention":
            rowwise.register(base, self.implementation)  # For the other layers of attention.

    def undo(self, base: Any) -> None:
        restore(base, [(name, module) for name, module, _ in self.layers])
        if self.name == "attention":
            base.set_attn_implementation(self.implementation)

    def replace_if_equal(self, base: Any, check: ParityCheck, replaced: Replaced) -> bool:
        """Replace the layers; undo it unless the whole model still computes the same."""
        replaced += self.replace(base)
        if check.passes():
            return True
        self.undo(base)
        return False


def _kinds(
    base: Any, reader: Reader, survey: AttentionSurvey, recognized: Mapping[nn.Module, Recognized]
) -> tuple[list[_Kind], dict[str, str]]:
    """The layers that can be replaced, by what they compute; and for each kind, why some cannot."""
    specs = survey.specs
    are_bounded = any(spec.cap for spec in specs.values())  # torch's kernel has no caps.
    fewest = None if are_bounded else sublayers.fewest_tokens(base.get_input_embeddings().weight)
    layouts = PerBatch(partial(Layout.of, whole=fewest))
    layers: dict[str, list[tuple[str, nn.Module, Factory]]] = {kind: [] for kind in KINDS}
    windows: dict[nn.Module, int | None] = {}
    others: dict[str, dict[str, str]] = {kind: {} for kind in KINDS}
    for name, module in list(base.get_decoder().named_modules(prefix=_decoder_path(base))):
        kind_by_name = next((kind for kind, ending in KINDS.items() if name.endswith(ending)), "")
        known = recognized.get(module, UNKNOWN)
        kind, factory = _factory(module, reader, specs.get(module), layouts, known.form)
        if name.endswith(".base_layer"):  # PEFT wraps it, as with LoRA on stacked experts.
            continue
        if factory() is not None:
            layers[kind].append((name, module, factory))
        elif module in specs and specs[module].placed and not masks.drops_out_within(module):
            windows[module] = specs[module].window
        elif kind_by_name or module in specs:
            others[kind_by_name or "attention"][name] = _why_not(module, specs.get(module), known)
    implementation = attn_implementation(base)
    kinds, reasons = [], {}
    for name, members in layers.items():
        rest = windows if name == "attention" else {}
        paths = {path for path, _, _ in members}
        missed = {reason for one, reason in others[name].items() if f"{one}.experts" not in paths}  # Else a router.
        reasons[name] = "; ".join(sorted(missed)) or "no such layer was found"
        complete = bool(members or rest) and not missed
        # Attention that is neither replaced nor given positions can go row by row.
        if complete or (members and (name != "attention" or (implementation in rowwise.STOCK and survey.stock_masks))):
            kinds.append(_Kind(name, members, rest, complete=complete, implementation=implementation))
    return kinds, reasons


def _lora(base: Any, reader: Reader, kinds: Sequence[_Kind]) -> _Kind:
    """Linear layers with LoRA in layers that are not replaced."""
    replaced = tuple(f"{name}." for kind in kinds for name, _, _ in kind.layers)
    layers: list[tuple[str, nn.Module, Factory]] = [
        (name, module, partial(replacements.replace_linear, module, reader))
        for name, module in base.named_modules()
        if not (f"{name}.".startswith(replaced) or has_hooks(module))
        and (part := reader(module)) is not None
        and part.down is not None
    ]
    return _Kind(LORA, layers, {}, complete=bool(layers), implementation=attn_implementation(base))


def _all_fit(base: Any, survey: AttentionSurvey) -> bool:
    """Whether the kernel supports all attention layers that are not replaced."""
    ending = KINDS["attention"]
    modules = [module for name, module in base.get_decoder().named_modules() if name.endswith(ending)]
    rest = [module for module in {*modules, *survey.modules} if not isinstance(module, replacements.Replacement)]
    return bool(rest) and all(module in survey.fitting and not masks.drops_out_within(module) for module in rest)


def _why_not(module: nn.Module, spec: AttentionSpec | None, known: Recognized) -> str:
    """Why a layer cannot be replaced."""
    name = type(module).__name__
    if any(not weight.is_floating_point() for weight in module.parameters()):
        return f"{name} is quantized"
    if spec is None and name.endswith("Attention"):
        return f"{name} has a mask, or an attention function, that no kernel knows"
    return f"{name} {known.reason or 'has weights, or an adapter, that no kernel knows'}"


def _decoder_path(base: Any) -> str:
    decoder = base.get_decoder()
    return next((name for name, module in base.named_modules() if module is decoder), "")


def _factory(
    module: nn.Module, reader: Reader, spec: AttentionSpec | None, layouts: PerBatch[Layout], form: str
) -> tuple[str, Factory]:
    """The kind of a layer, and the factory of the replacement of this form."""
    if form in GATED:
        return "feed-forward layers", partial(replacements.replace_gated, module, reader, **GATED[form])
    if form in EXPERTS:
        return "feed-forward layers", partial(replacements.replace_experts, module, **EXPERTS[form])
    if form in NORM:
        return "norms", partial(replacements.replace_norm, module, **NORM[form])
    if form in ATTENTION and spec is not None:
        options = ATTENTION[form]
        return "attention", partial(replacements.replace_attention, module, reader, spec, layouts, **options)
    return "", lambda: None


def _register_rowwise(own: str, base: Any) -> Replaced:
    """Make the model's own attention run row by row; no layer is replaced. own: its attention implementation."""
    rowwise.register(base, own)
    return []


def _replace_head(name: str, head: nn.Linear, scaling: Scaling, base: Any) -> Replaced:
    """Replace the output layer by one that computes the loss."""
    base.set_submodule(name, LossHead(head, scaling))
    return [(name, head)]
