"""Every setting has an effect: each field of each section, changed alone, changes the object that is built from it."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ATTENTION, CHAT_TEMPLATE, Ran, decided_training, tiny_llama, write_rows
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedTokenizerFast

from loratune import data, kernels
from loratune.compare.objectives import AnswerScores, Formula
from loratune.config import (
    DataSection,
    LoraSection,
    ModelSection,
    PreferenceSection,
    RunConfig,
    Source,
    TrainingSection,
)
from loratune.config.schema import PREFERENCE_KEYS
from loratune.data.packing import BatchLayout
from loratune.data.rendering import Renderer
from loratune.errors import DataError, ModelError
from loratune.lora import adapter_files, attach, creation, parameters, targets
from loratune.model import load as load_module
from loratune.training import batching, time_budget, upstream
from loratune.training.callbacks import BestStep, trackers
from loratune.training.checkpoints.store import BestRecord
from loratune.training.schedule import Seconds

LORA: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 5,
    "lora_dropout": 0.25,
    "target_modules": ["q"],
    "target_parameters": ["experts"],
    "bias": "all",
    "use_rslora": True,
    "use_dora": True,
    "init_lora_weights": "gaussian",
    "use_lorafa": True,
    "loraplus_lr_ratio": 4.0,
    "layers_to_transform": [1],
    "rank_pattern": {"q": 4},
    "alpha_pattern": {"q": 4},
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": [1, 2],
    "start_from": "other",
}
TRAINING: dict[str, Any] = {
    "objective": "dpo",
    "learning_rate": 1e-3,
    "num_train_epochs": 2.5,
    "max_steps": 7,
    "max_minutes": 2.5,
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "warmup_steps": 0.1,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.01,
    "max_grad_norm": 0.5,
    "optim": "adafactor",
    "seed": 7,
    "logging_steps": 3,
    "save_steps": 5,
    "eval_steps": 4,
    "keep": "last",
    "patience": 3,
    "report_to": ["tensorboard"],
    "ddp_timeout": 60,
    "activation_checkpointing": True,
}
MODEL: dict[str, Any] = {
    "name_or_path": "other",
    "revision": "v2",
    "gguf_file": "other.gguf",
    "dtype": "bfloat16",
    "quantization": "4bit",
    "attn_implementation": "eager",
    "device_map": "auto",
    "trust_remote_code": True,
    "torch_compile": True,
    "use_liger_kernel": True,
}
DATA: dict[str, Any] = {
    "train": {"path": "other.jsonl"},
    "validation": 0.5,
    "test": {"path": "other.jsonl"},
    "group_by": "topic",
    "max_train_samples": 1,
    "sample_by": "paragraph",
    "format": "text",
    "columns": {"prompt": "system", "completion": "prompt"},
    "labels": {"cccc": "d"},
    "chat_template": "other.jinja",
    "chat_template_kwargs": {"tone": "dry"},
    "reasoning": "mask",
    "empty_reasoning": "context",
    "loss_on": "all",
    "prompt_loss_weight": 0.5,
    "max_length": 24,
    "truncation": "drop",
    "stride": 4,
    "invalid_rows": "drop",
    "max_dropped": 0.0,
    "packing": "full",
    "share_prefixes": False,
    "replay": 0.5,
}


PREFERENCES: dict[str, Any] = {
    "beta": 0.3,
    "label_smoothing": 0.1,
    "simpo_gamma": 0.5,
    "sft_weight": 0.2,
    "desirable_weight": 2.0,
    "undesirable_weight": 2.0,
}


@pytest.mark.parametrize(
    "section, changes",
    [
        (LoraSection, LORA),
        (TrainingSection, TRAINING),
        (ModelSection, MODEL),
        (DataSection, DATA),
        (PreferenceSection, PREFERENCES),
    ],
)
def test_every_field_is_changed_in_this_file(section: Any, changes: dict[str, Any]) -> None:
    assert list(changes) == list(section.model_fields)


# LoraSection → the model that `creation.attach` builds


def attached(section: LoraSection) -> tuple[dict[str, Any], dict[str, Any]]:
    """PEFT's configuration, and what it built: shape, scaling, dropout, values and learning rates of its weights."""
    base = tiny_llama(attention_bias=True)
    built = creation.attach(base, section, targets.find(base, section).peft(), seed=0)
    settings = built.peft_config["default"].to_dict()
    layers = {
        name: (repr(module), getattr(module, "scaling", None))
        for name, module in built.named_modules()
        if hasattr(module, "lora_A")
    }
    trained = {name: weight.tolist() for name, weight in built.named_parameters() if weight.requires_grad}
    kind, keywords = parameters.choose_optimizer(built, section, (torch.optim.AdamW, {"lr": 1.0}), 0.0)
    rates = [group["lr"] for group in keywords.get("params", [])]
    return settings, {"layers": layers, "trained": trained, "optimizer": (kind, rates)}


