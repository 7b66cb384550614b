"""How each tool is installed and told to train, resume and merge: what its own documentation says for LoRA.

loratune: README (`init`, `train`). TRL: `trl sft` with the defaults of SFTConfig and ModelConfig, and 2e-4, the rate of
the LoRA example in trl/scripts/sft.py. Unsloth: the notebook for Llama 3.2, for one epoch, which it names for a full
run, without 4 bit. axolotl: `my_training.yml` of its getting-started guide, with the LoRA of
examples/llama-3/lora-1b.yml. LLaMA-Factory: examples/train_lora/qwen3_lora_sft.yaml.
ms-swift: the quick start of its README. Only the model, the rows, the output and what a CPU or a local model needs
differ; `Tool.changed` says what that was.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Command = list[str]


@dataclass(frozen=True)
class Order:
    """What a tool is to do in a directory of its own.

    settings: of the tool, under its own names, over what its documentation has; steps, save: when to end and to keep a
    checkpoint, 0 for what the documentation has; resume: the checkpoint to continue from.
    """

    place: Path
    model: Path
    rows: Path
    output: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 0
    save: int = 0
    resume: Path | None = None


@dataclass(frozen=True)
class Tool:
    """A tool.

    title: for readers; requirements: for pip; train, merge: write the files of an order, and return the commands;
    names: of `rate`, `length`, `steps` and `save`, as it calls them; format: what it trains on, see `score`; changed:
    what differs from its documentation, and why.
    """

    title: str
    requirements: tuple[str, ...]
    train: Callable[[Order], list[Command]]
    merge: Callable[[Order, Path], list[Command]]
    names: Mapping[str, str]
    format: str = "plain"
    changed: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


def _asked(order: Order, names: Mapping[str, str]) -> dict[str, Any]:
    """The settings of an order, with its steps, under the tool's names."""
    asked = {"steps": order.steps, "save": order.save}
    return {names[name]: value for name, value in asked.items() if value} | dict(order.settings)


def _flags(settings: Mapping[str, Any]) -> list[str]:
    return [part for key, value in settings.items() for part in _flag(key, value)]


def _flag(key: str, value: Any) -> list[str]:
    if value is True:
        return [f"--{key}"]
    return [f"--{key}", *([str(one) for one in value] if isinstance(value, list | tuple) else [str(value)])]


