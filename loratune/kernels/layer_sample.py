"""Which layers of a model compute alike, so that a check of the whole model can leave out most of them.

Layers are of one kind if nothing but their weights and their number differs: they have the same modules, settings,
tensors and hooks, get the same mask and arguments of attention, and each list in the configuration with an entry for
every layer has the same entry for them. In a check, the first and the last layer of each kind compute, and all others
return the states that they receive. What reaches a layer is otherwise the model's own: its masks, its positions, and
its number.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedConfig

from loratune.kernels.upstream import has_hooks

NUMBERS = frozenset({"layer_idx", "layer_id", "layer_index", "layer_number", "target_name"})
"""Attributes with the number of a layer, or the path of a module. Under another name, a number makes each layer a kind
of its own."""
_DEPTH = 6
"""How deep the attributes of other objects are compared; below that, by identity."""


Found = TypeVar("Found")


class StandIn(nn.Module):
    """A module in the place of another one, from which it takes the attributes that it does not have: some families
    read attributes of a layer besides calling it."""

    def __init__(self, original: nn.Module):
        super().__init__()
        self._original = [original]  # In a list, so that it is not registered as a child.

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_original" not in self.__dict__:
                raise
            return getattr(self.__dict__["_original"][0], name)


class _LeftOut(StandIn):
    """A layer that returns the states that it receives. size: that of the tuple in which the layer returns them; 0 if
    it returns them alone."""

    def __init__(self, original: nn.Module, size: int):
        super().__init__(original)
        self._size = size

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """args, kwargs: the arguments of the layer."""
        states = args[0] if args else kwargs["hidden_states"]
        return (states, *[None] * (self._size - 1)) if self._size else states


@dataclass(frozen=True)
class LayerSample:
    """The layers that stand for all layers of a model.

    Attributes:
        stack: All layers.
        left_out: Number of each layer that is not in the sample → in what it returns its states, see `_LeftOut`.
    """

    stack: nn.ModuleList = field(default_factory=nn.ModuleList)
    left_out: Mapping[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, base: Any, returned: Mapping[nn.Module, int], calls: Mapping[nn.Module, Any]) -> "LayerSample":
        """The sample of a causal language model of transformers.

        Args:
            base: The model.
            returned: What `watched` found in a pass of the model.
            calls: Attention module → what it was called with in this pass, apart from values.
        """
        if (stack := stack_of(base)) is None:
            return WHOLE_MODEL
        by_kind: dict[str, list[int]] = {}
        for number, layer in enumerate(stack):
            by_kind.setdefault(_kind(base, layer, number, len(stack), calls), []).append(number)
        kept = {number for numbers in by_kind.values() for number in (numbers[0], numbers[-1])}
        others = (number for number in range(len(stack)) if number not in kept and stack[number] in returned)
        return cls(stack, {number: returned[stack[number]] for number in others})

    @property
    def kept(self) -> list[nn.Module]:
        """The layers in the sample."""
        return [layer for number, layer in enumerate(self.stack) if number not in self.left_out]

    @contextmanager
    def recorded(self) -> Iterator["Record"]:
        """Inside, records what goes through the layers in the sample."""
        record = Record()

        def record_layer(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            states, found = args[0] if args else kwargs.get("hidden_states"), _first(output)
            if all(isinstance(one, Tensor) and one.requires_grad for one in (states, found)):
                record.passed.append((states, found))

        def record_part(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(found := _first(output), Tensor) and found.is_floating_point():
                record.outputs.append(found.detach().clone())

        handles = [layer.register_forward_hook(record_layer, with_kwargs=True) for layer in self.kept]
        handles += [part.register_forward_hook(record_part) for layer in self.kept for part in layer.children()]
        try:
            yield record
        finally:
            for handle in handles:
                handle.remove()

    def examined(self, look: Callable[[], Found | None]) -> Found | None:
        """What a function finds with the sample alone; if that is nothing, as the model may not run so, with all
        layers."""
        with self.alone():
            found = look()
        return look() if found is None and self.left_out else found

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, all other layers return the states that they receive."""
        layers = {number: self.stack[number] for number in self.left_out}
        try:
            for number, layer in layers.items():
                self.stack[number] = _LeftOut(layer, self.left_out[number])
            yield
        finally:
            for number, layer in layers.items():
                self.stack[number] = layer


@dataclass(frozen=True)
class Record:
    """What went through layers.

    Attributes:
        outputs: What each of their children returned, such as attention: without the states that pass by it.
        passed: The states that each layer received, and those that it returned.
    """

    outputs: list[Tensor] = field(default_factory=list)
    passed: list[tuple[Tensor, Tensor]] = field(default_factory=list)