@pytest.fixture(scope="module")
def default_lora() -> tuple[dict[str, Any], dict[str, Any]]:
    return attached(LoraSection(**ATTENTION))


def test_the_same_section_builds_the_same_model(default_lora: tuple[dict[str, Any], dict[str, Any]]) -> None:
    settings, parts = attached(LoraSection(**ATTENTION))
    assert {name: value for name, value in settings.items() if value != default_lora[0][name]} == {}
    assert parts == default_lora[1]


@pytest.mark.parametrize(
    "name, value", [item for item in LORA.items() if item[0] not in ("start_from", "target_parameters")]
)
def test_each_lora_field_changes_the_adapter(
    default_lora: tuple[dict[str, Any], dict[str, Any]], name: str, value: Any
) -> None:
    settings, parts = attached(LoraSection(**ATTENTION | {name: value}))
    ours = {"use_lorafa", "loraplus_lr_ratio"}  # optimizer settings, which are not in PEFT's configuration
    assert {key for key in settings if settings[key] != default_lora[0][key]} == {name} - ours
    assert parts != default_lora[1]


def test_lora_target_parameters_adds_weights() -> None:
    """For a mixture of experts; see also `test_experts`."""
    shape = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    base: Any = AutoModelForCausalLM.from_config(MixtralConfig(vocab_size=264, num_key_value_heads=2, **shape))

    def built(section: LoraSection) -> set[str]:
        model = copy.deepcopy(base)
        return {*attach.weights(creation.attach(model, section, targets.find(model, section).peft(), seed=0))}

    changed = LoraSection(**ATTENTION, target_parameters=LORA["target_parameters"])
    assert built(LoraSection(**ATTENTION)) < built(changed)


def test_lora_start_from_changes_only_values(tmp_path: Path) -> None:
    """See also `test_continuing`."""

    def started(section: LoraSection) -> tuple[Any, dict[str, Any]]:
        base = tiny_llama()
        built = creation.attach(base, section, targets.find(base, section).peft(), seed=0, base_name="base")
        files = adapter_files.inspect(Path(section.start_from)) if section.start_from else None
        creation.initialize_adapter(built, section, start_from=files)
        return built, {name: weight.tolist() for name, weight in built.named_parameters() if weight.requires_grad}

    model, values = started(LoraSection(**ATTENTION))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(weight.requires_grad)
    state = {name: tensor.clone() for name, tensor in attach.weights(model).items()}
    attach.write(model, tmp_path / LORA["start_from"], state)
    other, others = started(LoraSection(**ATTENTION, start_from=str(tmp_path / LORA["start_from"])))
    assert other.peft_config["default"].to_dict() == model.peft_config["default"].to_dict()
    assert others.keys() == values.keys()
    assert others != values


# TrainingSection → TrainingArguments

OURS = ("objective", "keep", "max_minutes", "patience", "report_to")
"""Keys of the section that are not in TrainingArguments."""


@pytest.mark.parametrize(
    "name, value",
    [item for item in TRAINING.items() if item[0] not in OURS],
)
def test_each_training_field_changes_the_arguments(tmp_path: Path, name: str, value: Any) -> None:
    default, changed = (
        upstream.training_arguments(section, tmp_path, has_validation=True).to_dict()
        for section in (decided_training(), decided_training(**{name: value}))
    )
    follows = {
        "per_device_train_batch_size": {"per_device_eval_batch_size"},
        "eval_steps": {"eval_strategy", "do_eval"},
        "activation_checkpointing": {
            "activation_checkpointing_kwargs",
            "gradient_checkpointing",
            "gradient_checkpointing_kwargs",
        },
    }
    differing = {key for key in default if default[key] != changed[key]}
    assert changed[name] == value
    assert differing == {name} | follows.get(name, set())


