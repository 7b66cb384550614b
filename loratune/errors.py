"""The error family, and the exit code of each member.

LoratuneError           1   unexpected
├── ConfigError         2   usage or config
├── ModelError          3   model or tokenizer
├── DataError           4   data
├── AdapterError        5   adapter directory
├── NumericError        6   NaN, inf, nothing learnt
├── ResumeError         7   a checkpoint does not fit the run
├── ResourceError       8   memory or disk
├── LockedError         9   another run holds the directory
├── LostError          10   another process of the run has gone
├── Interrupted       130   Ctrl-C
└── Terminated        143   SIGTERM

An error holds every problem that was found, so that the user mends them in one go. `cli` is the one place
that turns an error into lines on stderr and an exit code.
"""

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from loratune import escaping


class Code(StrEnum):
    """The stable name of each kind of problem, for scripts and tests: wording may change, a code may not.

    A member is its code; `meaning` says in one sentence when it is reported.
    """

    meaning: str

    def __new__(cls, value: str, meaning: str = "") -> "Code":
        """A member from its code and its meaning."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.meaning = meaning
        return member

    UNEXPECTED = "unexpected", "An error that loratune has no code for; please report it."

    # Command line, configuration, console (usage.*, config.*, output.*)

    # System (system.*)
    SYSTEM_DISK_TOO_SMALL = "system.disk_too_small", "The disk has too little room for what a run will write."
    SYSTEM_DISK_FULL = "system.disk_full", "The disk, a quota, or the limit of a file's size ran out during a write."
    SYSTEM_LOCKED = "system.locked", "Another run is using the same directory."

    # Kernels (kernel.*)

    # Data: sources and formats (data.*)

    # Data: templates, rendering, packing, cache (data.*, template.*)

    # Base model and tokenizer (model.*)
    MODEL_NO_DIRECTORY = "model.no_directory", "The path of a base model names no directory."
    MODEL_IS_FILE = "model.is_file", "The path of a base model is a file, not a directory."
    MODEL_NO_CONFIG = "model.no_config", "A directory or repository has no config.json, so it holds no model."
    MODEL_NO_REPOSITORY = "model.no_repository", "There is no such directory, and no such repository on the hub."
    MODEL_INVALID_ID = "model.invalid_id", "A name is neither a directory nor a possible id of a hub repository."
    MODEL_GATED = "model.gated", "The repository is gated, and this account has no access to it."
    MODEL_NO_REVISION = "model.no_revision", "The repository has no such revision."
    MODEL_LOCAL_REVISION = "model.local_revision", "A revision is set for a directory, which has none."
    MODEL_HUB_UNREACHABLE = "model.hub_unreachable", "The hub cannot be reached, and the model is not cached."
    MODEL_DOWNLOAD_FAILED = "model.download_failed", "The download of a file from the hub failed."
    MODEL_NEEDS_CODE = "model.needs_code", "The model needs code from its repository, which is not trusted."
    MODEL_FOREIGN_CODE = "model.foreign_code", "A file of the model names code of another repository."
    MODEL_FOREIGN_KERNEL = "model.foreign_kernel", "config.json names an attention kernel of another repository."
    MODEL_CODE_NAME = "model.code_name", "A file of the model names code in no module of its own repository."
    MODEL_CODE_OUTSIDE = "model.code_outside", "Code in the model's directory is a link to a file outside of it."
    MODEL_LFS_POINTER = "model.lfs_pointer", "A file of weights is a Git LFS pointer."
    MODEL_GGUF_NOT_FOUND = "model.gguf_not_found", "The directory or repository does not have the GGUF file."
    MODEL_GGUF_OUTSIDE = "model.gguf_outside", "The path of the GGUF file leads out of the model directory."
    MODEL_NOT_GGUF = "model.not_gguf", "The file is not in the GGUF format."
    MODEL_GGUF_VERSION = "model.gguf_version", "The version of the GGUF file cannot be read."
    MODEL_GGUF_SPLIT = "model.gguf_split", "The GGUF file is one part of several."
    MODEL_GGUF_TRUNCATED = "model.gguf_truncated", "The GGUF file is cut off."
    MODEL_GGUF_DAMAGED = "model.gguf_damaged", "The header of the GGUF file is damaged."
    MODEL_MISSING_PACKAGE = "model.missing_package", "A package that this model or setting needs is not installed."
    MODEL_CONFIG_UNREADABLE = "model.config_unreadable", "transformers cannot load the configuration of the model."
    MODEL_TOKENIZER_UNREADABLE = "model.tokenizer_unreadable", "transformers cannot load the tokenizer of the model."
    MODEL_UNREADABLE = "model.unreadable", "transformers cannot build or load the model."
    MODEL_INVALID_ARCHITECTURES = "model.invalid_architectures", "`architectures` in config.json is no list of names."
    MODEL_IMPLAUSIBLE_SIZE = "model.implausible_size", "A count in config.json is larger than any model has."
    MODEL_ENCODER_DECODER = "model.encoder_decoder", "The model is an encoder-decoder."
    MODEL_NOT_CAUSAL = "model.not_causal", "The model is not a causal language model."
    MODEL_WEIGHTS_DAMAGED = "model.weights_damaged", "A file of weights is damaged or cut off."
    MODEL_WEIGHTS_CHANGED = "model.weights_changed", "A file of the model changed while it was being loaded."
    MODEL_WEIGHTS_MISSING = "model.weights_missing", "The files lack tensors that config.json asks for."
    MODEL_WEIGHTS_EXTRA = "model.weights_extra", "The files hold more layers or biases than config.json asks for."
    MODEL_WEIGHTS_SHAPE = "model.weights_shape", "Tensors have another shape than config.json asks for."
    MODEL_WEIGHTS_NOT_FINITE = "model.weights_not_finite", "Weights of the model are NaN or inf."
    MODEL_TOKENIZER_GROWTH = "model.tokenizer_growth", "The tokenizer could make an enormous text of a short one."
    MODEL_TEMPLATE_UNREADABLE = "model.template_unreadable", "The chat template file cannot be read."
    MODEL_TEMPLATE_EMPTY = "model.template_empty", "The chat template file is empty."
    MODEL_TEMPLATE_INVALID = "model.template_invalid", "The chat template file is not a Jinja template."
    MODEL_TEMPLATE_LIMIT = "model.template_limit", "The chat template takes too long or too much memory."
    MODEL_QUANTIZED_ALREADY = "model.quantized_already", "The base to be quantized is quantized already."
    MODEL_QUANTIZATION_UNKNOWN = "model.quantization_unknown", "transformers does not know how the base is quantized."
    MODEL_QUANTIZATION_FROZEN = "model.quantization_frozen", "A base quantized in this way cannot be trained."
    MODEL_BITSANDBYTES = "model.bitsandbytes", "8bit or 4bit is set, and bitsandbytes does not work here."
    MODEL_ORIGINAL_MISSING = "model.original_missing", "loftq does not find a weight as it was before quantization."
    MODEL_NO_BFLOAT16 = "model.no_bfloat16", "The GPU does not compute in bfloat16."
    MODEL_NEEDS_GPU = "model.needs_gpu", "A setting of the model needs a GPU, and there is none."
    MODEL_FLASH_ATTENTION = "model.flash_attention", "Flash attention is set without its package or a CUDA GPU."

    # LoRA and adapter directories (lora.*, adapter.*)
    LORA_NO_TARGETS = "lora.no_targets", "The list of targets, or a name in it, is empty."
    LORA_UNKNOWN_TARGET = "lora.unknown_target", "A name or regular expression matches no module."
    LORA_UNSUITABLE_TARGET = "lora.unsuitable_target", "A target is no linear layer or embedding."
    LORA_AMBIGUOUS_TARGET = "lora.ambiguous_target", "PEFT cannot tell a target from another module."
    LORA_NO_EFFECT = "lora.no_effect", "PEFT cannot adapt a target, or an adapter on it has no effect."
    LORA_NO_LINEAR = "lora.no_linear", "The model has no linear layer that LoRA can adapt."
    LORA_NO_ATTENTION = "lora.no_attention", "Roles are named, and the model has no attention."
    LORA_NO_ROLE = "lora.no_role", "No module of the model's attention is known to serve a role."
    LORA_ROLE_PARTIAL = "lora.role_partial", "A role is known in some attention layers only."
    LORA_NO_LAYER = "lora.no_layer", "`layers_to_transform` names a layer without targets."
    LORA_EXPRESSION = "lora.expression", "A regular expression does not compile, or takes too long to match."
    LORA_PATTERN_UNUSED = "lora.pattern_unused", "An entry of a pattern matches no target."
    LORA_PATTERN_CONFLICT = "lora.pattern_conflict", "A pattern gives a target two values."
    LORA_SAVED_UNKNOWN = "lora.saved_unknown", "`modules_to_save` names a module that does not exist."
    LORA_SAVED_TARGET = "lora.saved_target", "A module to save is a target, or holds one, or is within one."
    LORA_SAVED_CONTAINER = "lora.saved_container", "A module to save is a list of modules."
    LORA_SAVED_NO_PARAMETERS = "lora.saved_no_parameters", "A module to save has no parameters."
    LORA_SAVED_QUANTIZED = "lora.saved_quantized", "A module to save is quantized."
    LORA_SAVED_AMBIGUOUS = "lora.saved_ambiguous", "PEFT cannot tell a module to save from another module."
    LORA_UNSUPPORTED = "lora.unsupported", "PEFT cannot adapt this model."
    LORA_NO_BIAS = "lora.no_bias", "`lora.bias` is set, and the model has no such biases."
    LORA_EMBEDDING_TWICE = "lora.embedding_twice", "Two settings adapt the embedding of the trained tokens."
    LORA_NO_TOKEN = "lora.no_token", "A token to train is not in the vocabulary."
    LORA_INIT_LAYER = "lora.init_layer", "The initialization does not support the kind of a target."
    LORA_INIT_SHARED = "lora.init_shared", "The initialization changes a weight that modules share."
    LORA_INIT_RANK = "lora.init_rank", "The initialization needs more directions than a layer has."
    LORA_FA_LAYER = "lora.fa_layer", "LoRA-FA does not support the kind of a target."
    LORA_EVA_TOKENS = "lora.eva_tokens", "No batch has enough supervised tokens for eva."
    LORA_EVA_UNSETTLED = "lora.eva_unsettled", "The directions of eva do not settle."
    LORA_LOFTQ_LAYER = "lora.loftq_layer", "loftq is set, and a target is not a 4-bit layer."
    LORA_NOT_FINITE = "lora.not_finite", "The trained adapter holds NaN or inf."
    LORA_UNCHANGED = "lora.unchanged", "Training did not change the adapter."
    ADAPTER_NO_DIRECTORY = "adapter.no_directory", "The path of an adapter names no directory."
    ADAPTER_IS_FILE = "adapter.is_file", "The path of an adapter is a file."
    ADAPTER_NO_CONFIG = "adapter.no_config", "The directory has no adapter_config.json."
    ADAPTER_NO_WEIGHTS = "adapter.no_weights", "The directory has no adapter_model.safetensors."
    ADAPTER_BROKEN_LINK = "adapter.broken_link", "A link in an adapter directory leads to no file."
    ADAPTER_SPECIAL_FILE = "adapter.special_file", "An adapter directory has a pipe, socket or device."
    ADAPTER_LINK_OUTSIDE = "adapter.link_outside", "A link leads out of an adapter directory."
    ADAPTER_NOT_JSON = "adapter.not_json", "A file of an adapter is not readable as JSON."
    ADAPTER_UNREADABLE = "adapter.unreadable", "A file of an adapter cannot be read."
    ADAPTER_DAMAGED = "adapter.damaged", "The weights of an adapter are damaged."
    ADAPTER_INVALID_RECORD = "adapter.invalid_record", "loratune.json is not the record of a run."
    ADAPTER_CONFIG_SIZE = "adapter.config_size", "adapter_config.json is too large to be one."
    ADAPTER_NOT_LORA = "adapter.not_lora", "The configuration is not that of a LoRA adapter."
    ADAPTER_NO_BASE = "adapter.no_base", "The configuration does not name the base."
    ADAPTER_BASE_OUTSIDE = "adapter.base_outside", "The path of the base leads out of the directory it starts from."
    ADAPTER_INVALID_REVISION = "adapter.invalid_revision", "The revision of the base is not a name."
    ADAPTER_NO_TARGETS = "adapter.no_targets", "The configuration does not say which modules are adapted."
    ADAPTER_NAMES_CODE = "adapter.names_code", "The configuration names code."
    ADAPTER_UNKNOWN_KEY = "adapter.unknown_key", "This version of PEFT does not know a key that is set."
    ADAPTER_TOO_MANY_TENSORS = "adapter.too_many_tensors", "The file has more tensors than any model has modules."
    ADAPTER_FILE_MISSING = "adapter.file_missing", "A file is missing since the adapter was saved."
    ADAPTER_FILE_CHANGED = "adapter.file_changed", "A file has changed since the adapter was saved."
    ADAPTER_FILE_ADDED = "adapter.file_added", "A file that would be read was added since the adapter was saved."
    ADAPTER_MISMATCH = "adapter.mismatch", "The configuration does not fit the base."
    ADAPTER_TENSORS_MISSING = "adapter.tensors_missing", "The file lacks tensors that the base needs."
    ADAPTER_TENSORS_EXTRA = "adapter.tensors_extra", "The file has tensors for modules that the base does not have."
    ADAPTER_TENSORS_SHAPE = "adapter.tensors_shape", "Tensors have another shape than the base needs."
    ADAPTER_TENSORS_LOST = "adapter.tensors_lost", "PEFT finds no module for tensors that it has renamed."
    ADAPTER_NOT_FLOAT = "adapter.not_float", "Tensors of an adapter are no floating-point numbers."
    ADAPTER_NOT_FINITE = "adapter.not_finite", "Tensors of an adapter hold NaN or inf."
    ADAPTER_NO_FACTOR = "adapter.no_factor", "A lora_A has no lora_B of its rank."
    ADAPTER_RANK = "adapter.rank", "The rank of a tensor is not that of the configuration."
    ADAPTER_SCALING = "adapter.scaling", "The scaled update of a module is not finite."
    ADAPTER_NO_COMPARISON = "adapter.no_comparison", "The base's output cannot be computed beside this adapter."
    ADAPTER_WRITE_FAILED = "adapter.write_failed", "The saved file does not hold the weights in memory."

    # Memory and disk (memory.*, disk.*)

    # Training, run directory, checkpoints, resuming (run.*, training.*, resume.*)

    # Several processes (distributed.*)

    # Commands after training (generate.*, evaluate.*, params.*)


@dataclass(frozen=True, init=False)
class Problem:
    """One thing that is wrong, printed as one line: `<where>: <key>: <what> [<code>]; <fix>`.

    Attributes:
        code: What kind of problem it is.
        what: What is wrong, in plain words.
        where: A file, `file:line`, or `file:line:column`.
        key: A dotted config key, or an option of the command line.
        fix: What to do about it. It stands last, so that a command in it can be copied.
    """

    code: Code
    what: str
    where: str = ""
    key: str = ""
    fix: str = ""

    def __init__(self, *values: str, **named: str) -> None:
        fields = ("code", "what", "where", "key", "fix")
        positions = fields if values and isinstance(values[0], Code) else fields[1:]
        state: dict[str, Any] = {"code": Code.UNEXPECTED} | dict(zip(positions, values, strict=False)) | named
        for name, value in state.items():
            object.__setattr__(self, name, value)

    def __str__(self) -> str:
        head = ": ".join(part for part in (self.where, self.key, self.what) if part)
        coded = f"{head} [{self.code}]" if self.code is not Code.UNEXPECTED else head
        return escaping.line(f"{coded}; {self.fix}" if self.fix else coded)


class LoratuneError(Exception):
    """An error that the user can act on; `problems` is never empty."""

    exit_code = 1

    def __init__(self, problems: str | Problem | Sequence[Problem]):
        if isinstance(problems, str):
            problems = Problem(problems)
        if isinstance(problems, Problem):
            problems = [problems]
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[type["LoratuneError"], tuple[tuple[Problem, ...]]]:
        """Errors cross from the process that runs a stranger's template: what makes them is their problems."""
        return type(self), (self.problems,)


