"""Rows on both sides of a length at which a model switches its rotary frequencies are computed as each alone."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import config_in, mainly, write_rows
from families import small, small_config
from peft import LoraConfig, PeftModel, get_peft_model
from running import WEIGHTS, Cli, MakeConfig, curve
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast, StoppingCriteria

import loratune
from loratune import kernels
from loratune.adapter import generation, padding
from loratune.adapter.generation import LoadedAdapter, SharedPrompts
from loratune.adapter.options import Sampling
from loratune.compare import behavior
from loratune.compare.engine import Engine
from loratune.config import DataSection
from loratune.data.batch_check import padding_refusal
from loratune.data.batches import flatten, pad
from loratune.data.packing import PrefixTree, share_prefixes
from loratune.lora import attach, tensors

LIMIT = 64


def longrope(limit: int = LIMIT, **more: Any) -> dict[str, Any]:
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": limit}
    return {"rope_type": "longrope", "rope_theta": 1e4, **factors, **more}


def changes(**parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": longrope(**parameters), "original_max_position_embeddings": LIMIT}


SWITCHING: dict[str, dict[str, Any]] = {
    "phi3": changes(partial_rotary_factor=1.0),
    "phimoe": changes(short_mscale=1.1, long_mscale=1.3),
    "phi4_multimodal": changes(partial_rotary_factor=1.0),
    "llama": changes(),
    "gemma3_text": {"rope_parameters": {"full_attention": longrope(), "sliding_attention": longrope(32)}},
}
"""With factors of a scale of their own, and with limits of their own for each kind of layers."""
OTHERS: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
    "qwen3": {"rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": LIMIT,
    }},
    "gemma2": {}, "gemma3_text": {}, "mistral": {}, "gpt_oss": {}, "llama4_text": {}, "ministral3": {},
    "qwen2": {"layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": 24},
    "deepseek_v32": {"index_topk": 24},
}  # fmt: skip
"""Windows and chunks of 24 tokens, the selection of as many, scales by position, and rotations that do not switch
within the context."""


def model_of(family: str, **values: Any) -> Any:
    """A model whose predictions depend on distant tokens."""
    model = small(family, **values).float().eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data.mul_(3)
    model.generation_config = GenerationConfig()
    return model


def drawn(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(60, 260, (length,), generator=generator).tolist() for length in lengths]
    return [*rows, rows[1][:50] + rows[0], rows[1][:50]]  # which share a prefix with a long one


ROWS = drawn(20, 110, LIMIT, LIMIT + 1, 40)


@torch.no_grad()
def logits_alone(model: Any, ids: list[int]) -> Tensor:
    batch = torch.tensor([ids])
    logits: Tensor = model(input_ids=batch, attention_mask=torch.ones_like(batch), use_cache=False).logits[0]
    return logits


def largest(ours: list[Tensor], its: list[Tensor]) -> float:
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, its, strict=True))


@torch.no_grad()
def differences(model: Any, alone: list[Tensor]) -> list[float]:
    """How far the logits of `ROWS`, padded and packed, are from those of the rows alone."""
    rows = [{"input_ids": ids, "labels": ids} for ids in ROWS]
    batches = pad(rows, 0), flatten(rows)
    padded, packed = (
        model(**{k: v for k, v in one.items() if k != "labels"}, use_cache=False).logits for one in batches
    )
    by_row = [padded[number, : len(ids)] for number, ids in enumerate(ROWS)]
    return [largest(by_row, alone), largest([*packed[0].split([*map(len, ROWS)])], alone)]


@pytest.mark.parametrize("family", SWITCHING)
def test_rows_of_a_batch_have_the_logits_that_they_have_alone(family: str) -> None:
    """In transformers they do not, and the check of padding, whose rows are short, does not see it."""
    model = model_of(family, **SWITCHING[family])
    alone = [logits_alone(model, ids) for ids in ROWS]
    assert min(differences(model, alone)) > 0.05 and padding_refusal(model, 0) is None
    kernels.use_row_angles(model)
    assert all(torch.equal(logits_alone(model, ids), logits) for ids, logits in zip(ROWS, alone, strict=True))
    assert max(differences(model, alone)) < 1e-5


@pytest.mark.parametrize("family", OTHERS)
def test_what_does_not_switch_is_left_alone(family: str) -> None:
    """Rows beyond a window, a chunk or a selection are right in batches of transformers, padded on either side."""
    model = model_of(family, **OTHERS[family])
    kernels.use_row_angles(model)
    assert not kernels.length_limits(model.config)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    alone = [logits_alone(model, ids) for ids in ROWS]
    assert differences(model, alone)[0] < 1e-4
    settings = GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=[-1])
    batches = [ROWS, *([ids] for ids in ROWS)]
    together, *each = (
        model.generate(**padding.pad_left(model, rows, 0), generation_config=settings) for rows in batches
    )
    assert together[:, -8:].tolist() == [one[0, -8:].tolist() for one in each]


LIMITS: list[tuple[dict[str, Any], tuple[int, ...]]] = [
    ({}, ()),
    (longrope(), (LIMIT,)),
    *(({"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}, ()) for kind in ("linear", "dynamic", "yarn", "llama3")),
    ({"full_attention": longrope(), "sliding_attention": longrope(32)}, (32, LIMIT)),
    ({"full_attention": longrope(), "sliding_attention": {"rope_type": "default"}}, (LIMIT,)),
]


@pytest.mark.parametrize(("parameters", "expected"), LIMITS)
def test_limits_are_read_from_the_configuration(parameters: dict[str, Any], expected: tuple[int, ...]) -> None:
    config = small_config("gemma3_text" if "full_attention" in parameters else "llama")
    config.rope_parameters = parameters
    assert kernels.length_limits(config) == expected


def test_a_row_passes_a_limit_if_tokens_on_both_sides_are_read() -> None:
    """The token that is written last is not read."""
    found = [kernels.crosses((32, 64), length, 3) for length in (29, 30, 31, 32, 33, 61, 62, 64, 65)]
    assert found == [[], [], [32], [32], [], [], [], [64], []]
    assert kernels.crosses((32, 64), 10, 100) == [32, 64] and not kernels.crosses((), 10, 100)


def test_rows_on_both_sides_share_no_prefix() -> None:
    tree = PrefixTree.of(ROWS, (LIMIT,))
    of_side = [{place for ids, places in zip(ROWS, tree.places, strict=True) if (len(ids) > LIMIT) == side
                for place in places.tolist()} for side in (False, True)]  # fmt: skip
    assert not of_side[0] & of_side[1] and len(of_side[0] | of_side[1]) == len(tree.ids)
    assert len(PrefixTree.of(ROWS).ids) == len(tree.ids) - 50 < sum(map(len, ROWS)) - 50
    for ids, places in zip(ROWS, tree.places, strict=True):
        assert tree.ids[places].tolist() == ids and tree.positions[places].tolist() == [*range(len(ids))]


def test_trees_of_rows_have_the_loss_of_the_rows_alone() -> None:
    model: Any = get_peft_model(model_of("phi3", **SWITCHING["phi3"]), LoraConfig(r=2, target_modules=["qkv_proj"]))
    kernels.use_row_angles(model.get_base_model())
    rows = [{"input_ids": ids, "labels": ids} for ids in ROWS]
    alone = sum(functional.cross_entropy(logits_alone(model, ids)[:-1], torch.tensor(ids[1:]), reduction="sum")
                for ids in ROWS)  # fmt: skip
    with kernels.accelerated(model, attach.adapted_linear), torch.no_grad():
        assert kernels.tree_refusal(model) is None
        for batch in (share_prefixes(rows, (LIMIT,)), pad(rows, 0), flatten(rows)):
            kernels.set_loss_targets(model, batch["labels"], batch.pop("places", None))
            labels = batch.pop("labels")
            total, _ = kernels.next_token_loss(model, model(**batch, use_cache=False).logits, labels)
            assert float(total) == pytest.approx(float(alone), rel=1e-5)


# Generation

NEW = 12
PROMPTS = [ROWS[1][:length] for length in (20, 52, 53, 54, 60, 63, LIMIT, LIMIT + 1, 100)]


def uncached(model: Any, ids: list[int], new: int = NEW) -> list[int]:
    """The most probable continuation of a prompt, each token from a forward pass over all tokens before it."""
    for _ in range(new):
        ids = [*ids, int(logits_alone(model, ids)[-1].argmax())]
    return ids[-new:]


class Never(StoppingCriteria):
    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Tokenizer:
    """Each id is a character; the end token is that of `Renderer`."""

    def decode(self, ids: Any, **_: Any) -> str:
        return "".join(map(chr, ids.tolist() if isinstance(ids, Tensor) else ids))


def loaded(model: Any, *end_ids: int) -> LoadedAdapter:
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=r".*\.(q|qkv)_proj"))
    layers = kernels.InferenceLayers(peft, generation.reader("default"))
    renderer: Any = SimpleNamespace(end_ids=end_ids)
    data: Any = None
    return LoadedAdapter(
        peft, Tokenizer(), renderer, data, False, (None, None), "", "default", layers, False, True,  # type: ignore[arg-type]
        SharedPrompts(peft, 0),
    )  # fmt: skip


@pytest.mark.parametrize("family", mainly([*SWITCHING][:2], SWITCHING))
def test_answers_are_those_without_a_cache(family: str) -> None:
    """Also of prompts that pass the limit, which transformers gets right in Phi-3 alone; one by one and in a batch, by
    `generate` and by what writes the texts of retention."""
    model = model_of(family, **SWITCHING[family])
    kernels.use_row_angles(model)
    adapter = loaded(model)
    expected = [uncached(model, ids) for ids in PROMPTS]
    assert [adapter.complete([ids], NEW)[0] for ids in PROMPTS] == expected
    assert adapter.complete(PROMPTS, NEW) == expected
    engine = Engine(
        adapter.model, DataSection(train="none"), 0, kernels.accelerate(adapter.model, attach.adapted_linear)
    )
    assert [*behavior.write(adapter.model, engine, PROMPTS, NEW, end_ids=())] == expected


def test_prompts_that_share_a_prefix_keep_it_only_on_one_side() -> None:
    model = model_of("llama", **SWITCHING["llama"])
    kernels.use_row_angles(model)
    adapter, before = loaded(model), ROWS[1][:45]
    for last in (10, 30):  # tokens of the longer prompt behind the prefix
        rows = [[*before, *ROWS[0][:6]], [*before, *ROWS[4][:last]], [*before, 61, 62]]
        assert ("cache" in adapter.prompts.batch(rows, 4)) == (last == 10)
        assert adapter.complete(rows, 4) == [uncached(model, ids, 4) for ids in rows]


@pytest.mark.parametrize("by", ["end token", "stop text"])
def test_a_completion_ends_on_either_side_of_the_limit_and_at_it(by: str) -> None:
    model = model_of("llama", **SWITCHING["llama"])
    kernels.use_row_angles(model)
    adapter, prompt = loaded(model), ROWS[1][: LIMIT - 4]
    whole = uncached(model, prompt)
    for place in range(NEW):
        if whole[place] in whole[:place]:
            continue
        adapter.renderer.end_ids = (whole[place],) if by == "end token" else ()  # type: ignore[misc]
        sampling = Sampling(stop=(chr(whole[place]),) if by == "stop text" else ())
        pieces = list[Tensor]()
        ended = list[bool]()
        streamer = SimpleNamespace(put=pieces.append, end=lambda ended=ended: ended.append(True))
        (found,) = generation.complete([(adapter, prompt)], NEW, sampling, streamer)
        assert found == whole[: place + 1]
        assert torch.cat([piece.flatten() for piece in pieces]).tolist() == [*prompt, *found] and ended == [True]


SAMPLED = Sampling(temperature=1.0, seed=5)


def test_drawn_tokens_are_those_of_one_call() -> None:
    """The random numbers of a completion do not depend on where its row passes the limit."""
    model = model_of("phi3", **SWITCHING["phi3"])  # whose cache transformers itself drops there
    kernels.use_row_angles(model)
    adapter, prompt = loaded(model), ROWS[1][: LIMIT - 4]
    (ours,) = adapter.complete([prompt], NEW, SAMPLED)
    settings = GenerationConfig(
        max_new_tokens=NEW,
        do_sample=True,
        temperature=1.0,
        top_k=SAMPLED.top_k,
        top_p=SAMPLED.top_p,
        pad_token_id=0,
        eos_token_id=[-1],
    )
    torch.manual_seed(5)
    its = adapter.model.generate(**padding.pad_left(model, [prompt], 0), generation_config=settings)
    assert ours == its[0, -NEW:].tolist()


# Through the commands


def text_rows(*lengths: int) -> list[dict[str, str]]:
    """Rows of these tokens, one of which is the end token."""
    words = "the length of a row decides how far its tokens are turned, and nothing else does; " * 3
    return [
        {"prompt": words[at : at + length - 9], "completion": f" {at:02} is it"[:8]}
        for at, length in enumerate(lengths)
    ]


TRAIN = text_rows(30, 110, 64, 65, 90, 25, 100, 40, 70, 50, 120, 33)
HELD_OUT = text_rows(28, 105, 66, 62, 80, 35)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    path = tmp_path_factory.mktemp("phi3")
    model_of("phi3", vocab_size=264, eos_token_id=256, **SWITCHING["phi3"]).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


SETTINGS = {
    "optim": "sgd", "learning_rate": 0.1, "max_steps": 3, "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
    "seed": 3, "logging_steps": 1, "eval_steps": 3,
}  # fmt: skip


def loss_alone(model: Any, tokenizer: Any, row: dict[str, str]) -> tuple[Tensor, int]:
    """The summed loss of a row by itself, and its supervised tokens."""
    before = tokenizer(row["prompt"]).input_ids
    ids = torch.tensor([[*before, *tokenizer(row["completion"]).input_ids, tokenizer.eos_token_id]])
    logits = model(ids).logits[0, len(before) - 1 : -1]
    return functional.cross_entropy(logits, ids[0, len(before) :], reduction="sum"), ids.shape[1] - len(before)


@pytest.mark.parametrize(
    ("packing", "batch", "accumulation"), mainly([("batch", 4, 1)], [("none", 4, 1), ("none", 2, 2), ("batch", 4, 1)])
)
def test_training_and_evaluation_are_those_of_stock_transformers_row_by_row(
    packing: str, batch: int, accumulation: int, base: Path, cli: Cli, run_config: MakeConfig, tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
) -> None:  # fmt: skip
    files = {"train": str(write_rows(tmp_path / "train.jsonl", TRAIN)), "packing": packing}
    files["validation"] = str(write_rows(tmp_path / "held_out.jsonl", HELD_OUT))
    training = SETTINGS | {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    path = run_config(model={"name_or_path": str(base)}, data=files, training=training)
    plan = loratune.plan(loratune.load_config(path, {"output_dir": tmp_path / "plan"}))
    start = {name: value.clone() for name, value in tensors.weights(plan.model).items()}
    ran = cli("train", path, "--allow-worse")
    assert ran.code == 0, ran.err
    assert plan.batches.train.flat == (packing == "batch")
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out", is_trainable=True)
    trained = {name: value for name, value in stock.named_parameters() if value.requires_grad}
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(start[name.replace(".default", "")])
    optimizer, losses = torch.optim.SGD(trained.values(), lr=0.1), []
    order = torch.randperm(len(TRAIN), generator=torch.Generator().manual_seed(3)).tolist()
    for step in range(3):
        found = [loss_alone(stock, tokenizer, TRAIN[number]) for number in order[4 * step : 4 * step + 4]]
        loss = sum(total for total, _ in found) / sum(count for _, count in found)
        losses.append(float(loss))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        optimizer.step()
    record = json.loads((tmp_path / "out" / "loratune.json").read_text())
    assert [step["loss"] for step in curve(record) if "loss" in step] == pytest.approx(losses, rel=1e-5)
    ours = load_file(tmp_path / "out" / WEIGHTS)
    for name, parameter in trained.items():
        key = name.replace(".default", "")
        moved = float((parameter.detach() - start[key]).norm())
        assert float((parameter.detach() - ours[key]).norm()) < 1e-3 * moved, key
    with torch.no_grad():
        of_rows = [loss_alone(stock, tokenizer, row) for row in HELD_OUT]
    expected = float(sum(total for total, _ in of_rows)) / sum(count for _, count in of_rows)
    adapter = loratune.Adapter(tmp_path / "out")
    assert adapter.evaluate(HELD_OUT).to_dict()["adapter"]["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def adapter(base: Path, cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One on that base."""
    path = tmp_path_factory.mktemp("adapter")
    settings = {"max_steps": 4, "learning_rate": 0.003, "per_device_train_batch_size": 4}
    config = config_in(path, base)(data={"train": str(write_rows(path / "train.jsonl", TRAIN))}, training=settings)
    ran = cli("train", config, "--allow-worse")
    assert ran.code == 0, ran.err
    return path / "out"


