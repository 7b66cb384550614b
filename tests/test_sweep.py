"""The sweep: every causal language model that transformers knows, built on the meta device.

`golden_targets.txt` is the reviewed table: model type → where attention is → what serves q, k, v, o there, and what
`all-linear` leaves out. Types that a newer release of transformers adds are listed in a warning; after a review of
their modeling files, `python tests/test_sweep.py --write` adds them to the table.
"""

import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from conftest import resolve
from families import DECODERS, LAYERS, build, small
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from loratune.errors import ModelError
from loratune.lora import parameters
from loratune.lora.targets import ROLES, Targets
from loratune.lora.targets.survey import EXPERTS

GOLDEN = Path(__file__).parent / "golden_targets.txt"
R = 2
LENGTH = 8
LONGER = {"deepseek_v4": 256}  # its compressors process 128 tokens at once

NEVER_RUN = (
    "blt", "dbrx", "gemma4_assistant", "gemma4_unified_assistant", "longcat_flash", "qwen4_exp", "qwen4_exp_text",
    "reformer", "xlm", "xlnet",
)  # fmt: skip
"""Models that read values, which do not exist on the meta device."""
BROKEN_SMALL = ("dots3_note", "dots3_note_text")
"""Models that do not run with the small sizes of `families.small`, with or without an adapter."""
ROUTED_ELSEWHERE = ("longcat_flash",)
"""Models with experts that do nothing, which may receive all tokens of a short row."""
LOOPING = (
    "bailing_hybrid", "gemma3n", "hrm_text", "inkling2_loop_text", "jetmoe", "kimi_linear", "qwen3_5_moe",
    "qwen3_5_moe_text",
)  # fmt: skip
"""Models whose layers loop in Python for a second or more. Only the slow test runs their backward pass; relatives with
layers of the same kinds, such as gemma3n_text, inkling2_text and qwen3_next, are always run."""

# --- the table


def lines(targets: Targets) -> Iterator[str]:
    """`model.layers.* x4: self_attn.q_proj=q self_attn.kv_proj=kv ...`, one line for each stack of layers."""
    stacks: dict[str, dict[str, list[str]]] = {}
    for place, roles in targets.module_patterns().items():
        stack, _, leaf = place.rpartition(".*.")
        stacks.setdefault(f"{stack}.*", {})[leaf] = roles
    for stack, leaves in stacks.items():
        counts = {leaf: sum(place_of(path) == f"{stack}.{leaf}" for path in targets.paths) for leaf in leaves}
        most = max(counts.values())
        shown = [
            f"{leaf}={''.join(roles)}" + (f" (x{counts[leaf]})" if counts[leaf] < most else "")
            for leaf, roles in leaves.items()
        ]
        yield f"{stack} x{most}: {' '.join(shown)}"


