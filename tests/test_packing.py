"""Batches: rows of a flat batch attend only to themselves in supported models, and packs contain every row once."""

import pickle
import tracemalloc
from copy import deepcopy
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pytest
import torch
import transformers
from conftest import tiny_llama
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader

from loratune.data.batch_check import packing_refusal, padding_refusal, random_rows
from loratune.data.batches import flatten
from loratune.data.packing import BatchLayout, best_fit
from loratune.kernels import next_token_loss

VOCABULARY = 264
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "initializer_range": 0.1,
}  # fmt: skip
FALCON = {name: value for name, value in SHAPE.items() if name not in ("head_dim", "num_key_value_heads")}
GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.1,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
CODEBOOKS = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 64, "num_attention_heads": 4,
}  # fmt: skip
SUPPORTED: dict[str, transformers.PreTrainedConfig] = {
    "llama": transformers.LlamaConfig(**SHAPE),
    "qwen3": transformers.Qwen3Config(**SHAPE),
    "qwen3_moe": transformers.Qwen3MoeConfig(**SHAPE, **EXPERTS),
    "gpt2": transformers.GPT2Config(**GPT2),
    "gpt_neox": transformers.GPTNeoXConfig(**SHAPE),
    "gemma3": transformers.Gemma3TextConfig(
        **SHAPE, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    ),
    "phi3": transformers.Phi3Config(**SHAPE),
    "mistral": transformers.MistralConfig(**SHAPE, sliding_window=8),
    "falcon": transformers.FalconConfig(**FALCON),
}
MIXING: dict[str, transformers.PreTrainedConfig] = {
    "bloom": transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
    "mamba": transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2),
    "rwkv": transformers.RwkvConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2),
    "lfm2": transformers.Lfm2Config(**SHAPE, layer_types=["conv", "full_attention"]),
    "qwen3_next": transformers.Qwen3NextConfig(
        **SHAPE | EXPERTS, shared_expert_intermediate_size=32, layer_types=["linear_attention", "full_attention"],
        linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4,
    ),
    "falcon_h1": transformers.FalconH1Config(**SHAPE, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8),
}  # fmt: skip


def built(config: transformers.PreTrainedConfig, attention: str = "eager") -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(deepcopy(config), attn_implementation=attention).eval()


def rows(*lengths: int, seed: int = 0) -> list[dict[str, Any]]:
    """Random rows; the first third of each is unsupervised."""
    drawn = torch.Generator().manual_seed(seed)
    ids = [torch.randint(VOCABULARY, (length,), generator=drawn).tolist() for length in lengths]
    return [{"input_ids": row, "labels": [-100] * (len(row) // 3) + row[len(row) // 3 :]} for row in ids]


@torch.no_grad()
def difference(model: Any, several: list[dict[str, Any]], **inputs: Any) -> float:
    """The largest difference between the logits of rows in one flat batch and of the rows alone."""
    batch = flatten(several)
    together = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], **{"use_cache": False} | inputs)
    parts = together.logits[0].split([len(row["input_ids"]) for row in several])
    alone = [model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0] for row in several]
    return max(float((one - part).abs().max()) for one, part in zip(alone, parts, strict=True))


# --- flat rows


def test_flatten_concatenates_rows_without_supervising_their_first_token() -> None:
    batch = flatten([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8, 9], "labels": [-100, 9]},
                     {"input_ids": [4], "labels": [4]}])  # fmt: skip
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7, 8, 9, 4]],
        "labels": [[-100, 6, 7, -100, 9, -100]],
        "position_ids": [[0, 1, 2, 0, 1, 0]],
    }


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", SUPPORTED)
def test_rows_have_the_same_logits_in_a_flat_batch_as_alone(family: str, attention: str) -> None:
    model = built(SUPPORTED[family], attention)
    assert model.config._attn_implementation == attention
    assert difference(model, rows(5, 40, 1, 1, 23, 12)) < 1e-5
    assert packing_refusal(model, 40, 300) is None


@pytest.mark.parametrize("family", MIXING)
def test_models_that_mix_rows_are_refused(family: str) -> None:
    model = built(MIXING[family])
    assert difference(model, rows(5, 40, 1, 1, 23, 12)) > 1e-4
    assert packing_refusal(model, 40) == f"packing: {model.config.model_type} mixes rows: {MIXES}"