WHOLE_MODEL = LayerSample()
"""The sample that leaves out no layer."""


def stack_of(base: Any) -> nn.ModuleList | None:
    """The list of all layers of a causal language model of transformers; None if there is no single such list."""
    decoder, settings = base.get_decoder(), base.config.get_text_config()
    count = getattr(settings, "num_hidden_layers", 0)
    lists = [module for module in decoder.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    is_single = lists and {*lists} <= {*lists[0].modules()}  # Those inside of layers, such as experts, do not count.
    return lists[0] if is_single else None


@contextmanager
def watched(base: Any) -> Iterator[dict[nn.Module, int]]:
    """Inside, records in what each layer returns its states, see `_LeftOut`; not of layers that return more."""
    returned: dict[nn.Module, int] = {}

    def record(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        states, found = args[0] if args else kwargs.get("hidden_states"), output
        if isinstance(output, tuple) and output and all(other is None for other in output[1:]):
            found = output[0]
        if isinstance(states, Tensor) and isinstance(found, Tensor) and _shape(states) == _shape(found):
            returned[layer] = len(output) if isinstance(output, tuple) else 0

    handles = [layer.register_forward_hook(record, with_kwargs=True) for layer in stack_of(base) or ()]
    try:
        yield returned
    finally:
        for handle in handles:
            handle.remove()


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) and output else output


def _shape(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.dtype, tensor.device


def _kind(base: Any, layer: nn.Module, number: int, count: int, calls: Mapping[nn.Module, Any]) -> str:
    """A text that is equal for layers of one kind."""
    parts: list[Any] = []
    for owner in (base, base.get_decoder(), base.config, base.config.get_text_config()):
        lists = ((name, value) for name, value in vars(owner).items() if isinstance(value, list | tuple))
        parts += [(name, described(value[number])) for name, value in lists if len(value) == count]
    parts += [(name, described_module(module), calls.get(module)) for name, module in layer.named_modules()]
    return repr(parts)


def described_module(module: nn.Module) -> Any:
    """What determines what a module computes, apart from its children and the values of its tensors."""
    tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    plain = {name: value for name, value in vars(module).items() if name not in NUMBERS and name not in _OF_TORCH}
    is_changed = "forward" in vars(module) or has_hooks(module)  # By code that may do anything.
    return (
        _name(type(module)),
        id(module) if is_changed else None,
        [(name, described(value)) for name, value in sorted(plain.items())],
        [(name, described(one), _shape(one), one.requires_grad, one.stride()) for name, one in tensors],
    )


_OF_TORCH = frozenset(vars(nn.Module())) - {"training"}
"""Attributes that each module has."""


def described(value: Any, depth: int = _DEPTH, identity: Callable[[Any], Any] = id) -> Any:
    """A value as something whose `repr` is equal for equal values: the contents of containers and of plain objects,
    the types of tensors, the names of functions and classes, and the identity of anything else."""
    inner = partial(described, depth=depth - 1, identity=identity)
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return value
    if isinstance(value, Tensor):  # Of what a layer keeps between passes, such as outliers in 8 bit, the shape varies.
        return _name(type(value)), value.dtype, value.dim()
    if isinstance(value, list | tuple | set | frozenset | dict) and depth:
        values = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
        pairs = values.items() if isinstance(values, dict) else enumerate(values)
        return _name(type(value)), [(str(key), inner(one)) for key, one in pairs if key not in NUMBERS]
    if isinstance(value, partial):
        return "partial", described([value.func, value.args, value.keywords], depth, identity)
    if isinstance(value, type) or hasattr(value, "__qualname__"):
        cells = getattr(value, "__closure__", None) or ()
        return _name(value), inner([cell.cell_contents for cell in cells]) if depth else identity(value)
    if isinstance(value, nn.Module) and depth and _is_function(value):
        own = {name: one for name, one in vars(value).items() if name not in _OF_TORCH}
        return _name(type(value)), identity(type(value)), inner(own)
    if isinstance(value, PreTrainedConfig | nn.Module) or not hasattr(value, "__dict__") or not depth:
        return _name(type(value)), str(value) if type(value).__module__ == "torch" else identity(value)
    return _name(type(value)), inner(vars(value))


def _is_function(module: nn.Module) -> bool:
    """Whether a module only stands for a function: transformers 5.25 has such copies of one as attributes of layers."""
    parts = module.parameters(), module.buffers(), module.children()
    return not has_hooks(module) and all(next(iter(part), None) is None for part in parts)


def _name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"