def is_disk_full(error: BaseException) -> bool:
    """Also where a quota is used up or a file may not grow, and in the words of safetensors and torch's zip writer."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return any(
        words in str(error) for words in ("No space left", "File too large", "inline_container", "iostream error")
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Also in torch's words, which has a class for it on a GPU and none on a CPU; in those of the dynamic linker, as a
    library is loaded; and where no thread can be started, for want of room for its stack."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if named or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return any(words in str(error) for words in _OUT_OF_MEMORY)


_OUT_OF_MEMORY = (
    "can't allocate memory",
    "Cannot allocate memory",
    "failed to map segment",
    "can't start new thread",
    "std::bad_alloc",
)


class ConfigError(LoratuneError):
    """A wrong command line or configuration."""

    exit_code = 2


class ModelError(LoratuneError):
    """A base model or tokenizer that cannot be loaded or adapted."""

    exit_code = 3


class DataError(LoratuneError):
    """Data that is missing, unreadable, or teaches nothing."""

    exit_code = 4


class AdapterError(LoratuneError):
    """An adapter directory that is damaged or does not fit its base."""

    exit_code = 5


class NumericError(LoratuneError):
    """A loss, gradient or weight that is not finite, or an adapter that learnt nothing."""

    exit_code = 6


class ResumeError(LoratuneError):
    """A checkpoint that is missing, damaged, or belongs to another run."""

    exit_code = 7


class ResourceError(LoratuneError):
    """Not enough memory or disk."""

    exit_code = 8


class LockedError(LoratuneError):
    """Another run is working on the same directory."""

    exit_code = 9


class LostError(LoratuneError):
    """Another process of the run has gone, or cannot be reached."""

    exit_code = 10


class Interrupted(LoratuneError):
    """The user stopped the run."""

    exit_code = 130


class Terminated(LoratuneError):
    """The run was told to end, by SIGTERM."""

    exit_code = 143