def _dump(path: Path, settings: Mapping[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(dict(settings), sort_keys=False), encoding="utf-8")
    return path


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as sections."""
    nested: dict[str, Any] = {}
    for key, value in settings.items():
        *sections, last = key.split(".")
        inner = nested
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    return nested


LORATUNE = {"rate": "training.learning_rate", "length": "data.max_length", "steps": "training.max_steps",
            "save": "training.save_steps"}  # fmt: skip


def _loratune(order: Order) -> list[Command]:
    asked = _asked(order, LORATUNE)
    if not order.settings and not order.steps and not order.resume:
        chosen = ["--model", str(order.model), "--set", f"output_dir={order.output}"]
        return [["loratune", "init", str(order.rows), *chosen], ["loratune", "train", "config.yaml"]]
    fixed = {"model.name_or_path": str(order.model), "data.train": str(order.rows), "output_dir": str(order.output)}
    _dump(order.place / "config.yaml", _nested(fixed | asked))
    return [["loratune", "train", "config.yaml", *(["--resume"] if order.resume else [])]]


def _loratune_merge(order: Order, merged: Path) -> list[Command]:
    return [["loratune", "merge", "--adapter", str(order.output), "--output", str(merged)]]


TRAINER = {"rate": "learning_rate", "length": "max_length", "steps": "max_steps", "save": "save_steps"}


def _trl(order: Order) -> list[Command]:
    settings = {
        "model_name_or_path": order.model,
        "dataset_name": order.rows.parent,
        "learning_rate": 2e-4,
        "use_peft": True,
        "use_cpu": True,
        "output_dir": order.output,
        **_asked(order, TRAINER),
        **({"resume_from_checkpoint": order.resume} if order.resume else {}),
    }
    return [["trl", "sft", *_flags(settings)]]


def _peft_merge(order: Order, merged: Path) -> list[Command]:
    script = f"""from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
model = AutoPeftModelForCausalLM.from_pretrained({str(order.output)!r})
model.merge_and_unload().save_pretrained({str(merged)!r})
AutoTokenizer.from_pretrained({str(order.output)!r}).save_pretrained({str(merged)!r})
"""
    (order.place / "merge.py").write_text(script, encoding="utf-8")
    return [["python", "merge.py"]]


def _unsloth(order: Order) -> list[Command]:
    settings = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "warmup_steps": 5,
        "num_train_epochs": 1,
        "learning_rate": 2e-4,
        "logging_steps": 1,
        "optim": "adamw_8bit",
        "weight_decay": 0.001,
        "lr_scheduler_type": "linear",
        "seed": 3407,
        "output_dir": str(order.output.with_name("outputs")),
        "report_to": "none",
        **_asked(order, TRAINER),
    }
    length = settings.pop("max_length", 2048)
    lines = "\n".join(f"        {key}={_literal(value)}," for key, value in settings.items())
    resume = "resume_from_checkpoint=True" if order.resume else ""
    script = f"""from unsloth import FastLanguageModel
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer
model, tokenizer = FastLanguageModel.from_pretrained(
    model_name={str(order.model)!r},
    max_seq_length={length},
    load_in_4bit=False,
)
model = FastLanguageModel.get_peft_model(
    model,
    r=16,
    target_modules={list(LINEARS)!r},
    lora_alpha=16,
    lora_dropout=0,
    bias="none",
    use_gradient_checkpointing="unsloth",
    random_state=3407,
)
trainer = SFTTrainer(
    model=model,
    processing_class=tokenizer,
    train_dataset=load_dataset("json", data_files={str(order.rows)!r}, split="train"),
    args=SFTConfig(
{lines}
    ),
)
trainer.train({resume})
model.save_pretrained({str(order.output)!r})
tokenizer.save_pretrained({str(order.output)!r})
"""
    (order.place / "train.py").write_text(script, encoding="utf-8")
    return [["python", "train.py"]]


def _literal(value: Any) -> str:
    return 'float("nan")' if value != value else repr(value)


def _unsloth_merge(order: Order, merged: Path) -> list[Command]:
    script = f"""from unsloth import FastLanguageModel
model, tokenizer = FastLanguageModel.from_pretrained(model_name={str(order.output)!r}, load_in_4bit=False)
model.save_pretrained_merged({str(merged)!r}, tokenizer, save_method="merged_16bit")
"""
    (order.place / "merge.py").write_text(script, encoding="utf-8")
    return [["python", "merge.py"]]


AXOLOTL = {"rate": "learning_rate", "length": "sequence_len", "steps": "max_steps", "save": "save_steps"}


def _axolotl(order: Order) -> list[Command]:
    settings = {
        "base_model": str(order.model),
        "datasets": [
            {
                "path": str(order.rows),
                "ds_type": "json",
                "type": {"field_instruction": "prompt", "field_output": "completion", "format": "{instruction}"},
            }
        ],
        "output_dir": str(order.output),
        "adapter": "lora",
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "lora_target_linear": True,
        "micro_batch_size": 2,
        "num_epochs": 3,
        "learning_rate": 3e-4,
        "lora_mlp_kernel": False,
        "lora_qkv_kernel": False,
        "lora_o_kernel": False,
        **_asked(order, AXOLOTL),
        **({"resume_from_checkpoint": str(order.resume)} if order.resume else {}),
    }
    _dump(order.place / "config.yaml", settings)
    return [["axolotl", "train", "config.yaml"]]


def _axolotl_merge(order: Order, merged: Path) -> list[Command]:
    return [
        ["axolotl", "merge-lora", "config.yaml", "--lora-model-dir", str(order.output), "--output-dir", str(merged)]
    ]


LLAMAFACTORY = {"rate": "learning_rate", "length": "cutoff_len", "steps": "max_steps", "save": "save_steps"}


def _llamafactory(order: Order) -> list[Command]:
    columns = {"prompt": "prompt", "response": "completion"}
    known = {"rows": {"file_name": str(order.rows), "columns": columns}}
    (order.place / "data").mkdir(exist_ok=True)
    (order.place / "data" / "dataset_info.json").write_text(json.dumps(known, indent=2), encoding="utf-8")
    settings = {
        "model_name_or_path": str(order.model),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": 8,
        "lora_target": "all",
        "dataset": "rows",
        "template": "smollm2",
        "cutoff_len": 2048,
        "output_dir": str(order.output),
        "logging_steps": 10,
        "save_steps": 500,
        "report_to": "none",
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 8,
        "learning_rate": 1e-4,
        "num_train_epochs": 3.0,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.1,
        "bf16": True,
        "use_cpu": True,
        **_asked(order, LLAMAFACTORY),
        **({"resume_from_checkpoint": str(order.resume)} if order.resume else {}),
    }
    _dump(order.place / "config.yaml", settings)
    return [["llamafactory-cli", "train", "config.yaml"]]


def _llamafactory_merge(order: Order, merged: Path) -> list[Command]:
    settings = {
        "model_name_or_path": str(order.model),
        "adapter_name_or_path": str(order.output),
        "template": "smollm2",
        "export_dir": str(merged),
    }
    _dump(order.place / "merge.yaml", settings)
    return [["llamafactory-cli", "export", "merge.yaml"]]


def _swift(order: Order) -> list[Command]:
    settings = {
        "model": order.model,
        "model_type": "llama",
        "template": "chatml",
        "tuner_type": "lora",
        "dataset": order.rows,
        "torch_dtype": "bfloat16",
        "use_cpu": True,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 1,
        "learning_rate": 1e-4,
        "lora_rank": 8,
        "lora_alpha": 32,
        "target_modules": "all-linear",
        "gradient_accumulation_steps": 16,
        "save_steps": 50,
        "save_total_limit": 2,
        "logging_steps": 5,
        "max_length": 2048,
        "output_dir": order.output,
        "warmup_ratio": 0.05,
        "dataloader_num_workers": 4,
        **_asked(order, TRAINER),
        **({"resume_from_checkpoint": order.resume} if order.resume else {}),
    }
    return [["swift", "sft", *_flags(settings)]]


def _swift_merge(order: Order, merged: Path) -> list[Command]:
    adapter = adapter_in(order.output)
    return [["swift", "export", "--adapters", str(adapter), "--merge_lora", "true", "--output_dir", str(merged)]]


def adapter_in(output: Path) -> Path | None:
    """The newest adapter at or below a directory; a tool's final one is at the top, or its last checkpoint."""
    found = sorted(output.rglob("adapter_model.safetensors"), key=lambda path: (-len(path.parts), path.stat().st_mtime))
    return found[-1].parent if found else None


def typed(tool: Tool, order: Order) -> int:
    """The lines that a user types for an order: each line of a file, each command, and each of its options is one."""
    commands = tool.train(order)
    files = [path for path in order.place.rglob("*") if path.suffix in {".yaml", ".json", ".py"}]
    lines = [line for path in files for line in path.read_text(encoding="utf-8").splitlines()]
    options = [part for command in commands for part in command if part.startswith("--")]
    return len(commands) + len(options) + sum(any(map(str.isalnum, line)) for line in lines)


TOOLS = {
    "loratune": Tool("loratune", ("loratune",), _loratune, _loratune_merge, LORATUNE),
    "trl": Tool(
        "TRL", ("trl[peft]",), _trl, _peft_merge, TRAINER,
        changed="`--use_cpu`, without which it ends with an error; merged as PEFT's documentation says",
    ),
    "unsloth": Tool(
        "Unsloth", ("unsloth",), _unsloth, _unsloth_merge, TRAINER,
        changed="without 4 bit, with the rows as they are and no chat template",
    ),
    "axolotl": Tool(
        "axolotl", ("axolotl",), _axolotl, _axolotl_merge, AXOLOTL, format="spaced",
        environment={"AXOLOTL_DO_NOT_TRACK": "1"},
        changed="`lora_*_kernel: false`, as its LoRA kernels run on CUDA only; telemetry off",
    ),
    "llamafactory": Tool(
        "LLaMA-Factory", ("llamafactory",), _llamafactory, _llamafactory_merge, LLAMAFACTORY, format="chat",
        environment={"PYTHONPATH": str(Path(__file__).with_name("stub"))},
        changed="`use_cpu: true`, and the template `smollm2`; an empty module instead of torchaudio, whose build "
        "on PyPI does not load beside a build of torch for CPUs",
    ),
    "ms-swift": Tool(
        "ms-swift", ("ms-swift", "torch"), _swift, _swift_merge, TRAINER, format="chatml",
        changed="`--use_cpu`, and `--model_type llama --template chatml`, as it does not know the model",
    ),
}  # fmt: skip
