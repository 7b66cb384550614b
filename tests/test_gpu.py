"""What runs on a GPU, as far as a CPU can show it: block masks, copies of batches, layers in the dtype of the base.

`make gpu-dry` runs the accelerated models on tensors without data that are on a GPU.
"""

import re
import sys
from collections.abc import Callable
from itertools import product
from types import SimpleNamespace
from typing import Any

import bitsandbytes
import pytest
import torch
from conftest import tiny_llama
from peft import LoraConfig, get_peft_model
from test_kernels import normal, row_by_row, step
from test_prefix_tree import TREES
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, BitsAndBytesConfig, LlamaForCausalLM

from loratune import kernels
from loratune.data.batches import flatten, put_rows
from loratune.data.packing import PrefixTree, share_prefixes
from loratune.errors import LoratuneError, Problem, is_out_of_memory
from loratune.kernels import acceleration, gpu, lora_linear, upstream
from loratune.kernels.layout import PerBatch
from loratune.kernels.loss import LossHead, Scaling
from loratune.kernels.parity_check import ParityCheck, relative_rms
from loratune.kernels.recognition import recognize
from loratune.kernels.transfer import on_host, send, to_device
from loratune.lora import attach
from loratune.system import accelerator

CPU = torch.device("cpu")
META = torch.device("meta")


# --- block masks


