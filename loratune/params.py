"""The story of `loratune params`: exact counts from the model's configuration alone, before anything is downloaded."""

from dataclasses import dataclass, replace

from loratune import adapter, model, targets
from loratune.adapter import Count, PeftModel
from loratune.config import LoraSection, ModelSection
from loratune.errors import AdapterError, ModelError
from loratune.preflight import Opened
from loratune.targets import Targets


@dataclass(frozen=True)
class Group:
    """Modules of one place and shape.

    role: one, or several joined by commas; shape: inputs and outputs of the linear layer; trainable: of all of them.
    """

    role: str
    pattern: str
    modules: int
    shape: tuple[int, int]
    trainable: int


@dataclass(frozen=True)
class Params:
    """What would be trained. notes: what is lawful and of no use; fused: pattern → the roles that one module serves."""

    count: Count
    groups: list[Group]
    targets: dict[str, list[str]]
    notes: list[str]
    fused: dict[str, tuple[str, ...]]


def params(section: ModelSection, lora: LoraSection) -> Params:
    """Count on the meta device: neither weights nor memory are needed, whatever the size of the model.

    Raises ModelError: no configuration to be had, or targets that find nothing.
    """
    base = model.build_meta(model.load_config(section), section)
    found = targets.resolve(base, lora.target_modules, lora.layers_to_transform)
    adapted = adapter.attach(base, lora, found.names, seed=0)
    return _counted(adapted, found)


def params_of_adapter(opened: Opened) -> Params:
    """Count what an adapter directory holds, from its configuration and that of its base.

    Raises AdapterError, ModelError.
    """
    saved = opened.saved
    base = model.build_meta(model.load_config(opened.base), opened.base)
    asked = opened.run.lora.target_modules if opened.run else saved.config["target_modules"]
    try:
        found = targets.resolve(base, asked, saved.config.get("layers_to_transform"))
    except ModelError as error:  # it is the adapter that names what its base lacks
        raise AdapterError(
            [
                replace(problem, where=str(saved.path), what=f"does not fit its base {saved.base}: {problem.what}")
                for problem in error.problems
            ]
        ) from None
    return _counted(adapter.attach_saved(base, saved), found)


def _counted(adapted: PeftModel, found: Targets) -> Params:
    return Params(adapter.count(adapted), groups(adapted, found), found.patterns(), adapter.notes(adapted), found.fused)


def groups(adapted: PeftModel, found: Targets) -> list[Group]:
    """The adapted modules by place and shape, with all the roles that a place serves."""
    result = []
    for pattern, roles in found.places().items():
        shapes: dict[tuple[int, int], list[int]] = {}
        for path in found.modules:
            if targets.pattern(path) == pattern:
                shapes.setdefault(adapter.shape_of(adapted, path), []).append(adapter.count_of(adapted, path))
        result += [Group(", ".join(roles), pattern, len(sizes), shape, sum(sizes)) for shape, sizes in shapes.items()]
    return result