MIXES = "what it computes for one depends on what else is in a batch"


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "qwen3_moe", "bloom", "mamba", "lfm2", "qwen3_next"])
def test_refusal_is_the_same_in_bfloat16(family: str) -> None:
    model = built((SUPPORTED | MIXING)[family], "eager").to(torch.bfloat16)
    assert (packing_refusal(model, 40) is None) == (family in SUPPORTED)


def test_leak_smaller_than_bfloat16_rounding_is_detected() -> None:
    config = transformers.Lfm2Config(**SHAPE | {"initializer_range": 0.01}, layer_types=["conv", "full_attention"])
    model = built(config).to(torch.bfloat16)
    assert difference(model, rows(5, 40, 23)) < 0.02
    assert MIXES in str(packing_refusal(model, 40))


def test_cache_or_attention_mask_would_mix_rows() -> None:
    model, several = built(SUPPORTED["llama"]), rows(5, 40, 23)
    assert difference(model, several, use_cache=True) > 1e-3
    assert difference(model, several, attention_mask=torch.ones(1, 68, dtype=torch.long)) > 1e-3


@pytest.mark.parametrize("longest", [1, 2, 3])
def test_refusal_is_the_same_for_very_short_rows(longest: int) -> None:
    assert packing_refusal(built(SUPPORTED["gpt2"]), longest) is None
    assert packing_refusal(built(MIXING["lfm2"]), longest)


class Counting(transformers.GPT2LMHeadModel):
    """Isolates rows, but scales logits down with the length of the batch."""

    def forward(self, input_ids: Tensor, **inputs: Any) -> Any:
        output = super().forward(input_ids=input_ids, **inputs)
        output.logits = output.logits / input_ids.shape[1]
        return output


class Wavering(transformers.GPT2LMHeadModel):
    """Computes one flat batch wrong once, as if rounding had switched an expert."""

    wrong = 1

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, **inputs: Any) -> Any:
        output = super().forward(input_ids=input_ids, position_ids=position_ids, **inputs)
        if self.wrong and position_ids is not None and not torch.is_grad_enabled():
            self.wrong -= 1
            output.logits = output.logits * 1.1
        return output


class Greedy(transformers.GPT2LMHeadModel):
    """Requests more memory than there is. A GPU's error is raised by hand."""

    on_gpu = False

    def forward(self, input_ids: Tensor, **inputs: Any) -> Any:
        if self.on_gpu:
            raise torch.OutOfMemoryError("of a GPU")
        return torch.empty(1 << 60)


def test_mixing_without_a_gradient_is_detected() -> None:
    refusal = str(packing_refusal(Counting(transformers.GPT2Config(**GPT2)), 40))
    assert refusal.startswith("packing: gpt2 mixes rows: logits differ by ")


@pytest.mark.parametrize(("short", "longest"), [(64, 65), (64, 500), (400, 500)])
def test_longrope_factors_that_depend_on_the_longest_row_are_detected(short: int, longest: int) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [8.0] * 4}
    shape = SHAPE | {"original_max_position_embeddings": short}
    model = built(transformers.Phi3Config(**shape, rope_parameters=rope | {"original_max_position_embeddings": short}))
    assert difference(model, rows(5, short)) < 1e-5 and packing_refusal(model, short) is None
    assert difference(model, rows(5, longest)) > 1e-3 and "logits differ" in str(packing_refusal(model, longest))


def test_errors_that_only_large_batches_show_are_detected() -> None:
    model = built(
        transformers.FalconConfig(**FALCON, alibi=True)
    )  # its distances are counted over the whole batch, in bfloat16
    assert difference(model, rows(5, 40, 40)) < 1e-5 and packing_refusal(model, 40) is None
    assert difference(model, rows(*[40] * 20)) > 1e-3 and "logits differ" in str(packing_refusal(model, 40, 800))


def test_buffers_shorter_than_a_flat_batch_are_detected() -> None:
    shape = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 128, "window_size": 8}
    model = built(transformers.GPTNeoConfig(vocab_size=VOCABULARY, attention_types=[[["global", "local"], 1]], **shape))
    assert difference(model, rows(40, 40, 40)) < 1e-5 and packing_refusal(model, 40, 128) is None
    refusal = str(packing_refusal(model, 40, 200))
    assert refusal.startswith("packing: gpt_neo does not run on flat rows: RuntimeError: ")


