"""How an adapter is used in other programs: what exports and model cards tell to type."""

import json
import re
from collections.abc import Iterable, Iterator

from loratune import config, escaping
from loratune.config import ModelSection, RunConfig

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What --max-lora-rank of vLLM can be (vllm/config/lora.py)."""

_QUANTIZATION_CODE = {
    "8bit": "load_in_8bit=True",
    "4bit": 'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True',
}


def name_of(directory: str) -> str:
    """What clients are to call an adapter: the name of its directory, of the characters that all of them take."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", directory).strip("-.") or "adapter"


def vllm(base: str, name: str, directory: str, rank: int, template: str | None = None) -> str:
    """The command that serves an adapter with vLLM.

    Args:
        base: The base, a directory or a hub id.
        name: What requests call the adapter.
        directory: Where it is.
        rank: Its rank.
        template: A chat template, where it is not that of the base.
    """
    most = next((most for most in VLLM_RANKS if rank <= most), rank)
    rendering = f" --chat-template {escaping.shell(template)}" if template else ""
    module = escaping.shell(f"{name}={directory}")
    return f"vllm serve {escaping.shell(base)} --enable-lora --max-lora-rank {most}{rendering} --lora-modules {module}"


def llama_server(base: str, adapter: str, template: str | None = None) -> str:
    """The command that serves a GGUF adapter with llama.cpp.

    Args:
        base: The GGUF file of the base.
        adapter: The GGUF file of the adapter.
        template: A chat template, where it is not that of the base.
    """
    rendering = f" --jinja --chat-template-file {escaping.shell(template)}" if template else ""
    return f"llama-server -m {escaping.shell(base)} --lora {escaping.shell(adapter)}{rendering}"


def sections(run: RunConfig, name: str, prompt: str, *, are_layers_known: bool) -> str:
    """The part of a model card on how an adapter is used, with the clients that can use it.

    Args:
        run: The config of its run.
        name: The name of the adapter directory.
        prompt: A prompt to try it with, quoted for a shell.
        are_layers_known: Whether llama.cpp and vLLM have adapters for the kinds of layers that are adapted.
    """
    command = escaping.code_span(f"loratune generate --adapter {escaping.shell(name)} {prompt}")
    blocks = [f"{escaping.code_block(_peft(run.model, name), 'python')}\n\nor {command}"]
    if are_layers_known and config.is_plain(run.lora):
        if run.model.gguf_file is None:
            blocks.append(f"In vLLM:\n\n{_shell_block(_vllm(run, name))}")
        base = "" if run.model.gguf_file else ", where `BASE.gguf` is the base as a GGUF file"
        blocks.append(f"In llama.cpp{base}:\n\n{_shell_block(_llama_cpp(run, name))}")
    return "\n\n".join(blocks)


def _shell_block(commands: Iterable[str]) -> str:
    return escaping.code_block("\n".join(commands), "sh")


def _vllm(run: RunConfig, name: str) -> Iterator[str]:
    directory = name
    if not config.has_one_scale(run.lora):
        directory = f"{name}-vllm"
        yield f"loratune export --adapter {escaping.shell(name)} --to vllm --output {escaping.shell(directory)}"
    template = f"{directory}/chat_template.jinja" if run.data.chat_template else None
    yield vllm(run.model.name_or_path, name_of(name), directory, config.highest_rank(run.lora), template)


def _llama_cpp(run: RunConfig, name: str) -> Iterator[str]:
    directory = f"{name}-gguf"
    yield f"loratune export --adapter {escaping.shell(name)} --to gguf --output {escaping.shell(directory)}"
    base = f"{run.model.name_or_path}/{run.model.gguf_file}" if run.model.gguf_file else "BASE.gguf"
    template = f"{directory}/chat_template.jinja" if run.data.chat_template else None
    yield llama_server(base, f"{directory}/{name_of(directory)}.gguf", template)


def _peft(base: ModelSection, name: str) -> str:
    """Python code that loads base, adapter and tokenizer. PEFT loads the base itself unless it is a GGUF file."""
    name = _quoted(name)
    tokenizer = f"tokenizer = AutoTokenizer.from_pretrained({name})"
    if base.quantization != "none":
        return f"""from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, BitsAndBytesConfig

quantization = BitsAndBytesConfig({_QUANTIZATION_CODE[base.quantization]})
model = AutoPeftModelForCausalLM.from_pretrained({name}, quantization_config=quantization)
{tokenizer}"""
    if base.gguf_file is None:
        return f"""from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained({name})
{tokenizer}"""
    return f"""from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

base = AutoModelForCausalLM.from_pretrained(
    {_quoted(base.name_or_path)},
    gguf_file={_quoted(base.gguf_file)},
    quantization_config=GgufConfig(dequantize=True),
)
model = PeftModel.from_pretrained(base, {name})
{tokenizer}"""


def _quoted(text: str) -> str:
    """Text as Python, and JSON, write it."""
    return escaping.line(json.dumps(text, ensure_ascii=not escaping.is_plain(text)))
