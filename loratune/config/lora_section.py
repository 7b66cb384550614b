"""The section `lora`: the shape of the adapter, and which clients can read it.

`portability` lists the clients that cannot read the adapter of a config, so that this is known before the run. Portable
is plain LoRA of linear layers with r ≤ 16, whole lora_alpha and no biases. Sources, as of 2026:
vllm/lora/peft_helper.py: one scale, lora_alpha / r, for all modules; no DoRA, biases or saved modules; ranks above 16
need --max-lora-rank. llama.cpp's convert_lora_to_gguf.py: lora_alpha unchanged, r by the tensors' shapes; A and B only.
Ollama reads what llama.cpp converts.
"""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, WithJsonSchema

from loratune.config.expressions import BadPatternError, compile_pattern
from loratune.config.section import AUTO, Auto, Count, FilePath, InvalidSettingError, Section, decided


class LoraSection(Section):
    """The adapter: fields of `peft.LoraConfig`, under the same names."""

    r: Count | Auto = Field(8, description="rank; auto: from the number of supervised tokens")
    lora_alpha: Count | Auto = Field(16, description="the update is scaled by lora_alpha / r; auto: 16")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input while training")
    target_modules: list[str] | str = Field(
        ["q", "k", "v", "o"],
        description="roles (q, k, v, o), exact names, a regular expression, or all-linear; auto: all-linear",
    )
    target_parameters: list[str] | str | None = Field(
        None,
        min_length=1,
        json_schema_extra={"minItems": 1},
        description="parameters outside linear layers: [experts], exact names, or a regular expression",
    )
    bias: Literal["none", "all", "lora_only"] = Field("none", description="which biases are trained too")
    use_rslora: bool = Field(False, description="scale by lora_alpha / sqrt(r), arXiv:2312.03732")
    use_dora: bool = Field(False, description="weight-decomposed LoRA, arXiv:2402.09353")
    init_lora_weights: (
        Annotated[bool, WithJsonSchema({"const": True})]
        | Literal["gaussian", "orthogonal", "pissa", "pissa_niter_4", "pissa_niter_16", "olora", "eva", "loftq"]
    ) = Field(
        True,
        description="initial A and B; true: Kaiming and zero; pissa, olora, loftq: from the base; eva: from the data",
    )
    use_lorafa: bool = Field(
        False, description="LoRA-FA: freeze A, train B with a corrected gradient, arXiv:2308.03303"
    )
    loraplus_lr_ratio: float | None = Field(
        None, ge=1, le=1e6, description="LoRA+: rate of B divided by the rate of A, arXiv:2402.12354"
    )
    layers_to_transform: list[Annotated[int, Field(ge=0, lt=2**31)]] | None = Field(
        None, min_length=1, description="indices of the layers to adapt, from 0"
    )
    rank_pattern: dict[str, Count] = Field({}, description="role, name or regular expression → its own r, e.g. {q: 16}")
    alpha_pattern: dict[str, Count] = Field({}, description="role, name or regular expression → its own lora_alpha")
    modules_to_save: list[str] | None = Field(
        None, min_length=1, description="modules to train and save in full, e.g. [lm_head]"
    )
    trainable_token_indices: list[Annotated[int, Field(ge=0, lt=2**31)]] | None = Field(
        None, min_length=1, description="ids of the tokens whose embeddings are trained"
    )
    start_from: FilePath | None = Field(None, description="an adapter directory from which training continues")

    def _conflicts(self) -> Iterator[InvalidSettingError]:
        yield from self._bad_patterns()
        if not self.target_modules and self.target_parameters is None:
            message = "must not be empty where lora.target_parameters names nothing either"
            yield InvalidSettingError(message, "target_modules")
        if self.init_lora_weights is False:
            message = "false starts from a random update, which is meant for PEFT's own tests"
            yield InvalidSettingError(message, "init_lora_weights", fix="leave it out")
        ranks = (rank for rank in (self.r, *self.rank_pattern.values()) if rank != AUTO)
        if self.init_lora_weights == "orthogonal" and any(rank % 2 for rank in ranks):
            message = "orthogonal initialization splits the rank into two halves, so the rank must be even"
            yield InvalidSettingError(message, "init_lora_weights", "r")
        for first, second, message in (*self._variant_conflicts(), *self._parameter_conflicts()):
            yield InvalidSettingError(message, first, second, fix="choose one of the two")

    def _bad_patterns(self) -> Iterator[InvalidSettingError]:
        texts = {"target_modules": self.target_modules, "target_parameters": self.target_parameters}
        patterns = [(key, text) for key, text in texts.items() if isinstance(text, str) and text != AUTO]
        patterns += [("rank_pattern", text) for text in self.rank_pattern]
        patterns += [("alpha_pattern", text) for text in self.alpha_pattern]
        for key, text in patterns:
            try:
                compile_pattern(text)
            except BadPatternError as error:
                yield InvalidSettingError(f"`{text}` {error}", key)

    def _variant_conflicts(self) -> Iterator[tuple[str, str, str]]:
        """Two keys, and why they contradict each other."""
        init = str(self.init_lora_weights)
        if self.use_lorafa and self.loraplus_lr_ratio is not None:
            message = "LoRA+ makes B learn faster than A, but LoRA-FA does not train A"
            yield "use_lorafa", "loraplus_lr_ratio", message
        if self.use_lorafa and self.use_dora:
            message = "PEFT's LoRA-FA pairs each A with its B, and miscounts where DoRA has a third tensor"
            yield "use_lorafa", "use_dora", message
        if init.startswith(("pissa", "olora")) and self.use_dora:
            message = f"{init} takes a part out of the base, and DoRA would measure the rest"
            yield "init_lora_weights", "use_dora", message
        if init == "eva" and self.rank_pattern:
            message = "eva shares directions between layers that read the same input, so they must have one rank"
            yield "init_lora_weights", "rank_pattern", message
        if self.start_from is not None and self.init_lora_weights is not True:
            yield "start_from", "init_lora_weights", "the values of the adapter it starts from are its start"

    def _parameter_conflicts(self) -> Iterator[tuple[str, str, str]]:
        """What is only possible for modules, and not for `target_parameters`."""
        if self.target_parameters is None:
            return
        if self.lora_dropout > 0:
            message = "the update is added to the tensor itself, where there is no input to drop out; set it to 0"
            yield "lora_dropout", "target_parameters", message
        if self.use_dora:
            yield "use_dora", "target_parameters", "PEFT has DoRA for modules only"
        if self.use_lorafa:
            message = "A and B of stacked experts have their ranks in different orders, which LoRA-FA would mix up"
            yield "use_lorafa", "target_parameters", message
        if self.init_lora_weights not in (True, "gaussian"):
            message = f"PEFT has {self.init_lora_weights} for modules only; true and gaussian go with it"
            yield "init_lora_weights", "target_parameters", message


