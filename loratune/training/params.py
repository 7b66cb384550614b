"""`loratune params`: counts parameters exactly, from the model's configuration alone. No weights are downloaded."""

from dataclasses import dataclass
from pathlib import Path

from loratune import memory, outputs
from loratune.codes import Code
from loratune.config import AUTO, RunConfig, Source
from loratune.config.portability import is_plain
from loratune.data.measured_rows import fit_length, measure
from loratune.data.rendering import Renderer
from loratune.errors import ConfigError, LoratuneError, Problem
from loratune.lora import adapter_files, creation, initialize, parameters, served
from loratune.lora.adapter_files import AdapterFiles
from loratune.lora.attach import PeftModel
from loratune.lora.module_names import number_of, parent, pattern
from loratune.lora.parameters import Count
from loratune.lora.served import SERVERS, Served
from loratune.lora.targets import Targets
from loratune.memory import Estimate
from loratune.model import load, quantization, tensor_files
from loratune.model.source import cached_directory
from loratune.system import accelerator
from loratune.training import auto
from loratune.training.init import estimate_rows
from loratune.training.retention import typical_texts


@dataclass(frozen=True)
class ModuleGroup:
    """Adapted modules, or parameters, with the same pattern, shape and rank.

    Attributes:
        role: The role of the modules; for fused modules, all roles, joined by commas.
        pattern: The common pattern of their paths.
        modules: The number of modules.
        shape: Input and output features of each layer, or of each of its experts.
        experts: The number of experts in each parameter; 1 for modules.
        rank: The rank of the adapter of each module or expert.
        trainable: The trainable parameters of all modules together.
    """

    role: str
    pattern: str
    modules: int
    shape: tuple[int, int]
    experts: int
    rank: int
    trainable: int


@dataclass(frozen=True)
class Params:
    """Trainable parameters, and the estimated memory for training.

    Attributes:
        count: The number of trainable parameters and of all parameters.
        groups: The adapted modules.
        layers: Layer number → its trainable parameters.
        others: Pattern → trainable parameters outside the adapted modules: whole modules, tokens, biases.
        targets: The adapted modules and parameters.
        notes: Lines for the user.
        memory: The estimate for a batch of `batch` rows of `length` tokens, all supervised.
        batch: Rows of a batch.
        length: Tokens of a row.
        device: What training here computes on, and in which dtype.
        rows_memory: The estimate for the rows of `data.train`; None if it names no local files.
    """

    count: Count
    groups: list[ModuleGroup]
    layers: dict[int, int]
    others: dict[str, int]
    targets: Targets
    notes: list[str]
    memory: memory.Estimate
    batch: int
    length: int
    device: str
    rows_memory: Estimate | None = None

    @property
    def roles(self) -> dict[str, int]:
        """Role → trainable parameters; roles that share a module are counted together, as `q, k, v`."""
        by_role: dict[str, int] = {}
        for group in self.groups:
            by_role[group.role] = by_role.get(group.role, 0) + group.trainable
        return by_role

    def to_dict(self) -> outputs.Params:
        """Plain values for `--json`."""
        return {
            "trainable": self.count.trainable,
            "total": self.count.total,
            "percent": self.count.percent,
            "adapter_bytes": self.count.adapter_bytes,
            "targets": self.targets.entry_patterns(),
            "roles": self.roles,
            "layers": self.layers,
            "others": self.others,
            "memory": self.memory.parts(),
            "rows_memory": self.rows_memory.parts() if self.rows_memory is not None else None,
            "device": self.device,
        }


def params(config: RunConfig) -> Params:
    """Count on the meta device, which needs no weights and little memory for any model size.

    Raises ModelError: the model's configuration cannot be read, its quantization cannot be trained, or the targets
    match no module; ConfigError: the rank is `auto`, which depends on the rows; and ConfigError, AdapterError: the
    adapter of `lora.start_from` does not fit.
    """
    if config.lora.r == AUTO and config.lora.start_from is None:
        what, fix = "auto is decided by the rows, and this command reads none", "loratune train --dry-run reads them"
        raise ConfigError(Problem(Code.CONFIG_CONFLICT, what, key="lora.r", fix=fix))
    config, start_from = _without_rows(config)
    model_config = load.load_config(config.model)
    model, targets = creation.adapt(base := load.build_meta(model_config, config.model), config.lora, seed=0)
    remarks = served.remarks(served.servers(model_config, type(base).__name__, parameters.layers_of(model)))
    adapter_init = creation.initialize_adapter(model, config.lora, start_from=start_from)
    batch, length = config.training.per_device_train_batch_size, config.data.max_length
    rows = [
        *[(length, length - 1)] * batch,
        *typical_texts(config, batch * length * config.training.gradient_accumulation_steps),
    ]
    planned = memory.Planned(quantization.held_as(config.model, model_config), load.device())
    layers: dict[int, int] = {}
    for path, layer in parameters.layers_of(model).items():
        if (number := number_of(path)) is not None:
            layers[number] = layers.get(number, 0) + parameters.count_of(layer)
    of_rows, unread = _of_rows(model, config, planned)
    return Params(
        count=creation.count(model, adapter_init),
        groups=_groups(model, targets),
        layers=layers,
        others=_others(model, targets),
        targets=targets,
        notes=[
            *tensor_files.notes(config.model, model_config),
            *targets.notes,
            *targets.shared_lines(),
            *remarks,
            *unread,
            *_refused(config),
        ],
        memory=memory.estimate(
            model, rows, len(rows), config.training, packed=config.data.packing != "none", planned=planned
        ),
        batch=batch,
        length=length,
        device=accelerator.describe(load.compute_dtype(config.model), spread=config.model.device_map is not None),
        rows_memory=of_rows,
    )