def test_check_does_not_exceed_the_positions_of_the_model() -> None:
    assert packing_refusal(built(SUPPORTED["gpt2"]), 1000, 500) is None


def test_single_rounding_difference_is_not_reported_as_mixing() -> None:
    model = Wavering(transformers.GPT2Config(**GPT2))
    assert packing_refusal(model, 40) is None and model.wrong == 0


def test_failure_on_flat_rows_is_a_one_line_refusal() -> None:
    refusal = str(
        packing_refusal(transformers.MusicgenForCausalLM(transformers.MusicgenDecoderConfig(**CODEBOOKS)), 40)
    )
    assert refusal.startswith("packing: musicgen_decoder does not run on flat rows: ") and "\n" not in refusal


@pytest.mark.parametrize("on_gpu", [True, False])
def test_out_of_memory_error_is_raised_not_reported_as_mixing(on_gpu: bool) -> None:
    model = Greedy(transformers.GPT2Config(**GPT2))
    model.on_gpu = on_gpu
    with pytest.raises(torch.OutOfMemoryError if on_gpu else RuntimeError):
        packing_refusal(model, 40)
    with pytest.raises(torch.OutOfMemoryError if on_gpu else RuntimeError):
        padding_refusal(model, 0)


@pytest.mark.parametrize("family", ["gpt2", "bloom", "rwkv", "musicgen"])
def test_checks_leave_the_model_unchanged(family: str) -> None:
    if family == "musicgen":
        model: Any = transformers.MusicgenForCausalLM(transformers.MusicgenDecoderConfig(**CODEBOOKS))
    else:
        model = built((SUPPORTED | MIXING)[family])
    model.train()
    next(model.children()).eval()
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    trainable = [weight.requires_grad for weight in model.parameters()]
    modes = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    config, state = model.config.to_dict(), torch.get_rng_state()
    packing_refusal(model, 40)
    padding_refusal(model, 0)
    assert [module.training for module in model.modules()] == modes
    assert [weight.requires_grad for weight in model.parameters()] == trainable
    assert all(bool((weight.grad == 1).all()) for weight in model.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert model.config.to_dict() == config and torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks for module in model.modules())


def test_adapters_and_dropout_do_not_change_the_refusal() -> None:
    for family in ("llama", "lfm2"):
        adapted = get_peft_model(
            built((SUPPORTED | MIXING)[family]), LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.5)
        )
        assert (packing_refusal(adapted.train(), 40) is None) == (family in SUPPORTED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", SUPPORTED | MIXING)
def test_padding_does_not_change_rows(family: str, dtype: torch.dtype) -> None:
    assert padding_refusal(built((SUPPORTED | MIXING)[family]).to(dtype), 0) is None


class ReadsPadding(transformers.GPT2LMHeadModel):
    """Adds the mean embedding of a row to all of its tokens, so padding affects them."""

    def forward(self, input_ids: Tensor, **inputs: Any) -> Any:
        embeddings = self.get_input_embeddings()(input_ids)
        return super().forward(inputs_embeds=embeddings + 1e-3 * embeddings.mean(1, keepdim=True), **inputs)


def test_padding_that_affects_rows_is_detected() -> None:
    """By the gradient of the padding, even below bfloat16 rounding, or by the logits if there is no gradient."""
    for dtype in (torch.float32, torch.bfloat16):
        refusal = str(padding_refusal(ReadsPadding(transformers.GPT2Config(**GPT2)).to(dtype), 3))
        assert refusal == f"gpt2 computes something else for rows that are padded: {MIXES}"
    refusal = str(padding_refusal(Counting(transformers.GPT2Config(**GPT2)), 3))
    assert refusal.startswith("gpt2 computes something else for rows that are padded: logits differ by ")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38], ids=str)
def test_a_base_that_is_not_finite_for_some_rows_is_not_reported_as_mixing(value: float) -> None:
    """Also where only the first row is finite, or only logits and not their gradient. Training reports the loss."""
    for row, longest in ((1, 12), (2, 12), (1, 24), (1, 40)):
        model = built(SUPPORTED["llama"])
        first, *others = random_rows(model, longest)
        (token, *_) = {*others[row - 1]["input_ids"]} - {*first["input_ids"]}
        model.get_input_embeddings().weight.data[token] = value
        assert packing_refusal(model, 40) is None and padding_refusal(model, 0) is None