def place_of(path: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", path)


@dataclass
class Seen:
    """What was found for one model type.

    built: whether its configuration gives a model. table: its lines of the golden table. roles: the roles it has.
    wrong: contradictions to stock PEFT or to the rules of this test. ran: whether a forward and backward pass on the
    meta device were possible. idle: adapters without a gradient.
    """

    built: bool = False
    table: list[str] = field(default_factory=list)
    roles: str = ""
    reason: str = ""
    wrong: list[str] = field(default_factory=list)
    ran: bool = False
    idle: list[str] = field(default_factory=list)


def roles_of(model: PreTrainedModel, seen: Seen) -> Targets | None:
    """All four roles, or those that exist. The reason for missing ones goes into the table."""
    for asked in (list(ROLES), []):
        try:
            targets = resolve(model, asked or list(seen.roles))
        except ModelError as error:
            seen.reason = str(error).removeprefix("lora.target_modules: ").partition("; its linear modules")[0]
            found = re.search(r"ask for \[(.*?)\]", str(error))
            seen.roles = found[1].replace(", ", "") if found else ""
            if not found:
                return None
        else:
            seen.roles = "".join(asked) or seen.roles
            return targets
    return None


def visit(model_type: str, *, backward: bool = True) -> Seen:
    seen = Seen()
    try:
        model = build(model_type)
    except Exception as error:
        seen.table = [f"not built: {type(error).__name__}: {str(error).strip().splitlines()[0]}"]
        return seen
    seen.built = True
    targets = roles_of(model, seen)
    every = resolve(model, "all-linear")
    if targets:
        seen.table += lines(targets)
        seen.wrong += outside(model, targets)
        if stray := set(targets.modules) - set(every.modules):
            seen.wrong.append(f"not in all-linear: {stray}")
    if seen.reason:
        seen.table.append(seen.reason)
    seen.table += [*(targets.notes if targets else ()), f"all-linear: {len(every.modules)} modules", *every.notes]
    if targets:
        seen.wrong += differences(build(model_type), targets)[1]
    adapted, wrong = differences(model, every)
    seen.wrong += wrong + lost(adapted)
    visit_experts(model_type, seen)
    if backward:
        seen.ran, without = idle(adapted, 4 if model_type in DECODERS else 1, LONGER.get(model_type, LENGTH))
        seen.idle += without
    return seen


def visit_experts(model_type: str, seen: Seen) -> None:
    """The role of fused experts, like the others. Gradients need a model with weights, which PEFT requires."""
    try:
        targets = resolve(build(model_type), [], target_parameters=[EXPERTS])
    except ModelError:
        return
    seen.table += lines(targets)
    adapted, wrong = stacked_differences(build(model_type), targets)
    seen.wrong += wrong + lost(adapted)
    if model_type in BROKEN_SMALL:
        return
    model = small(model_type)
    adapted = get_peft_model(model, LoraConfig(r=R, **resolve(model, [], target_parameters=[EXPERTS]).peft())).train()
    adapted(input_ids=torch.arange(64)[None], use_cache=False).logits.float().square().mean().backward()
    weights = adapted.named_parameters()
    without = [name for name, weight in weights if "lora_B" in name and (weight.grad is None or not weight.grad.any())]
    seen.idle += [] if model_type in ROUTED_ELSEWHERE else without
    saved = {name: torch.randn_like(value) for name, value in get_peft_model_state_dict(adapted).items()}
    set_peft_model_state_dict(adapted, dict(saved))
    loaded = get_peft_model_state_dict(adapted)
    seen.wrong += [
        f"loaded as another: {name}" for name, value in saved.items() if not torch.equal(loaded[name], value)
    ]


# --- independent rules

# Words that never occur in the path of a self-attention projection; some only as a whole path part.
FOREIGN = re.compile(
    r"mlp|ffn|feed_forward|mamba|vision|image|visual|audio|speech|cross|encoder_attn|indexer|router|expert|moe|linear_attn"
    r"|conv|head\b|embed|patcher|pooler|intermediate|(?<![^.])(gate|gate_proj|fc\d)(?![^.])",
    re.IGNORECASE,
)
# Classes with softmax attention. Projections of Zaya and Inkling, and BERT's output, belong to them.
ATTENDS = re.compile(r"Attention|MLA$")
RECURS = re.compile(r"Delta|Lightning|Mamba|Rwkv|LSTM|RecurrentBlock|ShortConv$")


def outside(model: nn.Module, targets: Targets) -> list[str]:
    """Targets outside the self-attention of the decoder, judging by path and classes."""
    found = []
    for path in targets.modules:
        parts = path.split(".")
        classes = [type(model.get_submodule(".".join(parts[:end]))).__name__ for end in range(1, len(parts))]
        inner = [name for name in classes if ATTENDS.search(name) and not re.search("Layer$|Model$", name)]
        if FOREIGN.search(path) or not inner or RECURS.search(inner[-1]) or "Cross" in inner[-1]:
            found.append(f"outside self-attention: {path} {classes}")
    return found


def differences(model: PreTrainedModel, targets: Targets) -> tuple[PeftModel, list[str]]:
    """Compare stock PEFT, given the names, with the targets: the modules it adapts and the number of trained
    parameters."""
    shapes = [model.get_submodule(path).weight.shape for path in targets.modules]
    adapted = get_peft_model(model, LoraConfig(r=R, init_lora_weights=False, **targets.peft()))
    touched = [path for path, module in adapted.base_model.model.named_modules() if isinstance(module, LoraLayer)]
    wrong = [f"PEFT differs: {sorted(set(touched) ^ set(targets.modules))}"] if touched != list(targets.modules) else []
    trainable, formula = adapted.get_nb_trainable_parameters()[0], sum(R * sum(shape) for shape in shapes)
    return adapted, wrong + ([f"PEFT trains {trainable}, not {formula}"] if trainable != formula else [])


def stacked_differences(model: PreTrainedModel, targets: Targets) -> tuple[PeftModel, list[str]]:
    """Like `differences`, for parameters that contain experts: one A and one B per expert."""
    shapes = [model.get_parameter(name).shape for name in targets.parameters]
    adapted = get_peft_model(model, LoraConfig(r=R, init_lora_weights=False, **targets.peft()))
    layers = [(name, layer) for name, layer in parameters.layers_of(adapted).items() if isinstance(layer, ParamWrapper)]
    wrong = [] if {name for name, _ in layers} == {*targets.parameters} else [f"PEFT differs: {layers}"]
    trainable = adapted.get_nb_trainable_parameters()[0]
    formula = sum(R * experts * (one + other) for experts, one, other in shapes)
    return adapted, wrong + ([f"PEFT trains {trainable}, not {formula}"] if trainable != formula else [])


def lost(adapted: PeftModel) -> list[str]:
    """Weights that PEFT saves under a name that it does not recognize when loading."""
    state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    unknown = set_peft_model_state_dict(adapted, state).unexpected_keys
    return [f"lost on loading: {unknown}"] if unknown else []


def idle(adapted: PeftModel, codebooks: int, length: int) -> tuple[bool, list[str]]:
    """Whether the model runs on the meta device, and the adapters that get no gradient from a loss over its logits."""
    model = adapted.base_model.model
    model.set_attn_implementation("eager")
    adapted.to(torch.bfloat16).train()
    ids = torch.zeros(codebooks, length, dtype=torch.long, device="meta")
    mask = torch.ones(1, length, dtype=torch.long, device="meta")
    # Some models read values, which meta tensors lack; torch.compile's fake tensors allow some of them to run.
    for mode, given in (nullcontext(), {"attention_mask": mask}), (fake(), {}):
        try:
            with torch.device("meta"), mode:
                adapted(input_ids=ids, use_cache=False, **given).logits.sum().backward()
        except (RuntimeError, ValueError, NotImplementedError, AssertionError):
            adapted.zero_grad()
        else:
            weights = adapted.named_parameters()
            return True, [name for name, weight in weights if "lora_B" in name and weight.grad is None]
    return False, []


def fake() -> FakeTensorMode:
    return FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())


