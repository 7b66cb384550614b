"""The names that keys need in vLLM and SGLang: the recorded table, and wrapped bases, from training to the server."""

import copy
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import PLAIN, ROOT, Process, Ran, check_refused, tiny_llama, write_rows
from peft import PeftModel
from safetensors.torch import load_file
from test_export import adapter_in, folded, logits
from transformers import AutoConfig, AutoModelForImageTextToText

from loratune.codes import Code
from loratune.errors import AdapterError, ModelError
from loratune.export import vllm
from loratune.export.answers import ScoredAnswer
from loratune.lora import served
from loratune.model import checks

sys.path.insert(0, str(ROOT / "scripts"))
import families

Cli = Callable[..., Ran]

# --- the table

DENSE = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj"]
GATED = [*DENSE, "mlp.gate_proj", "mlp.up_proj"]
NAMES: dict[str, list[str]] = {
    "LlamaForCausalLM": GATED, "Qwen2ForCausalLM": GATED, "Qwen3ForCausalLM": GATED, "Gemma3ForCausalLM": GATED,
    "Gemma4ForCausalLM": GATED, "MistralForCausalLM": GATED, "GraniteForCausalLM": GATED, "Glm4ForCausalLM": DENSE,
    "Phi3ForCausalLM": ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"],
    "Qwen3MoeForCausalLM": [*DENSE[:4], "mlp.gate"], "GptOssForCausalLM": ["self_attn.q_proj", "self_attn.o_proj"],
    "Qwen3_5ForCausalLM": [*GATED, "linear_attn.in_proj_qkv", "linear_attn.in_proj_z", "linear_attn.out_proj"],
    "NemotronHForCausalLM": ["mixer.q_proj", "mixer.o_proj", "mixer.in_proj", "mixer.up_proj", "mixer.down_proj"],
    "DeepseekV3ForCausalLM": ["self_attn.q_a_proj", "self_attn.kv_b_proj", "self_attn.o_proj", "mlp.down_proj"],
    "FalconH1ForCausalLM": ["self_attn.q_proj", "mamba.in_proj", "feed_forward.down_proj"],
    "Lfm2ForCausalLM": ["self_attn.q_proj", "self_attn.out_proj", "short_conv.in_proj", "feed_forward.w2"],
}  # fmt: skip
"""Class → names of its modules in a layer of transformers."""


@pytest.mark.parametrize("name", NAMES)
def test_the_table_has_the_modules_of_vllm(name: str) -> None:
    paths = [f"model.layers.0.{module}" for module in NAMES[name]]
    found = served.names_for("vllm", config(name), name, paths, "adapter")
    assert dict(found.names) == {path: path for path in paths} and found.release
    for module in NAMES[name]:
        with pytest.raises(AdapterError):
            served.names_for("vllm", config(name), name, [f"model.layers.0.other.{module}"], "adapter")


def config(architecture: str | None, model_type: str = "llama") -> Any:
    made = AutoConfig.for_model(model_type)
    made.architectures = [architecture] if architecture else None
    return made


# --- wrapped bases

WRAPPED: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "qwen3_5": ("Qwen3_5ForCausalLM", {}, ("vllm",)),
    "qwen3_5_moe": ("Qwen3_5MoeForCausalLM", {}, ("vllm", "sglang")),
    "gemma3": ("Gemma3ForConditionalGeneration", {}, ("vllm", "sglang")),
    "gemma4": ("Gemma4ForConditionalGeneration", {"per_layer_config": {}}, ("vllm",)),
    "mistral3": ("Mistral3ForConditionalGeneration", {}, ("vllm", "sglang")),
    "qwen3_vl": ("Qwen3VLForConditionalGeneration", {}, ("vllm", "sglang")),
}
"""Model type of a base of text and images → the class in which it is trained, settings of its language model, and the
servers that apply an adapter of all its linear layers."""
LORA: dict[str, Any] = {"qwen3_5_moe": {"target_modules": ["q", "o"], "target_parameters": ["experts"]}}
ROWS = [{"prompt": f"{number} and {number} make", "completion": f" {number + number}"} for number in range(8)]


