"""An adapter directory that is loaded for use: base, adapter, tokenizer and renderer as they were in training."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import GenerationConfig

from loratune import kernels
from loratune.codes import Code
from loratune.config import DataSection, ModelSection
from loratune.data.packing import pad
from loratune.data.rendering import Renderer
from loratune.errors import AdapterError, ModelError, Problem
from loratune.lora import attach
from loratune.lora.attach import PeftModel
from loratune.lora.tensors import Untouched
from loratune.model import fingerprints
from loratune.model.fingerprints import Sampled
from loratune.model.load import check_machine, load_base, load_tokenizer, pad_id
from loratune.training.preflight import AdapterInfo

BATCH = 32
"""How many prompts the commands hand to `LoadedAdapter.complete` at once."""


@dataclass(frozen=True)
class LoadedAdapter:
    """A base with its adapter attached, and how prompts are rendered for it.

    Attributes:
        chat: Whether the rows of training went through the chat template.
        base_sample: A sample of the base's weights, and the parts of the base that PEFT may change, both from before
            the adapter was attached.
        where: The path of the adapter, for messages.
    """

    model: PeftModel
    tokenizer: Any
    renderer: Renderer
    data: DataSection
    chat: bool
    base_sample: tuple[Sampled, Untouched]
    where: str

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Inside, the model is the base alone. Raises AdapterError: PEFT has changed the base for this adapter."""
        sample, untouched = self.base_sample
        with untouched.alone(self.model, self.where):
            if not sample.is_in(self.model):
                what = "cannot be compared with its base: PEFT has changed the base's own weights for this adapter"
                raise AdapterError(Problem(Code.INFERENCE_BASE_CHANGED, what, self.where))
            yield

    @torch.inference_mode()
    def complete(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float = 0.0, streamer: Any = None
    ) -> list[list[int]]:
        """Complete a batch of prompts.

        Args:
            prompts: The ids of each prompt.
            max_new_tokens: The longest completion.
            temperature: 0 for the likeliest token; above it, tokens are sampled.
            streamer: A streamer of transformers, for a single prompt.

        Returns:
            The new ids of each prompt, with the token that ends the completion.
        """
        padding = pad_id(self.tokenizer)
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=temperature > 0,
            temperature=temperature if temperature > 0 else None,
            eos_token_id=list(self.renderer.end_ids),
            pad_token_id=padding,
        )
        batch = pad([{"input_ids": ids} for ids in prompts], padding, "left")
        batch = {name: tensor.to(self.model.device) for name, tensor in batch.items()}
        with kernels.inference_lora(self.model, attach.adapted_linear):
            ids = self.model.generate(**batch, generation_config=settings, streamer=streamer)
        return [self._until_end(row) for row in ids[:, batch["input_ids"].shape[1] :].tolist()]

    def text(self, ids: Sequence[int]) -> str:
        """A completion as text, without the token that ends it."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def _until_end(self, ids: list[int]) -> list[int]:
        """The ids up to the first end token; what follows it is padding."""
        ends = [position for position, token in enumerate(ids) if token in self.renderer.end_ids]
        return ids[: ends[0] + 1] if ends else ids


def load(adapter: AdapterInfo, log: Callable[[str], None] = lambda _: None) -> LoadedAdapter:
    """Load the base of an adapter directory and attach the adapter.

    Raises:
        ConfigError: See `model.load.check_machine`.
        ModelError: The base cannot be loaded.
        AdapterError: See `attach.load`; the base is not the one that the adapter was trained on, which is logged
            instead where the user forces it; base and adapter do not give finite numbers.
    """
    check_machine(adapter.base)
    path = adapter.files.path
    try:
        base = load_base(adapter.base)
    except ModelError as error:
        fix = f"if the base has moved, set base_model_name_or_path in {path / 'adapter_config.json'}"
        raise ModelError(
            [
                replace(problem, key="", fix=f"{problem.fix}; {fix}" if problem.fix else fix)
                for problem in error.problems
            ]
        ) from None
    tokenizer = load_tokenizer_of(adapter)
    renderer = Renderer(tokenizer, base.config.get_text_config().vocab_size)
    for line in attach.unknown_keys(adapter.files):
        log(line)
    fingerprint = fingerprints.fingerprint(base, like=adapter.files.base_fingerprint)
    base_sample = fingerprints.Sampled(base), attach.before_load(base, adapter.files)
    model = attach.load(base, adapter.files)
    check_base(adapter, fingerprint, log)
    _check_output(model, adapter, tokenizer.eos_token_id or 0)
    return LoadedAdapter(model, tokenizer, renderer, adapter.data, adapter.chat, base_sample, str(path))


def load_tokenizer_of(adapter: AdapterInfo) -> Any:
    """The tokenizer in an adapter directory, else that of the base.

    Raises:
        AdapterError: The adapter has one, and it cannot be read.
        ModelError: That of the base cannot be read.
    """
    path = adapter.files.path
    own_tokenizer = (path / "tokenizer_config.json").is_file()
    try:
        return load_tokenizer(ModelSection(name_or_path=str(path)) if own_tokenizer else adapter.base)
    except ModelError as error:
        raise AdapterError(error.problems) if own_tokenizer else error from None


def check_base(adapter: AdapterInfo, fingerprint: str, log: Callable[[str], None]) -> None:
    """Compare the fingerprint of a base with the one that an adapter records.

    Raises:
        AdapterError: They differ, and the user does not force the use of another base.
    """
    recorded, where = adapter.files.base_fingerprint, str(adapter.files.path)
    if recorded in (None, fingerprint):
        return
    code, fix = Code.INFERENCE_OTHER_BASE, "use its base"
    what = f"was trained on another base than {adapter.base.name_or_path}, by its shape and a sample of its weights"
    if not fingerprints.is_comparable(str(recorded)):
        code, fix = Code.INFERENCE_UNKNOWN_FINGERPRINT, "upgrade loratune"
        what = "records the fingerprint of its base in a version that this release of loratune does not know"
    if not adapter.forced:
        raise AdapterError(Problem(code, what, where, fix=f"{fix}, or use the adapter all the same with --force"))
    log(str(Problem(code, what, where)))


@torch.inference_mode()
def _check_output(model: PeftModel, adapter: AdapterInfo, token: int) -> None:
    """Compute the logits of one token: values in a configuration that PEFT does not check show only here.

    Raises AdapterError: base and adapter fail, or give NaN or inf.
    """
    where, name = str(adapter.files.path), adapter.base.name_or_path
    try:
        logits = model(input_ids=torch.tensor([[token]], device=model.device), use_cache=False).logits
    except Exception as error:
        what = f"cannot be computed with its base {name}: {error}"
        raise AdapterError(Problem(Code.INFERENCE_FAILED, what, where)) from None
    if not logits.isfinite().all():
        raise AdapterError(Problem(Code.INFERENCE_NOT_FINITE, f"gives NaN or inf with its base {name}", where))