# --- tests


REVIEWED = [line for line in GOLDEN.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
TYPES = tuple(dict.fromkeys(line.partition(":")[0] for line in REVIEWED))
SAMPLE = (
    "axk2", "bart", "bert", "bloom", "falcon_h1", "gemma3", "gemma4_assistant", "gpt2", "jetmoe", "llama", "mamba",
    "musicgen", "qwen3_next", "xlnet",
)  # fmt: skip
"""One type per structure, in the order of the table: attention that is plain, fused, latent, with an indexer, next to
cross-attention, in some layers or none; experts, towers, keys and values of another model. `make test-all` covers the
others."""
SHARDS = 8
PARTS = [SAMPLE, *(pytest.param(TYPES[shard::SHARDS], marks=pytest.mark.slow) for shard in range(SHARDS))]


@pytest.fixture(scope="module", params=PARTS, ids=["sample", *(f"{shard + 1} of {SHARDS}" for shard in range(SHARDS))])
def sweep(request: pytest.FixtureRequest) -> dict[str, Seen]:
    """A share of the reviewed types, so that test processes can divide them. See `LOOPING` for an exception."""
    return {model_type: visit(model_type, backward=model_type not in LOOPING) for model_type in request.param}


@pytest.fixture(scope="module", params=LOOPING)
def looping(request: pytest.FixtureRequest) -> dict[str, Seen]:
    return {request.param: visit(request.param)}


def written(sweep: dict[str, Seen]) -> list[str]:
    return [f"{model_type}: {line}" for model_type, seen in sweep.items() for line in seen.table]


def test_targets_match_the_reviewed_table(sweep: dict[str, Seen]) -> None:
    assert written(sweep) == [line for line in REVIEWED if line.partition(":")[0] in sweep]


def test_reviewed_types_still_exist_in_transformers() -> None:
    """New types of a release are listed in a warning."""
    if newcomers := sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - TYPES):
        warnings.warn(f"not reviewed yet: {', '.join(newcomers)}", stacklevel=1)
    assert len(TYPES) >= 196
    assert [model_type for model_type in TYPES if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES] == []