def test_a_base_whose_logits_are_all_zero_is_not_reported_as_mixing() -> None:
    model = built(SUPPORTED["llama"])
    model.get_output_embeddings().weight.data.zero_()
    assert packing_refusal(model, 40) is None and padding_refusal(model, 0) is None


class FiniteAlone(transformers.GPT2LMHeadModel):
    """Returns NaN for batches of several rows."""

    def forward(self, input_ids: Tensor, **inputs: Any) -> Any:
        output = super().forward(input_ids, **inputs)
        output.logits = output.logits.masked_fill(torch.tensor(len(input_ids) > 1), torch.nan)
        return output


def test_batches_that_are_not_finite_as_rows_alone_are_detected() -> None:
    refusal = str(padding_refusal(FiniteAlone(transformers.GPT2Config(**GPT2)), 3))
    assert refusal.endswith("padded: logits do not differ by a finite number from those of a row alone")


def test_failure_on_padded_rows_is_not_reported_as_mixing() -> None:
    """Training reports it."""
    model = transformers.MusicgenForCausalLM(transformers.MusicgenDecoderConfig(**CODEBOOKS))
    assert padding_refusal(model, 0) is None


# --- packs


def by_hand(lengths: list[int], budget: int, fullest: bool) -> list[int]:
    """The loads of the packs by best fit (or first fit), one row at a time, longest first."""
    loads: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [number for number, load in enumerate(loads) if load + length <= budget]
        if not fitting:
            loads.append(0)
            fitting = [len(loads) - 1]
        loads[max(fitting, key=loads.__getitem__) if fullest else fitting[0]] += length
    return loads


def natural(count: int, seed: int = 0) -> np.ndarray:
    """Realistic row lengths: log-normal, capped at 2,048 tokens."""
    return np.random.default_rng(seed).lognormal(5.5, 1, count).clip(1, 2048).astype(np.int32)


@pytest.mark.parametrize("seed", range(60))
def test_best_fit_packs_every_row_once_and_matches_a_reference(seed: int) -> None:
    drawn = np.random.default_rng(seed)
    budget = int(drawn.integers(1, 200))
    lengths = drawn.integers(1, int(drawn.integers(1, budget + 1)) + 1, int(drawn.integers(1, 400)))
    packs = best_fit(lengths.astype(drawn.choice([np.uint8, np.int32, np.int64])), budget)
    several = [packs[number].tolist() for number in range(len(packs))]
    assert sorted(row for rows in several for row in rows) == list(range(len(lengths)))
    assert all(rows == sorted(rows) for rows in several)
    loads = [int(lengths[rows].sum()) for rows in several]
    assert sorted(loads) == sorted(by_hand(lengths.tolist(), budget, fullest=True))
    assert max(loads) <= budget
    assert -(-int(lengths.sum()) // budget) <= len(packs)


def test_best_fit_takes_no_more_packs_than_first_fit() -> None:
    several = [(natural(400, seed), 2048 * (1 + seed % 3)) for seed in range(20)]
    first = [len(by_hand(lengths.tolist(), budget, fullest=False)) for lengths, budget in several]
    assert all(len(best_fit(*case)) <= count for case, count in zip(several, first, strict=True))


def test_a_budget_beyond_all_rows_takes_no_memory() -> None:
    assert [pack.tolist() for pack in best_fit(np.array([3, 1, 2], np.uint8), 1 << 62)] == [[0, 1, 2]]
    assert len(best_fit(np.array([], np.int64), 1 << 62)) == 0


def test_packs_can_be_indexed_and_iterated() -> None:
    packs = best_fit(np.array([3, 1, 2, 4]), 5)
    assert [packs[number].tolist() for number in range(len(packs))] == [[1, 3], [0, 2]]
    assert packs[-1].tolist() == [0, 2] and [pack.tolist() for pack in packs] == [[1, 3], [0, 2]]
    with pytest.raises(IndexError):
        packs[2]


@pytest.mark.parametrize("lengths", [[3, 0], [3, 9], [-1]])
def test_lengths_out_of_range_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="do not fit 1 to 8"):
        best_fit(np.array(lengths), 8)