def test_answers_are_those_of_stock_transformers_row_by_row(
    base: Path, adapter: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Prompts on both sides of a limit, in one batch."""
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    ours = loratune.Adapter(adapter)
    prompts = [
        (3 * row["prompt"])[:length] for row, length in zip(TRAIN, (20, 100, 52, 58, 63, 64, 65, 30), strict=False)
    ]
    expected = [
        tokenizer.decode(uncached(stock, tokenizer(prompt).input_ids), skip_special_tokens=True) for prompt in prompts
    ]
    assert ours.generate(prompts, max_new_tokens=NEW) == expected


def test_a_division_of_pairs_changes_nothing(base: Path, cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    """Also where a pair has answers on both sides."""
    rows = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": " is not" * (number % 4 * 3 + 1)}
            for number, row in enumerate(text_rows(30, 100, 60, 35, 63, 90, 50, 40))]  # fmt: skip
    data = {"train": str(write_rows(tmp_path / "pairs.jsonl", rows)), "packing": "none", "max_length": 128}
    found = []
    for batch, accumulation in ((4, 1), (1, 4)):
        training = SETTINGS | {"objective": "dpo", "max_steps": 2, "eval_steps": None}
        training |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        path = run_config(
            model={"name_or_path": str(base)}, data=data, training=training, output_dir=str(tmp_path / str(batch))
        )
        ran = cli("train", path, "--allow-worse")
        assert ran.code == 0, ran.err
        found.append(load_file(tmp_path / str(batch) / WEIGHTS))
    for name, weight in found[0].items():
        if "lora_B" in name:  # which begins at 0
            assert float((weight - found[1][name]).norm()) < 1e-4 * float(weight.norm()), name