def _without_rows(config: RunConfig) -> tuple[RunConfig, AdapterFiles | None]:
    """A config with the choices of `auto` that do not depend on rows, and the adapter that it starts from."""
    start_from = adapter_files.inspect(Path(config.lora.start_from).expanduser()) if config.lora.start_from else None
    start = initialize.start_settings(start_from) if start_from else {}
    lora, _ = auto.decide_lora(config.lora, auto.Facts(start=start))
    return config.model_copy(update={"lora": lora}), start_from


def servers(run: RunConfig) -> dict[str, str]:
    """Server → the release that applies the adapter of a config, or why it does not.

    Only the configuration of the base is read, if it is on this machine.
    """
    if cached_directory(run.model) is None:
        return dict.fromkeys(SERVERS.values(), "unknown, as the base is not on this machine")
    try:
        run, _ = _without_rows(run)
        config = load.load_config(run.model)
        model, _ = creation.adapt(base := load.build_meta(config, run.model), run.lora, seed=0)
        found = served.servers(config, type(base).__name__, parameters.layers_of(model))
    except LoratuneError as error:
        return dict.fromkeys(SERVERS.values(), f"unknown: {error}")
    if not is_plain(run.lora.model_copy(update={"target_parameters": None})):
        found = dict.fromkeys(found, "it is not plain LoRA; `loratune merge` makes a model of it")
    texts = {}
    for client, one in found.items():
        is_exported = client != "vllm" or run.lora.target_parameters or (isinstance(one, Served) and one.is_renamed)
        after = f", after `loratune export --to {client}`" if is_exported else ""
        texts[SERVERS[client]] = f"not applied: {one}" if isinstance(one, str) else f"{one}{after}"
    return texts


def _refused(config: RunConfig) -> list[str]:
    """A line on each setting with which training would not start on this machine."""
    try:
        load.check_kernels(config.model, gpu=load.device().type != "cpu")
    except ConfigError as error:
        return [f"train would stop here: {problem}" for problem in error.problems]
    return []


def _of_rows(model: PeftModel, config: RunConfig, planned: memory.Planned) -> tuple[memory.Estimate | None, list[str]]:
    """The memory for the largest batch of the training rows, None if they are not in local files; and why they cannot
    be read."""
    sources = [config.data.train] if isinstance(config.data.train, Source) else config.data.train
    if not all(Path(source.path).expanduser().exists() for source in sources):
        return None, []
    vocabulary = model.config.get_text_config().vocab_size
    try:
        tokenizer = load.load_tokenizer(config.model, config.data.chat_template)
        renderer = Renderer(tokenizer, vocabulary, config.data.chat_template_kwargs)
        rows, _ = measure(config.data, renderer, vocabulary)
        rows, _ = fit_length(rows, config.data, renderer, vocabulary)
    except LoratuneError as error:
        return None, [f"the memory for the rows of data.train is not known: {error.problems[0]}"]
    return estimate_rows(model, config, rows, planned.weight_format or "none", with_texts=True), []


def _groups(model: PeftModel, targets: Targets) -> list[ModuleGroup]:
    """The targets grouped by pattern, shape and rank, each with all its roles."""
    groups, layers = [], parameters.layers_of(model)
    for module_pattern, roles in targets.module_patterns().items():
        sizes_by_kind: dict[tuple[tuple[int, int], int, int], list[int]] = {}
        for path in targets.paths:
            if pattern(path) == module_pattern:
                layer = layers[path]
                shape = layer.in_features, layer.out_features
                kind = shape, parameters.experts_of(layer), int(layer.r["default"])
                sizes_by_kind.setdefault(kind, []).append(parameters.count_of(layer))
        groups += [
            ModuleGroup(", ".join(roles), module_pattern, len(sizes), *kind, sum(sizes))
            for kind, sizes in sizes_by_kind.items()
        ]
    return groups


def _others(model: PeftModel, targets: Targets) -> dict[str, int]:
    """Trainable parameters outside the adapted modules, by name pattern."""
    prefixes = (*(f"{path}." for path in targets.modules), *(f"{parent(path)}.lora_" for path in targets.parameters))
    others: dict[str, int] = {}
    for name, size in parameters.trained_sizes(model).items():
        if not name.startswith(prefixes):
            others[pattern(name)] = others.get(pattern(name), 0) + size
    return others
