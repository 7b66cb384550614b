"""The section `lora`: what is trained."""

from typing import Annotated, Literal, Self

from pydantic import Field, WithJsonSchema, model_validator

from loratune.codes import Code
from loratune.config.patterns import BadPatternError, compile_pattern
from loratune.config.section import AUTO, Auto, Count, FilePath, InvalidSettingError, Section


class LoraSection(Section):
    """What is trained: the fields of `peft.LoraConfig`, under its names."""

    r: Count | Auto = Field(8, description="rank of the update; auto: by the number of supervised tokens")
    lora_alpha: Count | Auto = Field(16, description="the update is scaled by lora_alpha / r; auto: 16")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input while training")
    target_modules: list[str] | str = Field(
        ["q", "k", "v", "o"],
        description="roles q, k, v, o; exact names; a regular expression; all-linear; auto: all-linear",
    )
    target_parameters: list[str] | str | None = Field(
        None,
        min_length=1,
        json_schema_extra={"minItems": 1},
        description="parameters of no linear layer, as fused experts: role experts; exact names; a regular expression",
    )
    bias: Literal["none", "all", "lora_only"] = Field("none", description="which biases are trained as well")
    use_rslora: bool = Field(False, description="scale by lora_alpha / sqrt(r), arXiv:2312.03732")
    use_dora: bool = Field(False, description="weight-decomposed LoRA, arXiv:2402.09353")
    init_lora_weights: (
        Annotated[bool, WithJsonSchema({"const": True})]
        | Literal["gaussian", "orthogonal", "pissa", "pissa_niter_4", "pissa_niter_16", "olora", "eva", "loftq"]
    ) = Field(
        True,
        description="how A and B start; true: Kaiming and zero; pissa, olora, loftq: from the base; eva: from the data",
    )
    use_lorafa: bool = Field(
        False, description="LoRA-FA: only B is trained, with a corrected gradient, arXiv:2308.03303"
    )
    loraplus_lr_ratio: float | None = Field(
        None, ge=1, le=1e6, description="LoRA+: B is trained at this many times the rate of A, arXiv:2402.12354"
    )
    layers_to_transform: list[Annotated[int, Field(ge=0, lt=2**31)]] | None = Field(
        None, min_length=1, description="indices of the layers to adapt, from 0"
    )
    rank_pattern: dict[str, Count] = Field({}, description="role, name or regular expression → its own r, e.g. {q: 16}")
    alpha_pattern: dict[str, Count] = Field({}, description="role, name or regular expression → its own lora_alpha")
    modules_to_save: list[str] | None = Field(
        None, min_length=1, description="modules that are trained and saved in full, e.g. [lm_head]"
    )
    trainable_token_indices: list[Annotated[int, Field(ge=0, lt=2**31)]] | None = Field(
        None, min_length=1, description="ids of the tokens whose embeddings are trained"
    )
    start_from: FilePath | None = Field(None, description="an adapter directory from which training continues")

    @model_validator(mode="after")
    def _patterns_compile(self) -> Self:
        patterns = {"rank_pattern": list(self.rank_pattern), "alpha_pattern": list(self.alpha_pattern)}
        if isinstance(self.target_modules, str) and self.target_modules != AUTO:
            patterns["target_modules"] = [self.target_modules]
        if isinstance(self.target_parameters, str):
            patterns["target_parameters"] = [self.target_parameters]
        for key, texts in patterns.items():
            for text in texts:
                try:
                    compile_pattern(text)
                except BadPatternError as error:
                    message = f"`{text}` {error}"
                    raise InvalidSettingError(Code.CONFIG_BAD_VALUE, message, key) from None
        return self

    @model_validator(mode="after")
    def _adapts_something(self) -> Self:
        if not self.target_modules and self.target_parameters is None:
            message = "must not be empty where lora.target_parameters names nothing either"
            raise InvalidSettingError(Code.CONFIG_BAD_VALUE, message, "target_modules")
        return self

    @model_validator(mode="after")
    def _parameters_have_plain_lora(self) -> Self:
        if self.target_parameters is None:
            return self
        conflicts = {
            "lora_dropout": (
                self.lora_dropout > 0,
                "the update is added to the tensor itself, where there is no input to drop out; set it to 0",
            ),
            "use_dora": (self.use_dora, "PEFT has DoRA for modules only"),
            "use_lorafa": (
                self.use_lorafa,
                "A and B of stacked experts have their ranks in different orders, which LoRA-FA would mix up",
            ),
            "init_lora_weights": (
                self.init_lora_weights not in (True, "gaussian"),
                f"PEFT has {self.init_lora_weights} for modules only; true and gaussian go with it",
            ),
        }
        for key, (conflict, message) in conflicts.items():
            if conflict:
                raise InvalidSettingError(
                    Code.CONFIG_CONFLICT, message, key, "target_parameters", fix="choose one of the two"
                )
        return self

    @model_validator(mode="after")
    def _update_starts_at_zero(self) -> Self:
        if self.init_lora_weights is False:
            message = "false starts from a random update, which is meant for PEFT's own tests"
            raise InvalidSettingError(Code.CONFIG_CONFLICT, message, "init_lora_weights", fix="leave it out")
        return self

    @model_validator(mode="after")
    def _rank_is_even(self) -> Self:
        if self.init_lora_weights == "orthogonal" and any(
            r != AUTO and r % 2 for r in (self.r, *self.rank_pattern.values())
        ):
            message = "orthogonal initialization splits the rank into two halves, so the rank must be even"
            raise InvalidSettingError(Code.CONFIG_BAD_VALUE, message, "init_lora_weights", "r")
        return self

    @model_validator(mode="after")
    def _variants_agree(self) -> Self:
        init = str(self.init_lora_weights)
        twice = self.start_from is not None and self.init_lora_weights is not True
        conflicts = [
            (
                self.use_lorafa and self.loraplus_lr_ratio is not None,
                ("use_lorafa", "loraplus_lr_ratio"),
                "LoRA+ makes B learn faster than A, but LoRA-FA does not train A",
            ),
            (
                init.startswith(("pissa", "olora")) and self.use_dora,
                ("init_lora_weights", "use_dora"),
                f"{init} takes a part out of the base, and DoRA would measure the rest",
            ),
            (
                self.use_lorafa and self.use_dora,
                ("use_lorafa", "use_dora"),
                "PEFT's LoRA-FA pairs each A with its B, and miscounts where DoRA has a third tensor",
            ),
            (
                init == "eva" and bool(self.rank_pattern),
                ("init_lora_weights", "rank_pattern"),
                "eva shares directions between layers that read the same input, so they must have one rank",
            ),
            (twice, ("start_from", "init_lora_weights"), "the values of the adapter it starts from are its start"),
        ]
        for conflict, keys, message in conflicts:
            if conflict:
                raise InvalidSettingError(Code.CONFIG_CONFLICT, message, *keys, fix="choose one of the two")
        return self