def test_packing_a_million_rows_is_dense_and_needs_little_memory() -> None:
    lengths = natural(1_000_000)
    tracemalloc.start()
    packs = best_fit(lengths, 2048)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 1 - lengths.sum(dtype=np.int64) / (len(packs) * 2048) < 0.005
    assert peak < 32 * len(lengths)
    assert packs.order.nbytes + packs.starts.nbytes <= 8 * len(lengths)


# --- batches

LENGTHS = (5, 40, 1, 23, 12, 40, 33, 2, 2, 17)
Packing = Literal["none", "batch", "full"]


def batches(packing: Packing, several: list[dict[str, Any]], size: int = 2) -> BatchLayout:
    return BatchLayout(several, np.array([len(row["input_ids"]) for row in several], int), packing, size, 40, pad_id=0)


@pytest.mark.parametrize(("packing", "items", "size"), [("none", 10, 2), ("batch", 10, 2), ("full", 3, 1)])
def test_loader_yields_every_row_once(packing: Packing, items: int, size: int) -> None:
    several = rows(*LENGTHS)
    layout = batches(packing, several)
    assert (len(layout.items), layout.size, layout.flat) == (items, size, packing != "none")
    collate = pickle.loads(pickle.dumps(layout.collate))
    loader = DataLoader(layout.items, batch_size=layout.size, shuffle=True, collate_fn=collate)  # type: ignore[arg-type]
    seen = []
    for batch in loader:
        assert batch["input_ids"].numel() <= 2 * 40
        if layout.flat:
            assert "attention_mask" not in batch
            starts = [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), batch["input_ids"].shape[1]]
            seen += [batch["input_ids"][0, a:b].tolist() for a, b in pairwise(starts)]
        else:
            pairs = zip(batch["input_ids"], batch["attention_mask"], strict=True)
            seen += [ids[mask == 1].tolist() for ids, mask in pairs]
    assert sorted(seen) == sorted(row["input_ids"] for row in several)


@pytest.mark.parametrize("packing", ["none", "batch", "full"])
def test_heaviest_batch_has_the_most_tokens(packing: Packing) -> None:
    layout = batches(packing, rows(*LENGTHS))
    tokens = [
        sum(len(row["input_ids"]) for row in (item if packing == "full" else [item]))
        for item in map(layout.items.__getitem__, range(len(layout.items)))
    ]
    assert [layout.tokens(number) for number in range(len(layout.items))] == tokens
    heaviest = layout.heaviest()
    assert len(set(heaviest)) == layout.size
    assert [layout.tokens(number) for number in heaviest] == sorted(tokens, reverse=True)[: layout.size]


def test_heaviest_batch_with_few_rows_or_none() -> None:
    assert batches("batch", rows(3), size=4).heaviest() == [0]
    for packing in ("none", "batch", "full"):
        assert batches(packing, []).heaviest() == [] and len(batches(packing, []).items) == 0  # type: ignore[arg-type]


# --- the loss


def train(packing: Packing, several: list[dict[str, Any]], attention: str) -> tuple[float, int, list[Tensor]]:
    """The loss over all batches, its token count, and the gradients."""
    model = tiny_llama(attention_dropout=0.0)
    model.set_attn_implementation(attention)
    layout = batches(packing, several)
    total, tokens = 0.0, 0
    for batch in DataLoader(layout.items, batch_size=layout.size, collate_fn=layout.collate):  # type: ignore[arg-type]
        labels = batch.pop("labels")
        loss, count = next_token_loss(model, model(**batch, use_cache=False).logits, labels)
        loss.backward()
        total, tokens = total + loss.item(), tokens + int(count)
    return total / tokens, tokens, [weight.grad / tokens for weight in model.parameters() if weight.grad is not None]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("packing", ["batch", "full"])
def test_loss_and_gradients_match_those_of_padded_rows(packing: Packing, attention: str) -> None:
    several = rows(*LENGTHS)
    several[1]["labels"] = list(several[1]["input_ids"])  # supervised from its first token
    padded, flat = train("none", several, attention), train(packing, several, attention)
    assert flat[0] == pytest.approx(padded[0], abs=1e-5) and flat[1] == padded[1]
    assert len(flat[2]) == len(padded[2]) > 0
    for one, other in zip(flat[2], padded[2], strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
        assert one.abs().max() > 1e-4
