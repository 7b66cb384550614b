"""Prompts that share a prefix: it is computed once, but only if the model supports that without a difference."""

from typing import Any

import pytest
import torch
from families import small
from peft import LoraConfig, get_peft_model

from loratune.adapter import generation
from loratune.adapter.generation import SharedPrompts

PREFIX, LENGTHS = 12, (24, 20, 13)
ALONE = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(autouse=True)
def _few_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lower the thresholds, as the test rows are short."""
    monkeypatch.setattr(generation, "_FEWEST", 1)


def adapted(model_type: str, **changes: Any) -> Any:
    """A tiny model with a non-trivial adapter on all linear layers."""
    torch.manual_seed(0)
    model = get_peft_model(small(model_type, **changes), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def rows_of(shared: int = PREFIX) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(5, 60, (len(LENGTHS), max(LENGTHS)), generator=generator).tolist()
    return [rows[0][:shared] + row[shared:length] for row, length in zip(rows, LENGTHS, strict=True)]


@torch.inference_mode()
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text", "gpt2", "phi", "mixtral", "falcon", "cohere"])
def test_shared_prompts_get_the_same_answers_as_alone(model_type: str) -> None:
    """With padding between the prefix and the rest of a prompt."""
    changes = {"sliding_window": 512} if model_type == "gemma3_text" else {}
    model, rows = adapted(model_type, **changes), rows_of()
    prompts = SharedPrompts(model, 0)
    batch = prompts.batch(rows, 4)
    assert "cache" in batch
    answers = model.generate(**batch, **ALONE)[:, -4:].tolist()
    alone = [model.generate(input_ids=torch.tensor([row]), **ALONE)[0, -4:].tolist() for row in rows]
    assert answers == alone and answers[0] != answers[1]


@torch.inference_mode()
@pytest.mark.parametrize(
    ("model_type", "changes", "rows"),
    [
        pytest.param("llama", {}, rows_of(0), id="nothing in common"),
        pytest.param("llama", {}, rows_of()[:1], id="a single row"),
        pytest.param("qwen3_next", {}, rows_of(), id="a state in the place of keys and values"),
        pytest.param("gemma3_text", {"sliding_window": 8}, rows_of(), id="a window shorter than the rows"),
        pytest.param("mpt", {}, rows_of(), id="distances counted by place, padding too"),
        pytest.param("xlm", {}, rows_of(), id="no room for what was before"),
    ],
)
def test_prefixes_are_not_shared_if_unsupported_or_too_short(
    model_type: str, changes: dict[str, Any], rows: list[list[int]]
) -> None:
    model = adapted(model_type, **changes)
    assert "cache" not in SharedPrompts(model, 0).batch(rows, 4)


@torch.inference_mode()
def test_prefix_is_not_shared_if_it_saves_few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    model, rows = adapted("llama"), rows_of()
    assert "cache" not in SharedPrompts(model, 0).batch(rows, 4)  # Sharing would save 24 tokens.
    assert "cache" in SharedPrompts(model, 0).batch(rows * 3, 4)


@torch.inference_mode()
@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([rows_of()[0]] * 32, id="the same"),
        pytest.param([rows_of()[0][:length] for length in (12, 13, 20, 24)], id="each begins the next one"),
        pytest.param([rows_of()[0][:2]] * 2, id="two tokens"),
    ],
)
def test_prompts_that_equal_the_prefix(rows: list[list[int]]) -> None:
    """The last token is computed for each row. With the same seed, the same tokens are sampled."""
    model = adapted("llama")
    prompts = SharedPrompts(model, 0)
    batch = prompts.batch(rows, 4)
    assert batch["cache"].get_seq_length() == min(map(len, rows)) - 1
    alone = [model.generate(input_ids=torch.tensor([row]), **ALONE)[0, -4:].tolist() for row in rows]
    assert model.generate(**batch, **ALONE)[:, -4:].tolist() == alone
    drawn = []
    for one in (prompts.batch(rows, 4), prompts.plain(rows)):
        torch.manual_seed(7)
        drawn.append(model.generate(**one, **ALONE | {"do_sample": True, "temperature": 2.0})[:, -4:].tolist())
    assert drawn[0] == drawn[1] != alone
