"""An adapter directory, loaded and ready: base, adapter, tokenizer and renderer as they were in training."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import GenerationConfig

from loratune import kernels
from loratune.config import DataSection, ModelSection
from loratune.data.packing import pad
from loratune.data.rendering import Renderer
from loratune.errors import AdapterError, ModelError, Problem
from loratune.lora import attach, linear
from loratune.lora.attach import PeftModel
from loratune.lora.base_comparison import Untouched
from loratune.model import device, fingerprints
from loratune.model import load as load_module
from loratune.model.fingerprints import Sampled
from loratune.training.preflight import AdapterInfo

BATCH = 32
"""How many prompts the stories hand to `LoadedAdapter.complete` at once."""


@dataclass(frozen=True)
class LoadedAdapter:
    """A base with its adapter on, and how prompts are rendered for it.

    chat: the rows of training went through the chat template; base: a sample of the base, and what PEFT may have
    changed of it, from before the adapter was attached; where: the adapter's path.
    """

    model: PeftModel
    tokenizer: Any
    renderer: Renderer
    data: DataSection
    chat: bool
    base: tuple[Sampled, Untouched]
    where: str

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Inside, the model is the base alone. Raises AdapterError: PEFT has changed the base for this adapter."""
        sampled, before = self.base
        with before.alone(self.model, self.where):
            if not sampled.is_in(self.model):
                what = "its base cannot be computed beside it: PEFT has changed the base's own weights for it"
                raise AdapterError(Problem(what, self.where))
            yield

    @torch.inference_mode()
    def complete(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float = 0.0, streamer: Any = None
    ) -> list[list[int]]:
        """Answer prompts, given as ids, in one batch. Returns the new ids of each, its end included.

        temperature: 0 takes the likeliest token; above it, tokens are sampled. streamer: transformers' own, for one
        prompt at a time.
        """
        pad_id = load_module.pad_id(self.tokenizer)
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=temperature > 0,
            temperature=temperature if temperature > 0 else None,
            eos_token_id=list(self.renderer.end_ids),
            pad_token_id=pad_id,
        )
        batch = pad([{"input_ids": ids} for ids in prompts], pad_id, "left")
        batch = {name: tensor.to(self.model.device) for name, tensor in batch.items()}
        with kernels.inference_lora(self.model, linear.linear):
            ids = self.model.generate(**batch, generation_config=settings, streamer=streamer)
        return [self._ended(row) for row in ids[:, batch["input_ids"].shape[1] :].tolist()]

    def text(self, ids: Sequence[int]) -> str:
        """An answer as text, without its end."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def _ended(self, ids: list[int]) -> list[int]:
        """Cut after the first end; what follows it is padding."""
        ends = [place for place, token in enumerate(ids) if token in self.renderer.end_ids]
        return ids[: ends[0] + 1] if ends else ids


def load(opened: AdapterInfo, log: Callable[[str], None] = lambda _: None) -> LoadedAdapter:
    """Load the base of an adapter directory, and put the adapter on it.

    Raises ConfigError: see `model.check_machine`. Raises ModelError: the base cannot be loaded. Raises AdapterError:
    see `adapter.load`; another base than the one it was trained on, which is noted where it is forced; no finite
    numbers come out.
    """
    device.check_machine(opened.base)
    path = opened.saved.path
    own_tokenizer = (path / "tokenizer_config.json").is_file()
    try:
        base = load_module.load_base(opened.base)
    except ModelError as error:
        fix = f"if the base has moved, set base_model_name_or_path in {path / 'adapter_config.json'}"
        raise ModelError(
            [replace(one, key="", fix=f"{one.fix}; {fix}" if one.fix else fix) for one in error.problems]
        ) from None
    try:
        tokenizer = load_module.load_tokenizer(ModelSection(name_or_path=str(path)) if own_tokenizer else opened.base)
    except ModelError as error:
        raise AdapterError(error.problems) if own_tokenizer else error from None
    renderer = Renderer(tokenizer, base.config.get_text_config().vocab_size)
    for line in attach.unknown_keys(opened.saved):
        log(line)
    identity = fingerprints.fingerprint(base, like=opened.saved.base_fingerprint)
    before = fingerprints.Sampled(base), attach.before_load(base, opened.saved)
    tuned = attach.load(base, opened.saved)
    _check_base(opened, identity, log)
    _check_computes(tuned, opened, tokenizer.eos_token_id or 0)
    return LoadedAdapter(tuned, tokenizer, renderer, opened.data, opened.chat, before, str(path))


def _check_base(opened: AdapterInfo, found: str, log: Callable[[str], None]) -> None:
    recorded, where = opened.saved.base_fingerprint, str(opened.saved.path)
    if recorded in (None, found):
        return
    what = f"was trained on another base than {opened.base.name_or_path}, by its shape and a sample of its weights"
    fix = "give it its base"
    if not fingerprints.is_comparable(str(recorded)):
        what, fix = "records its base in a way that this release of loratune does not know", "upgrade loratune"
    if not opened.forced:
        raise AdapterError(Problem(what, where, fix=f"{fix}, or use it all the same with --force"))
    log(str(Problem(what, where)))


@torch.inference_mode()
def _check_computes(tuned: PeftModel, opened: AdapterInfo, token: int) -> None:
    """One token through base and adapter: values of a configuration that PEFT takes as they are show only here."""
    where = str(opened.saved.path)
    try:
        logits = tuned(input_ids=torch.tensor([[token]], device=tuned.device), use_cache=False).logits
    except Exception as error:
        raise AdapterError(
            Problem(f"does not compute with its base {opened.base.name_or_path}: {error}", where)
        ) from None
    if not logits.isfinite().all():
        raise AdapterError(Problem(f"gives NaN or inf with its base {opened.base.name_or_path}", where))