def visible(mask: Any, tokens: int) -> Tensor:
    """Which tokens attend to which, by the blocks of a `BlockMask` and by its function within partial blocks."""
    at = torch.arange(tokens)
    by_function = mask.mask_mod(None, None, at[:, None], at[None, :])
    whole, partial = (
        lists(count, indices)
        for count, indices in (
            (mask.full_kv_num_blocks, mask.full_kv_indices), (mask.kv_num_blocks, mask.kv_indices),
        )
    )  # fmt: skip
    result = torch.zeros(tokens, tokens, dtype=torch.bool)
    blocks = range(-(-tokens // gpu.BLOCK))
    for row, column in product(blocks, blocks):
        part = tuple(slice(number * gpu.BLOCK, (number + 1) * gpu.BLOCK) for number in (row, column))
        assert not (column in whole[row] and column in partial[row])
        result[part] = by_function[part] if column in partial[row] else column in whole[row]
    return result


def lists(counts: Tensor, indices: Tensor) -> list[list[int]]:
    return [row[:count] for row, count in zip(indices[0, 0].tolist(), counts[0, 0].tolist(), strict=True)]


@pytest.mark.parametrize("window", [None, 1, 33, 200])
@pytest.mark.parametrize("name", TREES)
def test_block_masks_of_trees(name: str, window: int | None) -> None:
    """A token attends to its predecessors in every row that contains it, and to nothing else."""
    rows = [*TREES[name], *TREES["longer than a tile"]]
    tree = PrefixTree.of(rows)
    expected = torch.zeros(len(tree.ids), len(tree.ids), dtype=torch.bool)
    for places in tree.places:
        for position, place in enumerate(places.tolist()):
            expected[place, places[max(0, position - window + 1) if window else 0 : position + 1]] = True
    mask = gpu.tree_mask(torch.from_numpy(tree.positions), (window, CPU))
    assert torch.equal(visible(mask, len(tree.ids)), expected)


def test_block_masks_have_whole_and_absent_blocks() -> None:
    """Otherwise all pairs of tokens would be computed."""
    mask = gpu.tree_mask(torch.cat([torch.arange(600), torch.arange(300, 400), torch.arange(512)]), (None, CPU))
    blocks = len(mask.full_kv_num_blocks[0, 0])
    whole, partial = int(mask.full_kv_num_blocks.sum()), int(mask.kv_num_blocks.sum())
    assert whole > blocks and whole + partial < blocks * (blocks + 1) // 2


def test_flex_attention_within_trees() -> None:
    """Forward only: there is no backward pass on a CPU."""
    positions = torch.cat([torch.arange(*span) for span in ((0, 40), (20, 70), (60, 65), (20, 21), (0, 130))])
    seen = visible(gpu.tree_mask(positions, (None, CPU)), len(positions))
    query, key, value = (normal(1, heads, len(positions), 16, seed=heads) for heads in (6, 2, 2))
    found = gpu.TreeAttention().attend(query, key, value, positions[None], None, None)
    expected = functional.scaled_dot_product_attention(query, key, value, seen, enable_gqa=True).transpose(1, 2)
    assert found.shape == expected.shape and relative_rms(expected, found) < 1e-5


# --- batches on a device


def test_copies_know_their_originals() -> None:
    labels, scalar = torch.arange(6).view(2, 3), torch.tensor(3)
    sent = to_device({"labels": labels, "teacher": (labels, scalar), "more": [{"x": labels}], "name": "x"}, META)
    assert sent["labels"].device == sent["teacher"][0].device == sent["more"][0]["x"].device == META
    assert on_host(sent["labels"]) is labels and sent["teacher"][1] is scalar and sent["name"] == "x"
    assert on_host(to_device(sent, META)["labels"]) is labels
    view = sent["labels"].view(3, 2)
    assert on_host(view).tolist() == labels.view(3, 2).tolist()
    assert send(labels, CPU) is labels and on_host(labels) is labels
    assert "labels" in to_device({"labels": labels}, CPU)


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("put", [flatten, share_prefixes])
def test_the_loss_needs_no_values_of_a_device(put: Callable[..., Any], by_row: bool) -> None:
    """On the meta device every value that is read is an error, as is every shape that depends on one."""
    ids = [[*range(1, 30)], [*range(1, 20), 40, 41], [5]]
    rows = [{"input_ids": row, "labels": [-100, *row[1:]]} for row in ids]
    batch = put_rows(put, rows)
    sent = to_device(batch, META)
    head = LossHead(nn.Linear(16, 64, device=META).requires_grad_(False), Scaling())
    head.labels, head.places = sent["labels"], sent.get("places")
    head.lengths = sent["lengths"] if by_row else None
    hidden = torch.empty(1, batch["input_ids"].shape[1], 16, device=META, requires_grad=True)
    head(hidden)
    assert head.losses is not None and head.losses.shape == ((3,) if by_row else ())


def test_labels_must_fit_the_states() -> None:
    head = LossHead(nn.Linear(4, 8).requires_grad_(False), Scaling())
    head.labels = torch.ones(1, 5, dtype=torch.long)
    with pytest.raises(ValueError, match=r"\(1, 5\) labels for \(1, 7\) states"):
        head(torch.zeros(1, 7, 4))


def test_positions_of_padded_rows_are_known() -> None:
    """A model makes them on its device, where reading them would wait. Others are read once a batch."""
    seen = list[list[int]]()
    positions = PerBatch(lambda read, key: seen.append(read.tolist()))
    made = torch.empty(1, 3, dtype=torch.long, device=META)
    for _ in range(2):
        positions.get(made, torch.Size((2, 3)), "layer")
    sent = send(torch.tensor([[0, 1, 0]]), META)
    positions.get(sent, torch.Size((1, 3)))
    assert seen == [[0, 1, 2, 0, 1, 2], [0, 1, 0]]


def test_bounds_of_rows() -> None:
    bounds, longest = gpu.row_bounds(torch.tensor([0, 1, 2, 0, 0, 1]), META)
    assert on_host(bounds).tolist() == [0, 3, 4, 6] and longest == 3


# --- layers


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_lora_on_quantized_layers_keeps_the_dtype(bits: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT casts the inputs to float32, and keeps these copies."""
    tiny_llama(hidden_size=128, intermediate_size=256).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_8bit=bits == "8bit", load_in_4bit=bits == "4bit")
    base = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32)
    model: Any = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False  # a CPU would repack its weight, without a backward pass
    ids = [*range(1, 40)]
    batch = flatten([{"input_ids": ids, "labels": ids}])
    monkeypatch.setattr(gpu, "varlen_attn", row_by_row)
    monkeypatch.setattr(acceleration, "_replace", lambda *of, **_: gpu.replace(*of))
    loss, gradients = step(model.train(), batch)
    with kernels.accelerated(model, attach.adapted_linear) as fallbacks:
        patched = [type(one).__name__ for one in model.modules() if "forward" in vars(one)]
        fast, others = step(model, batch)
    replaced = [name for name in patched if name != "LlamaRMSNorm"]
    assert fallbacks == [] and len(replaced) == 14 and {*replaced} == {f"Linear{bits.replace('8bit', '8bitLt')}"}
    assert fast == pytest.approx(loss, abs=1e-5)
    assert all(relative_rms(old, others[name]) < 1e-4 for name, old in gradients.items())
    part = attach.adapted_linear(model.get_base_model().model.layers[0].mlp.up_proj)
    assert part is None


def test_quantized_products_are_in_the_dtype_of_the_input() -> None:
    """The result of a layer of float32 has the dtype of the states, as have all tensors between."""
    layer = nn.Linear(8, 6, dtype=torch.bfloat16).requires_grad_(False)
    down, up = nn.Parameter(normal(2, 8)), nn.Parameter(normal(6, 2))
    part = lora_linear.Adapted(layer, down, up, 2.0)
    x = normal(3, 8).bfloat16()
    dtypes = set[torch.dtype]()
    with torch.autograd.graph.saved_tensors_hooks(lambda one: dtypes.add(one.dtype) or one, lambda one: one):
        y = gpu.quantized_linear(layer, part, down, up)(x.requires_grad_())
    assert y.dtype == torch.bfloat16 and dtypes == {torch.bfloat16}
    expected = layer(x).float() + 2 * (x.float() @ down.t() @ up.t())
    assert relative_rms(expected, y) < 0.02


def test_norms_keep_no_copy_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = get_peft_model(tiny_llama().bfloat16(), LoraConfig(r=4, target_modules="all-linear"))
    monkeypatch.setattr(gpu, "varlen_attn", row_by_row)
    monkeypatch.setattr(acceleration, "_replace", lambda *of, **_: gpu.replace(*of))
    with kernels.accelerated(model, attach.adapted_linear) as fallbacks:
        norms = [one for one in model.modules() if type(one).__name__ == "LlamaRMSNorm" and "forward" in vars(one)]
        assert fallbacks == [] and len(norms) == 5
        kept = list[Tensor]()
        with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
            norms[0](normal(7, 32).bfloat16().requires_grad_())
    stock, x = type(norms[0])(32, 1e-5), normal(7, 32)
    assert relative_rms(stock(x), gpu.fast_norm(stock, 1e-5)(x)) < 1e-6
    assert stock(x.bfloat16()).dtype == gpu.fast_norm(stock, 1e-5)(x.bfloat16()).dtype == torch.float32


def test_other_attention_that_is_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_llama()
    base.set_attn_implementation("flex_attention")
    model: Any = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    monkeypatch.setattr(gpu, "ParityCheck", lambda base: SimpleNamespace(runs=True, passes=lambda: True))
    known = recognize(model.get_base_model(), attach.adapted_linear, None)
    steps, fallbacks = gpu.replace(model.get_base_model(), attach.adapted_linear, [], known)
    assert fallbacks == {"attention": "model.attn_implementation is flex_attention"} and len(steps) == 2


# --- the machine


def test_without_a_gpu_the_cpu_is_used() -> None:
    if torch.accelerator.is_available():
        pytest.skip("there is one")
    assert re.fullmatch(r"CPU, (1 thread|\d+ threads), bfloat16", accelerator.describe(torch.bfloat16))
    assert accelerator.device() == CPU and not accelerator.has_gpu() and accelerator.names() == []
    torch.manual_seed(1)
    with accelerator.same_random_numbers(CPU):
        first = torch.rand(1)
    assert torch.equal(torch.rand(1), first)


def test_a_gpu_is_named_with_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    known = SimpleNamespace(total_memory=80 << 30)
    module = SimpleNamespace(get_device_name=lambda _: "NVIDIA H100", get_device_properties=lambda _: known)
    monkeypatch.setattr(accelerator, "device", lambda: torch.device("cuda", 1))
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    assert accelerator.describe(torch.bfloat16) == "cuda:1 NVIDIA H100, 80.0 GiB, bfloat16"
    assert accelerator.describe(torch.bfloat16, spread=True) == "cuda:1 NVIDIA H100, 80.0 GiB and 3 more, bfloat16"


@pytest.mark.parametrize(("error", "expected"), [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
    (RuntimeError("CUDA error: out of memory"), True),
    (RuntimeError("Triton Error [CUDA]: out of memory"), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"), True),
    (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    (LoratuneError(Problem("data.row", "row 3: out of memory")), False),
    (ValueError("out of memory"), False),
], ids=str)  # fmt: skip
def test_errors_of_memory_are_recognized(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


@pytest.mark.parametrize("factor", [1.0, 1.5])
@pytest.mark.parametrize("setting", ["auto", True, False])
def test_liger_is_used_if_the_model_computes_the_same(
    setting: bool | str, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its functions are bound to modules, and put in the place of those in the file of their class."""
    model: Any = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules="all-linear"))
    norm = model.get_base_model().model.norm
    file, rotary = sys.modules[type(norm).__module__], sys.modules[type(norm).__module__].apply_rotary_pos_emb

    def patch(given: Any, kernels: Any) -> None:
        norm.forward, norm.casting_mode = lambda x: type(norm).forward(norm, x) * factor, "llama"
        file.apply_rotary_pos_emb = lambda *of, **named: rotary(*of, **named)

    monkeypatch.setattr(upstream, "apply_liger_kernel", patch)
    monkeypatch.setattr(gpu, "is_liger_kernel_available", lambda: True)
    assert kernels.uses_liger("auto", model) == (False, [])  # on a CPU
    monkeypatch.setattr(type(model.get_base_model()), "device", property(lambda _: SimpleNamespace(type="cuda")))
    monkeypatch.setattr(gpu, "ParityCheck", on_cpu)
    used, lines = kernels.uses_liger(setting, model)
    assert used is (setting is not False and factor == 1.0)
    assert bool(lines) == (setting == "auto" or (setting is True and not used))
    assert file.apply_rotary_pos_emb is rotary and not {"forward", "casting_mode"} & vars(norm).keys()


def on_cpu(base: Any) -> Any:
    """The check of a model that says it is on a GPU, but is on a CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(base), "device", CPU)
        check = ParityCheck(base)

    def passes() -> bool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(base), "device", CPU)
            return check.passes()

    return SimpleNamespace(runs=check.runs, passes=passes)


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_an_attention_implementation_that_is_wrong_is_not_used(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(*given: Any, **named: Any) -> Any:
        found, weights = upstream.sdpa_attention_forward(*given, **named)
        return found * factor, weights

    AttentionInterface.register("quick", attend)
    AttentionMaskInterface.register("quick", upstream.sdpa_mask)
    monkeypatch.setattr(acceleration, "FLASH", ("quick",))
    base = tiny_llama()
    base.set_attn_implementation("quick")
    model: Any = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    found = kernels.accelerate(model, attach.adapted_linear)
    line = "model.attn_implementation: chosen by transformers, as with quick the model does not compute the same"
    assert (line in found.notes()) == (factor != 1.0)
    assert upstream.attn_implementation(base) == ("quick" if factor == 1.0 else "sdpa")