def test_training_keep_and_patience() -> None:
    """Their effect on a run is tested in `test_keep`."""
    config = {"model": {"name_or_path": "a"}, "data": {"train": "b", "validation": 0.5}, "output_dir": "c"}
    kept = [
        RunConfig.model_validate(config | {"training": {"keep": name}}).keeps_best for name in (None, TRAINING["keep"])
    ]
    assert kept == [True, False]
    record = BestRecord(1, 2.0, evaluations=4, since=3)
    waited = [BestStep(keep=True, patience=patience, record=record) for patience in (None, TRAINING["patience"])]
    assert [best.is_exhausted for best in waited] == [False, True]


SCORES = [AnswerScores(*map(torch.tensor, ([-3.0, -8.0], [2, 5], [-4.0, -8.5]))) for _ in range(2)]


@pytest.mark.parametrize(("name", "value"), PREFERENCES.items())
def test_each_preference_field_changes_the_losses_that_use_it(name: str, value: float) -> None:
    """It is refused with the objectives that do not use it."""
    for objective in ("dpo", "orpo", "simpo", "kto"):
        values = {"model": {"name_or_path": "a"}, "data": {"train": "b"}, "output_dir": "c"}
        values |= {"training": {"objective": objective}, "preferences": {name: value}}
        if objective not in PREFERENCE_KEYS[name]:
            with pytest.raises(ValidationError, match="does not read it"):
                RunConfig.model_validate(values)
            continue
        losses = []
        for section in (PreferenceSection(), RunConfig.model_validate(values).preferences):
            formula = Formula.of(objective, section)
            if objective == "kto":
                losses.append(formula.answer_losses(SCORES[0], torch.tensor([True, False]), 0.5).tolist())
            else:
                losses.append(formula.pair_losses(SCORES[0], SCORES[1].take(torch.tensor([1, 0]))).tolist())
        assert losses[0] != losses[1]


def test_training_max_minutes() -> None:
    """The effect of a time budget on whole runs is tested in `test_time_budget`."""
    seconds = Seconds(np.ones(10), evaluation=0.0, checkpoint=0.0, end=0.0)
    assert time_budget.steps_within(60 * TRAINING["max_minutes"], seconds.of_steps, 10**6) == 142  # 95 % of 150


def test_training_report_to(tmp_path: Path) -> None:
    """Trackers are loratune's own callbacks; whole runs are tested in `test_trackers`."""
    counts = [len(trackers(names, tmp_path, is_resumed=False)) for names in ([], TRAINING["report_to"] * 2)]
    assert counts == [0, 1]


# ModelSection → what `model.load_base` and `model.load_config` return


def test_model_dtype_quantization_and_attention(tiny_dir: Path) -> None:
    def loaded(**changes: Any) -> tuple[Any, ...]:
        base = load_module.load_base(ModelSection(name_or_path=str(tiny_dir), **({"dtype": "float32"} | changes)))
        projection = type(base.get_submodule("model.layers.0.self_attn.q_proj")).__name__
        return str(base.dtype), projection, base.config._attn_implementation

    default = loaded()
    assert default == ("torch.float32", "Linear", "sdpa")
    assert loaded(dtype=MODEL["dtype"]) == ("torch.bfloat16", *default[1:])
    assert loaded(attn_implementation=MODEL["attn_implementation"]) == (*default[:2], "eager")
    assert loaded(quantization=MODEL["quantization"])[1] == "Dequantized4bit"
    assert loaded(quantization="8bit")[1] == "Dequantized8bit"


