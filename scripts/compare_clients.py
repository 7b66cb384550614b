"""What comes of an adapter in each program that can use it: a table of client x base family x variant of LoRA.

    python scripts/compare_clients.py [FOLDER] [--families llama,phi3] [--vllm PYTHON]

Bases are random, of each family's own class, with the tokenizer of SmolLM2; adapters are random too, and large enough
to change what the base says. `merge` and `export` write, read back and compare, and their figures are the table's. For
models of text and images, the export for a server is also read by transformers' class of the whole model.
llama.cpp needs `pip install 'loratune[llama-cpp]'`, and vLLM an environment of its own, whose Python `--vllm` names and
`scripts/check_vllm.py` makes. What a client refuses is shown by the code of the error.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from families import small_config
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, PreTrainedModel

from loratune.cli import app
from loratune.console import print_lines
from loratune.errors import LoratuneError
from loratune.export import gguf
from loratune.model import checks
from loratune.text import table as table_lines

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = ROOT / "models" / "SmolLM2-135M-Instruct"
GGUF = ROOT / "models" / "SmolLM2-135M-Instruct-GGUF"
SIZE: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 64, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SIZE,
    "qwen2": SIZE,
    "qwen3": SIZE,
    "mistral": SIZE,
    "phi3": SIZE | {"pad_token_id": 0},
    "gemma": SIZE,
    "gpt2": {"n_embd": 128, "n_layer": 2, "n_head": 2, "n_positions": 512, "bos_token_id": 1, "eos_token_id": 2},
    "gpt_neox": {key: SIZE[key] for key in SIZE if key not in ("num_key_value_heads", "head_dim")},
}
FEW = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
GROUPS = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": SIZE | {"num_local_experts": 4},
    "qwen3_moe": SIZE | FEW | {"num_experts": 4},
    "glm4_moe": SIZE | FEW | GROUPS | {"num_mtp_layers": 0},
    "deepseek_v3": {name: value for name, value in (SIZE | FEW | GROUPS).items() if name != "head_dim"} | {
        "num_key_value_heads": 2, "q_lora_rank": 32, "kv_lora_rank": 64, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32,
        "v_head_dim": 64,
    },
    "gpt_oss": SIZE | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_5_moe_text": SIZE | FEW | {
        "num_experts": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32,
        "linear_value_head_dim": 32, "shared_expert_intermediate_size": 64,
        "layer_types": ["linear_attention", "full_attention"],
    },
}  # fmt: skip
FAMILIES |= MIXTURES
WRAPPED: dict[str, dict[str, Any]] = {
    "qwen3_5": {}, "qwen3_5_moe": {}, "mistral3": {}, "qwen3_vl": {}, "gemma3": {"query_pre_attn_scalar": 32},
    "gemma4": {"per_layer_config": {}, "vocab_size_per_layer_input": 49152},
}  # fmt: skip
"""Models of text and images, with changes of the sizes of their language models in `families.small_config`."""
TEXT = r"(?!.*(vision|visual|audio|image)).*\.({})"
"""Targets of a model of text and images: those in its language model."""
TARGETS = {
    "phi3": ["qkv_proj", "o_proj"], "gpt2": ["c_attn", "c_proj"], "gpt_neox": ["query_key_value", "dense"],
    "deepseek_v3": ["o_proj"],
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "patterns": {"rank_pattern": {r"layers\.0\..*": 16}, "alpha_pattern": {r"layers\.1\..*": 3}},
    "DoRA": {"use_dora": True},
    "4bit base": {},
    "experts": {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
}


def write(folder: Path, family: str, variant: str) -> Path:
    """A random base and a random adapter of it. Returns the adapter's directory."""
    torch.manual_seed(0)
    base = folder / "base"
    if not base.exists():
        tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
        if family in WRAPPED:
            config = small_config(family, 128, vocab_size=len(tokenizer), **WRAPPED[family])
            AutoModelForImageTextToText.from_config(config).save_pretrained(base)
        else:
            config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **FAMILIES[family])
            AutoModelForCausalLM.from_config(config).save_pretrained(base)
        tokenizer.save_pretrained(base)
    targets = TARGETS.get(family, ["q_proj", "v_proj", "o_proj"])
    chosen = TEXT.format("|".join(targets)) if family in WRAPPED else targets
    settings = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=chosen, **VARIANTS[variant])
    model = get_peft_model(ours(base), settings)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapter = folder / variant.replace(" ", "-")
    model.save_pretrained(adapter, save_embedding_layers=False)
    AutoTokenizer.from_pretrained(base).save_pretrained(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    if variant == "4bit base":
        (adapter / "run.yaml").write_text(
            f"model: {{name_or_path: {base}, quantization: 4bit}}\ndata: {{train: rows.jsonl}}\noutput_dir: {adapter}\n"
        )
    return adapter


def ours(base: Path) -> PreTrainedModel:
    """The base as loratune loads it."""
    loader = checks.auto_class(AutoConfig.from_pretrained(base))
    model: PreTrainedModel = loader.from_pretrained(base, dtype=torch.float32)
    return model


def run(*arguments: object) -> tuple[int, Any]:
    """A command with --json: its exit code, and what it printed, or the code of its error."""
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = app([*map(str, arguments), "--json"], prog_name="loratune", standalone_mode=False) or 0
    if code == 0 and out.getvalue().strip():
        return 0, json.loads(out.getvalue())
    errors = [line for line in err.getvalue().splitlines() if line.startswith("error:")]
    print(*errors, sep="\n", file=sys.stderr)
    return code, errors[0].rpartition("[")[2].partition("]")[0] if errors else f"exit {code}"


def of_transformers(adapter: Path, out: Path) -> str:
    """The merged model in stock transformers."""
    code, said = run("merge", "--adapter", adapter, "--output", out, "--dtype", "float32")
    if code:
        return f"refused: {said}"
    to_adapter, to_base = said["comparison"]["adapter"], said["comparison"]["base"]
    return f"{to_adapter['largest']:.0e}, base {to_base['largest']:.1f}"


def of_peft(adapter: Path, out: Path) -> str:
    """The plain adapter in stock PEFT; its ΔW for experts that PEFT has in another form."""
    code, said = run("export", "--adapter", adapter, "--to", "vllm", "--output", out)
    found = {} if code else said["comparison"]
    return (
        f"refused: {said}"
        if code
        else f"ΔW {found['tensors']:.0e}"
        if found["logits"] is None
        else f"{found['logits']:.0e}"
    )


@torch.inference_mode()
def of_wrapper(adapter: Path, out: Path) -> str:
    """The adapter exported for a server, in transformers' class of text and images, which the server loads too."""
    for client in ("vllm", "sglang", "peft"):  # the first that serves it
        code, said = run("export", "--adapter", adapter, "--to", client, "--output", out, "--no-verify")
        if not code:
            break
    else:
        return f"refused: {said}"
    base, ids = adapter.with_name("base"), torch.arange(100, 164)[None]
    whole = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32).eval()
    alone = whole(input_ids=ids).logits
    expected = PeftModel.from_pretrained(ours(base), adapter).eval()(input_ids=ids).logits
    found = PeftModel.from_pretrained(whole, out).eval()(input_ids=ids).logits
    difference, effect = ((expected - other).abs().max() / expected.abs().max() for other in (found, alone))
    return f"{difference:.0e}, base {effect:.1f} ({client})"


