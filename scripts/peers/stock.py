"""What the contestants that stand on transformers and PEFT have in common."""

import os
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

from peers.common import Clock, Job, reply
from peers.steps import Steps


class Timing(transformers.TrainerCallback):
    """Drives a `Clock`.

    Attributes:
        losses: Those that were logged.
    """

    def __init__(self) -> None:
        self.clock = Clock()
        self.losses: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After a line of the log."""
        if "loss" in kwargs["logs"]:
            self.losses.append(kwargs["logs"]["loss"])

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
    """The base in a dtype, with a fresh adapter in float32; a quantized base as PEFT's documentation prepares it."""
    transformers.set_seed(job.seed)
    quantized = job.quantization != "none"
    options = {"quantization_config": bitsandbytes(job, dtype)} if quantized else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype, **options)
    if quantized:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return get_peft_model(model, lora(job))


def bitsandbytes(job: Job, dtype: torch.dtype) -> transformers.BitsAndBytesConfig:
    """The quantization of a job. dtype: in which a base in 4 bit computes."""
    if job.quantization == "8bit":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


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
    timing, steps = Timing(), Steps()
    trainer.add_callback(timing)
    trainer.train()
    trainer.model.save_pretrained(job.adapter)
    reply(job, replace(timing.clock.answer(gpu_bytes()), steps=steps.seconds, losses=timing.losses))


def gpu_bytes() -> int:
    """The most that was allocated on the GPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
