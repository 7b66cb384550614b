"""What the contestants that stand on transformers and PEFT have in common."""

import os
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model

from peers.common import Clock, Job, reply


class Timing(transformers.TrainerCallback):
    """Drives a `Clock`."""

    def __init__(self) -> None:
        self.clock = Clock()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the first update."""
        loader = kwargs.get("train_dataloader")
        self.clock.begin(loader.dataset if loader is not None else ())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After an update."""
        self.clock.step()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the last update."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.clock.end()


def tokenizer(job: Job) -> Any:
    """The model's tokenizer, which pads on the right."""
    return transformers.AutoTokenizer.from_pretrained(job.model, padding_side="right")


def lora(job: Job) -> LoraConfig:
    """The adapter that every contestant trains."""
    return LoraConfig(
        r=job.r, lora_alpha=job.lora_alpha, target_modules=list(job.target_modules), task_type="CAUSAL_LM"
    )


def adapted(job: Job, dtype: torch.dtype) -> Any:
    """The base in a dtype, with a fresh adapter in float32."""
    transformers.set_seed(job.seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype)
    return get_peft_model(model, lora(job))


def settings(job: Job, **own: Any) -> dict[str, Any]:
    """Keywords of TrainingArguments, and of the classes that inherit from it, in whatever release is installed."""
    common = {
        "output_dir": os.path.dirname(job.adapter) + "/trainer",
        "num_train_epochs": 1,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch",
        "seed": job.seed,
        "logging_steps": 10,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": job.device == "cpu",
        "dataloader_pin_memory": job.device != "cpu",
    }
    return common | own


def grouped() -> dict[str, Any]:
    """The keyword that batches rows of like length, which was renamed in transformers 5."""
    if any(field.name == "train_sampling_strategy" for field in fields(transformers.TrainingArguments)):
        return {"train_sampling_strategy": "group_by_length"}
    return {"group_by_length": True}


def collator(job: Job, *, whole: bool) -> Callable[..., Any]:
    """Pads rows to the longest of them; whole: to max_length."""
    padding = "max_length" if whole else True
    return transformers.DataCollatorForSeq2Seq(tokenizer(job), padding=padding, max_length=job.max_length)


def fit_padded(job: Job, model: Any, *, whole: bool = False, **own: Any) -> None:
    """As `fit`, with transformers.Trainer on padded rows. whole: to max_length; own: keywords of TrainingArguments."""
    arguments = transformers.TrainingArguments(
        **settings(job, per_device_train_batch_size=job.padded_batch, gradient_accumulation_steps=job.accumulate, **own)
    )
    collate = collator(job, whole=whole)
    fit(job, transformers.Trainer(model, arguments, data_collator=collate, train_dataset=job.rows))


def fit(job: Job, trainer: transformers.Trainer) -> None:
    """Train, save the adapter, and hand in what it took."""
    timing = Timing()
    trainer.add_callback(timing)
    trainer.train()
    trainer.model.save_pretrained(job.adapter)
    reply(job, timing.clock.answer(gpu_bytes()))


def gpu_bytes() -> int:
    """The most that was allocated on the GPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