def base_gguf(base: Path) -> tuple[object, ...]:
    """The option that names the base as a GGUF file, with the tokenizer of SmolLM2's own; empty if there is none."""
    file, tokenizer = base.with_name("base.gguf"), next(GGUF.glob("*.gguf"), None)
    try:
        if tokenizer is not None and not file.exists():
            gguf.convert_model(gguf.find_converters(None), base, file, "f32", tokenizer)
    except LoratuneError as error:
        print(*error.problems, sep="\n", file=sys.stderr)
    return ("--base-gguf", file) if file.exists() else ()


def of_llama_cpp(adapter: Path, out: Path, *options: str) -> str:
    """The adapter, or the merged model, in llama.cpp."""
    base = base_gguf(adapter.parent / "base")
    code, said = run("export", "--adapter", adapter, "--to", "gguf", "--output", out, *options, *base)
    if code:
        return f"refused: {said}"
    found = said["comparison"].get("llama.cpp")
    return f"{found['mean']:.3f}, {found['share']:.1%}" if found else "not run"


def of_vllm(adapter: Path, out: Path, python: Path) -> str:
    """The plain adapter in vLLM, which must apply all exported names."""
    command = ("export", "--adapter", adapter, "--to", "vllm", "--vllm-python", python, "--output", out)
    code, said = run(*command)
    found = said["comparison"]["server"]["run"] if not code else None
    return f"refused: {said}" if code else f"{found['mean']:.0e}, {found['share']:.1%}" if found else "not run"


def rows(folder: Path, families: list[str], variants: list[str], python: Path | None) -> Iterator[list[str]]:
    """The table's rows: one for each family and variant."""
    for family in families:
        for variant in (one for one in variants if one != "experts" or family in (*MIXTURES, "qwen3_5_moe")):
            place = folder / family
            adapter = write(place, family, variant)
            names = ("merged", "plain", "wrapped", "gguf", "whole", "served")
            out = {name: place / f"{adapter.name}.{name}" for name in names}
            cells = [of_transformers(adapter, out["merged"]), of_peft(adapter, out["plain"])]
            cells.append(of_wrapper(adapter, out["wrapped"]) if family in WRAPPED else "-")
            cells += [of_llama_cpp(adapter, out["gguf"]), of_llama_cpp(adapter, out["whole"], "--merged", "f32")]
            cells.append(of_vllm(adapter, out["served"], python) if python else "-")
            print(family, variant, *cells, sep=" | ", flush=True)
            yield [family, variant, *cells]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--families", default=",".join([*FAMILIES, *WRAPPED]))
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--vllm", type=Path, metavar="PYTHON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        table = list(rows(folder, options.families.split(","), options.variants.split(","), options.vllm))
    head = ["family", "variant", "transformers (merged)", "PEFT (plain)", "transformers' wrapper"]
    head += ["llama.cpp", "llama.cpp (merged)", "vLLM"]
    print_lines(table_lines(head, table))


if __name__ == "__main__":
    main()
