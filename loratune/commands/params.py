"""The story of `loratune params`: exact counts from the model's configuration alone, before anything is downloaded."""

from dataclasses import dataclass

from loratune import memory
from loratune.config import RunConfig
from loratune.lora import attach, counts, targets
from loratune.lora.attach import PeftModel
from loratune.lora.counts import Count
from loratune.lora.module_names import number_of, pattern
from loratune.lora.targets import Targets
from loratune.model import device, load


@dataclass(frozen=True)
class Group:
    """Adapted modules of one place, shape and rank.

    role: one, or several joined by commas; shape: inputs and outputs of the layer; trainable: of all of them.
    """

    role: str
    pattern: str
    modules: int
    shape: tuple[int, int]
    rank: int
    trainable: int


@dataclass(frozen=True)
class Params:
    """What would be trained, and what it would take.

    layers: number of a layer → trained parameters in it; others: pattern → trained parameters outside the adapted
    modules (whole modules, tokens, biases); fused: pattern → the roles that one module serves; along: pattern → those
    of them that were not asked for; notes: what is better known; memory: for `batch` rows of `length` tokens.
    """

    count: Count
    groups: list[Group]
    layers: dict[int, int]
    others: dict[str, int]
    targets: dict[str, list[str]]
    fused: dict[str, tuple[str, ...]]
    along: dict[str, list[str]]
    notes: list[str]
    memory: memory.Estimate
    batch: int
    length: int

    @property
    def roles(self) -> dict[str, int]:
        """Role → trained parameters; roles that share a module are counted together, as `q, k, v`."""
        found: dict[str, int] = {}
        for group in self.groups:
            found[group.role] = found.get(group.role, 0) + group.trainable
        return found


def params(run: RunConfig) -> Params:
    """Count on the meta device: neither weights nor memory are needed, whatever the size of the model.

    Raises ModelError: no configuration to be had, or targets that find nothing.
    """
    base = load.build_meta(load.load_config(run.model), run.model)
    found = targets.find(base, run.lora)
    adapted = attach.attach(base, run.lora, found.peft(), seed=0)
    start = attach.initialize_adapter(adapted, run.lora)
    layers: dict[int, int] = {}
    for path in found.modules:
        if (number := number_of(path)) is not None:
            layers[number] = layers.get(number, 0) + counts.count_of(adapted, path)
    return Params(
        count=attach.count(adapted, start),
        groups=groups(adapted, found),
        layers=layers,
        others=_others(adapted, found),
        targets=found.entry_patterns(),
        fused=found.fused,
        along={place: roles for place, roles in found.shared_roles().items() if roles},
        notes=[*found.notes, *counts.notes(adapted)],
        memory=_memory(run, adapted),
        batch=run.training.per_device_train_batch_size,
        length=run.data.max_length,
    )


def _memory(run: RunConfig, adapted: PeftModel) -> memory.Estimate:
    """At the configured batch of rows of `max_length`, all of whose tokens are learnt."""
    batch, length = run.training.per_device_train_batch_size, run.data.max_length
    held = memory.Held(device.compute_dtype(run.model), run.model.quantization)
    rows = [(length, length - 1)] * batch
    return memory.estimate(adapted, rows, batch, run.training, held=held, device=device.device())


def groups(adapted: PeftModel, found: Targets) -> list[Group]:
    """The adapted modules by place, shape and rank, with all the roles that a place serves."""
    result = []
    for place, roles in found.module_patterns().items():
        alike: dict[tuple[tuple[int, int], int], list[int]] = {}
        for path in found.modules:
            if pattern(path) == place:
                kind = counts.shape_of(adapted, path), counts.rank_of(adapted, path)
                alike.setdefault(kind, []).append(counts.count_of(adapted, path))
        result += [
            Group(", ".join(roles), place, len(sizes), shape, rank, sum(sizes))
            for (shape, rank), sizes in alike.items()
        ]
    return result


def _others(adapted: PeftModel, found: Targets) -> dict[str, int]:
    """Trained parameters outside the factors of the adapted modules, by what they are called."""
    within = tuple(f"{path}." for path in found.modules)
    others: dict[str, int] = {}
    for name, size in counts.trained(adapted).items():
        if not name.startswith(within):
            others[pattern(name)] = others.get(pattern(name), 0) + size
    return others