def test_every_model_type_can_be_built(sweep: dict[str, Seen]) -> None:
    assert [model_type for model_type, seen in sweep.items() if not seen.built] == []


def test_all_roles_are_found_wherever_there_is_attention(sweep: dict[str, Seen]) -> None:
    expected = {
        # They use the keys and values of the model that they assist.
        "gemma4_assistant": "qo",
        "gemma4_unified_assistant": "qo",
        # Its query and output projections are experts in stacked tensors.
        "jetmoe": "kv",
        # Its attention multiplies by bare parameters.
        "xlnet": "",
        # These have no attention.
        "falcon_mamba": "",
        "mamba": "",
        "mamba2": "",
        "rwkv": "",
        "xlstm": "",
    }
    roles = {model_type: seen.roles for model_type, seen in sweep.items() if seen.roles != "qkvo"}
    assert roles == {model_type: known for model_type, known in expected.items() if model_type in sweep}
    assert set(expected) <= set(TYPES)


def test_targets_agree_with_stock_peft_and_are_in_self_attention(sweep: dict[str, Seen]) -> None:
    assert {model_type: seen.wrong for model_type, seen in sweep.items() if seen.wrong} == {}


def test_every_all_linear_adapter_gets_a_gradient(sweep: dict[str, Seen]) -> None:
    assert {model_type: seen.idle for model_type, seen in sweep.items() if seen.idle} == {}
    assert {model_type for model_type, seen in sweep.items() if not seen.ran} == sweep.keys() & {*LOOPING, *NEVER_RUN}
    assert set(NEVER_RUN) <= set(TYPES)


@pytest.mark.slow
def test_every_all_linear_adapter_of_looping_layers_gets_a_gradient(looping: dict[str, Seen]) -> None:
    assert [(seen.ran, seen.idle) for seen in looping.values()] == [(True, [])]


# --- controls: the checks above detect violations


@pytest.mark.parametrize(
    ("model_type", "asked"),
    [
        ("gpt2", ["c_proj"]),
        ("kimi_linear", ["self_attn.q_proj"]),
        ("bart", ["q_proj"]),
        ("gemma3", ["q_proj"]),
        ("minimax", ["qkv_proj"]),
        ("qwen3_next", ["linear_attn.out_proj"]),
        ("rwkv", ["attention.key"]),
        ("mixtral", ["lm_head"]),
    ],
)
def test_module_outside_self_attention_is_detected(model_type: str, asked: list[str]) -> None:
    model = build(model_type)
    assert outside(model, resolve(model, asked))


def test_additional_module_is_detected() -> None:
    model = build("gpt2")
    targets = replace(resolve(model, list(ROLES)), names=("c_attn", "c_proj"))
    touched, trained = differences(model, targets)[1]
    assert "mlp.c_proj" in touched and "PEFT trains" in trained


def test_adapter_lost_on_loading_is_detected() -> None:
    [problem] = lost(get_peft_model(build("laguna"), LoraConfig(r=R, target_modules=["shared_experts.down_proj"])))
    assert problem.startswith("lost on loading: ['base_model.model.model.layers.1.mlp.shared_experts..down_proj.lora_A")


def test_adapter_without_a_gradient_is_detected() -> None:
    adapted = get_peft_model(build("mamba"), LoraConfig(r=R, target_modules=["dt_proj", "in_proj"]))
    ran, without = idle(adapted, 1, LENGTH)
    assert ran and len(without) == LAYERS and all("dt_proj" in name for name in without)


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    table = written({model_type: visit(model_type) for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES})
    head = f"# Reviewed with transformers {version('transformers')} and peft {version('peft')}; see test_sweep.py"
    GOLDEN.write_text("\n".join([head, *table]) + "\n", encoding="utf-8")
