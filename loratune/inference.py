"""An adapter directory, loaded and ready: base, adapter, tokenizer and renderer as they were in training."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import GenerationConfig

from loratune import adapter, config, model
from loratune.adapter import PeftModel, Saved
from loratune.config import DataSection, ModelSection, RunConfig, Source
from loratune.data.packing import pad
from loratune.data.render import Renderer
from loratune.errors import AdapterError, ConfigError

BATCH = 32
"""How many prompts the stories hand to `Tuned.complete` at once."""


@dataclass(frozen=True)
class Tuned:
    """A base with its adapter on, and how prompts are rendered for it."""

    saved: Saved
    model: PeftModel
    tokenizer: Any
    renderer: Renderer
    data: DataSection

    def collate(self, side: Literal["left", "right"] = "right") -> Any:
        """Rows → padded tensors."""
        return partial(pad, pad_id=model.pad_id(self.tokenizer), side=side)

    def without_adapter(self) -> AbstractContextManager[Any]:
        """Inside, the model is the base alone."""
        context: AbstractContextManager[Any] = self.model.disable_adapter()
        return context

    @torch.inference_mode()
    def complete(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float = 0.0, streamer: Any = None
    ) -> list[list[int]]:
        """Answer prompts, given as ids, in one batch. Returns the new ids of each, its end included.

        temperature: 0 takes the likeliest token; above it, tokens are sampled. streamer: transformers' own, for one
        prompt at a time.
        """
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=temperature > 0,
            temperature=temperature if temperature > 0 else None,
            eos_token_id=list(self.renderer.end_ids),
            pad_token_id=model.pad_id(self.tokenizer),
        )
        batch = self.collate("left")([{"input_ids": ids} for ids in prompts])
        batch = {name: tensor.to(self.model.device) for name, tensor in batch.items()}
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


def open_adapter(directory: Path) -> Tuned:
    """Load an adapter directory and the base that it names.

    Raises AdapterError: see `adapter.inspect`, `adapter.load`. Raises ModelError: the base cannot be loaded.
    """
    saved = adapter.inspect(directory)
    section, rows = _as_trained(saved)
    own_tokenizer = (directory / "tokenizer_config.json").is_file()
    tokenizer = model.load_tokenizer(ModelSection(name_or_path=str(directory)) if own_tokenizer else section)
    tuned = adapter.load(model.load_base(section), saved)
    return Tuned(saved, tuned, tokenizer, Renderer(tokenizer), rows)


def base_of(saved: Saved) -> ModelSection:
    """Where the base of an adapter is to be found."""
    return ModelSection(name_or_path=saved.base, revision=saved.config.get("revision"))


def recorded_run(saved: Saved) -> RunConfig | None:
    """The config that an adapter was trained with, or None for one that loratune did not write.

    Raises AdapterError: it is there and not valid.
    """
    path = saved.path / "run.yaml"
    if not path.is_file():
        return None
    try:
        return config.load(path)
    except ConfigError as error:
        raise AdapterError(error.problems) from None


def _as_trained(saved: Saved) -> tuple[ModelSection, DataSection]:
    """How the base was held and the rows were read in training; what run.yaml says of code to trust is not believed."""
    base = base_of(saved)
    run = recorded_run(saved)
    if run is None:
        return base, DataSection(train=Source(path="unknown"))
    held = run.model.model_dump(include={"dtype", "quantization", "attn_implementation"})
    return base.model_copy(update=held), run.data