VLLM_RANK = 16
"""The highest rank that vLLM reads without --max-lora-rank."""
_NOT_PLAIN = {
    "use_dora": "vLLM, llama.cpp and Ollama do not read DoRA",
    "bias": "vLLM, llama.cpp and Ollama do not read biases",
    "target_parameters": "llama.cpp and Ollama do not read LoRA of experts, and vLLM of some models only; loratune "
    "merge makes a model for them",
    "modules_to_save": "vLLM, llama.cpp and Ollama do not read whole modules",
    "trainable_token_indices": "vLLM, llama.cpp and Ollama do not read trained tokens",
}
"""Key → what a value other than its default means to clients: the adapter is not plain LoRA."""
_LOFTQ = "loftq compensates for what 4bit loses, so the adapter is off on an unquantized base"
_SCALES = {
    "use_rslora": "llama.cpp and Ollama apply such an adapter with another scale, without saying so",
    "alpha_pattern": "vLLM, llama.cpp and Ollama apply one scale to all modules, without saying so",
}
"""The same of settings that change the scale of the update."""
_RANKS = "vLLM applies such an adapter with one scale for all modules, without saying so"


def is_rank_doubled(lora: LoraSection) -> bool:
    """Whether the adapter's file has twice the rank that is trained."""
    return str(lora.init_lora_weights).startswith(("pissa", "olora"))


def highest_rank(lora: LoraSection) -> int:
    """The largest rank in the adapter's file."""
    return max([decided(lora.r), *lora.rank_pattern.values()]) * (2 if is_rank_doubled(lora) else 1)


def is_plain(lora: LoraSection) -> bool:
    """Whether the adapter is plain LoRA, so that `loratune export` can make it readable for vLLM and llama.cpp."""
    return lora.init_lora_weights != "loftq" and not _NOT_PLAIN.keys() & lora.model_dump(exclude_defaults=True)


def has_one_scale(lora: LoraSection) -> bool:
    """Whether all modules have one scale, so that vLLM reads the adapter as it is."""
    return not lora.rank_pattern and not lora.alpha_pattern


def portability(lora: LoraSection) -> Iterator[str]:
    """One line for each choice that is not portable, with the clients that cannot read the adapter.

    A rank that is still `auto` counts as portable.
    """
    changed = lora.model_dump(exclude_defaults=True)
    yield from (f"lora.{key}: {reason}" for key, reason in (_NOT_PLAIN | _SCALES).items() if key in changed)
    if lora.rank_pattern and not lora.alpha_pattern:
        yield f"lora.rank_pattern: {_RANKS}"
    if lora.init_lora_weights == "loftq":
        yield f"lora.init_lora_weights: {_LOFTQ}"
    if lora.r == AUTO:
        return
    init, rank = lora.init_lora_weights, highest_rank(lora)
    if is_rank_doubled(lora):
        yield f"lora.init_lora_weights: {init} is saved as plain LoRA of twice the rank, {rank}"
    if is_rank_doubled(lora) and lora.use_rslora:
        yield f"lora.use_rslora: with {init}, lora_alpha is saved times √2; llama.cpp and Ollama need a whole number"
    if rank > VLLM_RANK:
        key = "lora.r" if lora.r == max([lora.r, *lora.rank_pattern.values()]) else "lora.rank_pattern"
        yield f"{key}: the file's rank is {rank}; vLLM reads it with --max-lora-rank {rank} only"