def test_model_device_map(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The argument passed to transformers is checked: without a GPU, the returned model shows no difference."""
    device_maps, load = [], AutoModelForCausalLM.from_pretrained

    def spy(*arguments: Any, **keywords: Any) -> Any:
        device_maps.append(keywords["device_map"])
        return load(*arguments, **keywords)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spy)
    for name in (None, MODEL["device_map"]):
        load_module.load_base(ModelSection(name_or_path=str(tiny_dir), device_map=name))
    assert device_maps == [None, "auto"]


def test_model_name(tiny_dir: Path, tmp_path: Path) -> None:
    tiny_llama(num_hidden_layers=3).config.save_pretrained(tmp_path)
    layers = [
        load_module.load_config(ModelSection(name_or_path=str(path))).num_hidden_layers for path in (tiny_dir, tmp_path)
    ]
    assert layers == [2, 3]


def test_model_gguf_file(tiny_dir: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        load_module.load_config(ModelSection(name_or_path=str(tiny_dir), gguf_file=MODEL["gguf_file"]))


def counted(forked: Callable[..., Ran], config: Path, home: Path) -> int:
    """Runs `loratune params` as a process without a network, with its own hub cache."""
    settled = f"""
import huggingface_hub.constants, transformers.dynamic_module_utils
huggingface_hub.constants.HF_HUB_CACHE, huggingface_hub.constants.HF_HUB_OFFLINE = {str(home / "hub")!r}, True
transformers.dynamic_module_utils.HF_MODULES_CACHE = {str(home / "modules")!r}
"""
    ran = forked("params", config, "--json", first=settled)
    assert ran.code == 0, ran.err
    return int(json.loads(ran.out)["trainable"])


PER_LAYER = 8 * (64 + 48 + 48 + 64)  # r times inputs + outputs of q, k, v, o


def test_model_revision_selects_the_weights(
    run_config: Callable[..., Path], tmp_path: Path, forked: Callable[..., Ran]
) -> None:
    cached = tmp_path / "hub" / "models--owner--name"
    (cached / "refs").mkdir(parents=True)
    for revision, layers in (("main", 2), (MODEL["revision"], 3)):
        (cached / "refs" / revision).write_text(str(layers) * 40)
        tiny_llama(num_hidden_layers=layers).config.save_pretrained(cached / "snapshots" / (str(layers) * 40))
    config = run_config(model={"name_or_path": "owner/name", "revision": MODEL["revision"]})
    assert counted(forked, config, tmp_path) == 3 * PER_LAYER


def test_model_trust_remote_code(run_config: Callable[..., Path], tmp_path: Path, forked: Callable[..., Ran]) -> None:
    custom, executed = tmp_path / "custom", tmp_path / "executed"
    tiny_llama().config.save_pretrained(custom)
    settings = json.loads((custom / "config.json").read_text())
    settings |= {"model_type": "mine", "architectures": ["MyForCausalLM"]}
    settings |= {"auto_map": {"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.MyForCausalLM"}}
    (custom / "config.json").write_text(json.dumps(settings))
    (custom / "mine.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"open({str(executed)!r}, 'w').close()\n"
        "class MyConfig(LlamaConfig):\n    model_type = 'mine'\n"
        "class MyForCausalLM(LlamaForCausalLM):\n    config_class = MyConfig\n"
    )
    section = {"name_or_path": str(custom), "revision": "pinned"}
    with pytest.raises(ModelError, match=r"model\.trust_remote_code"):
        load_module.load_config(ModelSection(name_or_path=str(custom)))
    assert not executed.exists()
    config = run_config(model=section | {"trust_remote_code": MODEL["trust_remote_code"]})
    assert counted(forked, config, tmp_path) == 2 * PER_LAYER
    assert executed.exists()


# DataSection → the ids and labels that are supervised


@pytest.fixture
def prepared(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[..., Any]:
    """Fingerprints of train and validation under a DataSection with changed fields."""
    for name, letter in (("rows", "a"), ("other", "b")):
        rows = [
            {"prompt": letter * 8, "completion": "c" * length, "text": "plain", "system": "s", "topic": length // 13}
            for length in (4, 12, 40)
        ]
        write_rows(tmp_path / f"{name}.jsonl", rows)
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "<think>so</think>ho"}]
    write_rows(tmp_path / "chat.jsonl", [{"messages": chat}] * 3)
    (tmp_path / "lines.txt").write_text("a\nb\n")
    (tmp_path / "other.jinja").write_text(CHAT_TEMPLATE.replace("<|end|>", "!<|end|>"))
    (tmp_path / "tone.jinja").write_text("{{ tone }}" + CHAT_TEMPLATE)

    def run(**changes: Any) -> Any:
        values: dict[str, Any] = {"train": {"path": "rows.jsonl"}, "format": "prompt_completion"} | changes
        for name in {"train", "test"} & values.keys():
            values[name] = {"path": str(tmp_path / values[name]["path"])}
        if "chat_template" in values:
            values["chat_template"] = str(tmp_path / values["chat_template"])
        section = DataSection(**values)
        words = load_module.load_tokenizer(ModelSection(name_or_path=str(tmp_path / "words")), section.chat_template)
        renderer = Renderer(words, None, section.chat_template_kwargs)
        rows = data.read_datasets(section, seed=1)
        datasets = [data.prepare(split, renderer, section, 264) for split in rows.splits.values()]
        packing, length = section.packing, section.max_length
        batches = [BatchLayout(each.rows, each.rows.lengths, packing, 4, length, 0) for each in datasets]
        return [(dataset.fingerprint, len(batch.items)) for dataset, batch in zip(datasets, batches, strict=True)]

    tokenizer.save_pretrained(tmp_path / "words")
    return run


ELSEWHERE = ("invalid_rows", "max_dropped", "replay", "share_prefixes", "prompt_loss_weight", "empty_reasoning")


@pytest.mark.parametrize("name, value", [item for item in DATA.items() if item[0] not in ELSEWHERE])
def test_each_data_field_changes_the_prepared_rows(prepared: Callable[..., Any], name: str, value: Any) -> None:
    base: dict[str, Any] = {
        "chat_template": {"train": {"path": "chat.jsonl"}, "format": "messages"},
        "chat_template_kwargs": {
            "train": {"path": "chat.jsonl"},
            "format": "messages",
            "chat_template": "tone.jinja",
        },
        "reasoning": {"train": {"path": "chat.jsonl"}, "format": "messages"},
        "truncation": {"max_length": 16, "max_dropped": 1.0},
        "max_length": {"max_dropped": 1.0},
        "group_by": {"validation": 0.4},
        "sample_by": {"train": {"path": "lines.txt"}, "format": "text"},
        "stride": {"format": "text", "columns": {"text": "completion"}, "max_length": 16},
    }.get(name, {})
    assert prepared(**base) == prepared(**base)
    assert prepared(**base) != prepared(**base | {name: value})


def test_sharing_prefixes_can_be_set() -> None:
    """Whole runs are tested in `test_prefix_runs`."""
    model, lora = tiny_llama(), LoraSection(r=2, lora_alpha=4, **ATTENTION)
    adapted = creation.attach(model, lora, targets.find(model, lora).peft(), seed=0)
    rows = [{"input_ids": [*range(20), number], "labels": [*range(20), number]} for number in range(20, 24)]
    layout = BatchLayout(rows, np.full(4, 21), "batch", 4, 21, 0)
    acceleration = kernels.accelerate(adapted, attach.adapted_linear)
    with acceleration.applied(adapted):
        shared, notes = batching.sharing(adapted, layout, DataSection(train=Source(path="rows.jsonl")), acceleration)
        section = DataSection(train=Source(path="rows.jsonl"), share_prefixes=DATA["share_prefixes"])
        alone, none = batching.sharing(adapted, layout, section, acceleration)
    assert (shared, alone) == (1 - 24 / 84, None) and len(notes) == 1 and none == []


def test_data_replay_mixes_in_earlier_rows() -> None:
    """The number of replayed rows follows `data.replay`; whole runs are tested in `test_continuing`."""
    numbers = data.replay_numbers(3, 3, DATA["replay"], seed=1)
    assert numbers == [0, 1, 2]
    assert data.replay_numbers(3, 3, 0.8, seed=1) == [0, 1, 2] * 4


def test_data_max_dropped_limits_dropped_rows(prepared: Callable[..., Any]) -> None:
    some = {"max_length": 16, "truncation": "drop"}
    prepared(**some, max_dropped=1.0)
    with pytest.raises(DataError, match=r"data\.max_dropped: "):
        prepared(**some, max_dropped=DATA["max_dropped"])


def test_data_invalid_rows_may_be_dropped(prepared: Callable[..., Any], tmp_path: Path) -> None:
    expected = prepared()
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write("{]\n")
    with pytest.raises(DataError, match="not valid JSON"):
        prepared(max_dropped=0.25)
    assert prepared(max_dropped=0.25, invalid_rows=DATA["invalid_rows"]) == expected


def test_data_truncation_may_be_an_error(prepared: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match=r"more than data\.max_length 24"):
        prepared(max_length=24, truncation="error")