def wrapper(path: Path, model_type: str, tokenizer: Any) -> Path:
    """A directory with a small model of text and images."""
    torch.manual_seed(0)
    config = families.small_config(model_type, **WRAPPED.get(model_type, ("", {}))[1])
    AutoModelForImageTextToText.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def run_file(folder: Path, base: Path, **lora: Any) -> Path:
    """A config that trains an adapter of a base in two steps."""
    values = PLAIN | {
        "model": {"name_or_path": str(base), "dtype": "float32"},
        "lora": {"r": 4, "target_modules": "all-linear"} | lora,
        "data": {"train": str(write_rows(folder / "rows.jsonl", ROWS))},
        "training": {"learning_rate": 1e-2, "max_steps": 2},
        "output_dir": str(folder / "adapter"),
    }
    run = folder / "run.yaml"
    run.write_text(yaml.safe_dump(values))
    return run


@pytest.mark.parametrize(
    "model_type",
    [pytest.param(one, marks=[] if one == "mistral3" else [pytest.mark.slow]) for one in WRAPPED],
)
def test_an_adapter_of_a_wrapped_base_applies_in_the_wrapper(
    tmp_path: Path, model_type: str, tokenizer: Any, cli: Cli, untraced: None
) -> None:
    """Trained on the language model, exported for servers, and read by the class that they load, in transformers."""
    base, (own, _, servers) = wrapper(tmp_path / "base", model_type, tokenizer), WRAPPED[model_type]
    run, adapter = run_file(tmp_path, base, **LORA.get(model_type, {})), tmp_path / "adapter"
    assert (ran := cli("train", run)).code == 0, ran.err
    is_renamed, card = model_type.startswith("qwen3_5"), (adapter / "README.md").read_text()
    assert ("with other module names" in ran.err) == is_renamed
    assert is_renamed or ("vllm serve" in card) == ("vllm" in servers)
    whole = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32).eval()
    ours = checks.auto_class(AutoConfig.from_pretrained(base)).from_pretrained(base, dtype=torch.float32)
    assert type(ours).__name__ == own
    ids = torch.arange(40, 72)[None]
    with torch.inference_mode():
        alone = whole(input_ids=ids).logits
        expected = PeftModel.from_pretrained(ours, adapter).eval()(input_ids=ids).logits
    assert (expected - alone).abs().max() > 1e-3
    for client in ("vllm", "sglang"):
        out = tmp_path / client
        ran = cli("export", "--adapter", adapter, "--to", client, "--output", out, "--json")
        assert (ran.code == 0) == (client in servers), ran.err
        if ran.code:
            assert ran.code == 5 and f"{served.SERVERS[client]} is not known to apply" in cli("params", run).err
            continue
        server = json.loads(ran.out)["comparison"]["server"]
        assert server["class"] == type(whole).__name__ and server["release"]
        names = load_file(out / "adapter_model.safetensors")
        assert all(".language_model." in name for name in names)
        if client == "vllm" or not LORA.get(model_type):  # PEFT stacks single experts of no wrapper
            loaded = PeftModel.from_pretrained(copy.deepcopy(whole), out).eval()
            with torch.inference_mode():
                assert (loaded(input_ids=ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_every_command_works_on_a_model_of_text_and_images(
    tmp_path: Path, tokenizer: Any, cli: Cli, untraced: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one that transformers has no language model of: Ministral 3. Its vision tower stays as it is."""
    base, adapter, merged = wrapper(tmp_path / "base", "mistral3", tokenizer), tmp_path / "adapter", tmp_path / "merged"
    for command in (
        ("train", run_file(tmp_path, base)), ("evaluate", "--adapter", adapter, "--data", tmp_path / "rows.jsonl"),
        ("generate", "--adapter", adapter, "1 and 1 make", "--max-new-tokens", 8),
        ("export", "--adapter", adapter, "--to", "peft", "--output", tmp_path / "plain"),
    ):  # fmt: skip
        assert (ran := cli(*command)).code == 0, ran.err
    ran = cli("merge", "--adapter", adapter, "--output", merged, "--dtype", "float32")
    assert ran.code == 0 and f"AutoModelForImageTextToText.from_pretrained('{merged}')" in ran.out, ran.err
    ids = torch.arange(40, 72)[None]

    def logits_of(model: Any) -> torch.Tensor:
        with torch.inference_mode():
            found: torch.Tensor = model.eval()(input_ids=ids).logits
        return found

    whole = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    expected = logits_of(PeftModel.from_pretrained(copy.deepcopy(whole), adapter))
    monkeypatch.chdir(tmp_path)
    code = (adapter / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    exec(code, of_card := dict[str, Any]())
    others = {
        "card": of_card["model"].float(), "plain": PeftModel.from_pretrained(whole, tmp_path / "plain"),
        "merged": AutoModelForImageTextToText.from_pretrained(merged, dtype=torch.float32),
    }  # fmt: skip
    for name, model in others.items():
        assert (logits_of(model) - expected).abs().max() <= 1e-5 * expected.abs().max(), name
    files = [load_file(path / "model.safetensors") for path in (base, merged)]
    assert files[0].keys() == files[1].keys()
    changed = {name for name in files[0] if not torch.equal(files[0][name], files[1][name])}
    assert changed and all("language_model." in name and ".layers." in name for name in changed)


REFUSED = {
    "paligemma": "what it predicts depends on later tokens",
    "molmo2": "required as a model input when training", "idefics": "has to be not-None",
}  # fmt: skip
"""Models of text and images that cannot be trained on text alone, and why."""


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_model_that_needs_images_is_refused(tmp_path: Path, model_type: str, tokenizer: Any, cli: Cli) -> None:
    with pytest.raises(ModelError, match=REFUSED[model_type]):
        checks.check_text(AutoModelForImageTextToText.from_config(families.small_config(model_type)), "base")
    if model_type == "paligemma":
        base = wrapper(tmp_path / "base", model_type, tokenizer)
        check_refused(cli("train", run_file(tmp_path, base)), 3, (Code.MODEL_UNSUPPORTED, str(base), ""))


EXPLAINED: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "llama": ("llama", {}, "loaded as LlamaForCausalLM; all names apply in vLLM 0", "all names apply in SGLang 0"),
    "other names": ("qwen3_5", {}, ", after `loratune export --to vllm`", "not applied: in SGLang"),
    "text alone": ("qwen3_5_text", {"target_modules": ["q", "v"]}, "apply in vLLM", "apply in SGLang"),
    "a class for text": ("mistral3", {}, "ForConditionalGeneration; all names apply in vLLM", "in SGLang"),
    "without LoRA": ("gpt2", {}, "not applied: for this base vLLM loads GPT2LMHeadModel, and does not", "not recorded"),
    "DoRA": ("llama", {"use_dora": True}, "not applied: it is not plain LoRA", "not applied: it is not plain LoRA"),
    "experts": ("mixtral", {"target_modules": ["q"], "target_parameters": ["experts"]}, "export --to vllm", "SGLang 0"),
    "auto": ("llama", {"r": "auto"}, "apply in vLLM", "apply in SGLang"),
    "no such layer": ("llama", {"target_modules": ["c_attn"]}, "unknown: lora.target_modules", "unknown: lora.target"),
    "no base": ("", {}, "unknown, as the base is not on this machine", "unknown, as the base is not on this machine"),
}  # fmt: skip
"""Case → model type of the base, settings of LoRA, and a part of what is said of vLLM and of SGLang."""


@pytest.mark.parametrize("case", EXPLAINED)
def test_explain_says_which_servers_apply_the_adapter(tmp_path: Path, case: str, cli: Cli) -> None:
    """From the configuration of the base alone: there are no weights."""
    model_type, lora, *expected = EXPLAINED[case]
    base = tmp_path / "base"
    if model_type:
        config = families.small_config(model_type)
        kind = checks.auto_class(config)._model_mapping[type(config)]
        config.architectures = [kind.__name__]
        if model_type in WRAPPED:
            config.architectures = [AutoModelForImageTextToText._model_mapping[type(config)].__name__]
        config.save_pretrained(base)
    run = run_file(tmp_path, base, **lora)
    ran = cli("explain", "lora.target_modules", run, "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)["keys"]["lora.target_modules"]["servers"]
    assert [*found] == ["vLLM", "SGLang"], found
    assert all(part in text for part, text in zip(expected, found.values(), strict=True)), found
    lines = cli("explain", "name_or_path", run).out
    assert re.search(f"in vLLM +{re.escape(found['vLLM'])}\n", lines) and "in vLLM" not in cli("explain", "r", run).out


OURS = ["model.layers.3.self_attn.q_proj", "model.layers.0.mlp.down_proj"]


@pytest.mark.parametrize(
    ("client", "architecture", "own", "prefix"),
    [
        ("vllm", "Qwen3_5ForConditionalGeneration", "Qwen3_5ForCausalLM", "model.language_model."),
        ("vllm", "Qwen3_5ForCausalLM", "Qwen3_5ForCausalLM", "model."),
        ("sglang", "Qwen3_5ForConditionalGeneration", "Qwen3_5ForCausalLM", "model.language_model."),
        ("vllm", "Starcoder2ForCausalLM", "Starcoder2ForCausalLM", "model."),
        ("vllm", None, "LlamaForCausalLM", "model."), ("vllm", "Phi3SomethingNew", "Phi3SomethingNew", "model."),
        ("vllm", "Qwen3_5ForConditionalGeneration", "Qwen9ForCausalLM", "model.language_model."),
    ],
)  # fmt: skip
def test_names_follow_the_class_that_the_server_loads(
    client: str, architecture: str | None, own: str, prefix: str
) -> None:
    found = served.names_for(client, config(architecture), own, OURS, "adapter")
    assert dict(found.names) == {path: prefix + path.removeprefix("model.") for path in OURS}
    assert bool(found.release) == (architecture != "Phi3SomethingNew")
    assert found.is_renamed == (prefix != "model.")


@pytest.mark.parametrize(
    ("client", "architecture", "own", "path"),
    [
        ("vllm", "Qwen9ForConditionalGeneration", "Qwen9ForCausalLM", OURS[0]),
        ("vllm", "GPT2LMHeadModel", "GPT2LMHeadModel", "transformer.h.0.attn.c_attn"),
        ("vllm", "Gemma3nForConditionalGeneration", "Gemma3nForConditionalGeneration", OURS[0]),
        ("vllm", "LlamaForCausalLM", "LlamaForCausalLM", "model.layers.0.self_attn.query"),
        ("vllm", "LlamaForCausalLM", "LlamaForCausalLM", "layers.0.self_attn.q_proj"),
        ("sglang", "Qwen3_5ForConditionalGeneration", "Qwen3_5ForCausalLM", "model.layers.0.linear_attn.in_proj_qkv"),
        ("vllm", "Qwen3MoeForCausalLM", "Qwen3MoeForCausalLM", "model.layers.0.mlp.experts"),
        ("vllm", "MixtralForCausalLM", "MixtralForCausalLM", "model.layers.0.block_sparse_moe.experts.base_layer"),
    ],
)  # fmt: skip
def test_names_that_address_nothing_are_refused(client: str, architecture: str, own: str, path: str) -> None:
    with pytest.raises(AdapterError) as error:
        served.names_for(client, config(architecture), own, [path], "adapter")
    (problem,) = error.value.problems
    assert problem.code == Code.EXPORT_UNSUPPORTED and problem.where == "adapter" and "merge" in problem.fix


def test_keys_of_vllm_are_renamed_in_its_order() -> None:
    """As `WeightsMapper` does it: several prefixes may apply one after another, a part only once."""
    renames = {
        "regex": {r"(?<!\.moe)\.experts": ".moe.experts"}, "substr": {".self_attn.": ".attn."},
        "prefix": {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
        "suffix": {".weight": ".w"},
    }  # fmt: skip
    expected = {
        "model.language_model.0.self_attn.self_attn.q.weight": "language_model.model.0.attn.self_attn.q.w",
        "lm_head.lora_A": "language_model.lm_head.lora_A", "model.experts": "model.moe.experts", "x.model.": "x.model.",
    }  # fmt: skip
    assert {key: served._renamed(key, renames) for key in expected} == expected


@pytest.mark.parametrize(
    ("targets", "zeros"),
    [
        (["q_proj"], {"v_proj"}), (["v_proj"], {"q_proj"}), (["up_proj"], {"gate_proj"}),
        (["k_proj"], {"q_proj", "v_proj"}),
        (["q_proj", "v_proj", "o_proj"], set()), (["gate_proj", "down_proj"], set()),
    ],
)  # fmt: skip
def test_modules_that_sglang_expects_together_are_completed(
    tmp_path: Path, targets: list[str], zeros: set[str]
) -> None:
    """With zeros, which change nothing: the logits in PEFT are those of the adapter."""
    adapter = adapter_in(tmp_path / "a", tiny_llama(), target_modules=targets)
    plain = folded(adapter, tmp_path / "plain", tiny_llama())
    names = served.names_for("sglang", config(None), "LlamaForCausalLM", plain.modules, "adapter")
    (tmp_path / "out").mkdir()
    served.renamed(plain, names, tiny_llama()).write(tmp_path / "out")
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name, tensor in written.items() if not tensor.any()} == zeros
    assert torch.equal(*(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / name)) for name in ("plain", "out")))


# --- vLLM, which a script stands for

FAKE = """#!{python}
import json, sys
from math import nan as NaN
result, rows = open(sys.argv[-1], "w"), json.load(sys.stdin)["rows"]
said = {{"logprobs": {logprobs}, "ignored": {ignored}, "version": "9.9"}}
{do}
json.dump(said, result)
"""
ANSWERS = [ScoredAnswer({}, [1, 2], [3, 4], [-1.0, -2.0], [-3.0, -5.0]), ScoredAnswer({}, [1], [5], [-0.5], [-4.0])]


def fake_vllm(path: Path, logprobs: list[float] | None = None, ignored: Any = (), do: str = "") -> str:
    logprobs = [-1.0, -2.0, -0.5] if logprobs is None else logprobs
    path.write_text(FAKE.format(python=sys.executable, do=do, logprobs=json.dumps(logprobs), ignored=[*ignored]))
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("answer", "code", "what"),
    [
        ({"logprobs": [-1.001, -2.0, -0.5]}, None, ""),
        ({"logprobs": [-3.0, -5.0, -4.0]}, Code.EXPORT_DIFFERS, "0.0% of its effect"),
        ({"logprobs": [-1.1, -2.1, -0.6]}, Code.EXPORT_DIFFERS, "0.100 on average"),
        ({"logprobs": [float("nan")] * 3}, Code.EXPORT_DIFFERS, "nan"),
        ({"ignored": ["model.layers.0.q"]}, Code.EXPORT_DIFFERS, "ignores 1 modules of the adapter: model.layers.0.q"),
        ({"do": "sys.exit('RuntimeError: no Triton')"}, Code.EXPORT_FAILED, "vLLM failed: RuntimeError: no Triton"),
        ({"do": "sys.exit(0)"}, Code.EXPORT_FAILED, "it gave no result of vLLM"),
        ({"do": "said = [1]"}, Code.EXPORT_FAILED, "it gave no result of vLLM"),
        ({"do": "said['ignored'] = 5"}, Code.EXPORT_FAILED, "it gave no result of vLLM"),
        ({"do": "said['logprobs'] = -1.0"}, Code.EXPORT_FAILED, "it gave no result of vLLM"),
        ({"do": "del said['version']"}, Code.EXPORT_FAILED, "it gave no result of vLLM"),
        ({"do": "print('[' * 100_000, file=result); sys.exit(0)"}, Code.EXPORT_FAILED, "it gave no result of vLLM"),
        ({"logprobs": [-1.0]}, Code.EXPORT_FAILED, "gave 1 log-probabilities for 3 tokens"),
        ({"do": "import os; os.remove(result.name); sys.exit(0)"}, Code.EXPORT_FAILED, "exit code 0, no result"),
    ],
)  # fmt: skip
def test_answers_of_vllm_are_compared(tmp_path: Path, answer: dict[str, Any], code: Code | None, what: str) -> None:
    python = fake_vllm(tmp_path / "python", **answer)
    if code is None:
        result = vllm.compare(python, "base", tmp_path, 8, ANSWERS, "adapter")
        assert (result.answers, result.tokens, result.version) == (2, 3, "9.9") and 0.9 < result.share < 1.1
        return
    with pytest.raises(AdapterError) as error:
        vllm.compare(python, "base", tmp_path, 8, ANSWERS, "adapter")
    (problem,) = error.value.problems
    assert problem.code == code and what in problem.what and problem.where in (python, "adapter")


def test_the_python_of_vllm_is_a_file_not_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_vllm(tmp_path / "python3")
    monkeypatch.chdir(tmp_path)
    assert vllm.compare("python3", "base", tmp_path, 8, ANSWERS, "adapter").version == "9.9"


def wait_until(seen: Callable[[], bool]) -> None:
    end = time.monotonic() + 50
    while not seen():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_the_process_of_vllm_ends_with_the_one_that_started_it(tmp_path: Path) -> None:
    shutil.copy(vllm.SCRIPT, tmp_path / "run.py")
    (tmp_path / "vllm.py").write_text("import pathlib, time\npathlib.Path('begun').touch()\ntime.sleep(60)\n")
    (tmp_path / "request").write_text('{"rows": [{"prompt": [1], "answer": [1]}]}')
    start = "subprocess.Popen([sys.executable, 'run.py', 'result'], stdin=open('request'))"
    outer = f"import subprocess, sys; child = {start}; print(child.pid, flush=True); child.wait()"
    with Process([sys.executable, "-c", outer], cwd=tmp_path, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        wait_until(lambda: (tmp_path / "begun").exists())
        parent.kill()
    status = Path(f"/proc/{pid}/status")
    wait_until(lambda: not status.exists() or "State:\tZ" in status.read_text())
