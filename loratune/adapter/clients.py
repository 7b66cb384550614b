"""The programs that an adapter can be exported to: export options, and the commands that use the adapter in them."""

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from loratune import config
from loratune.codes import Code
from loratune.config import DataSection, RunConfig
from loratune.errors import ConfigError, Problem, install, missing_package
from loratune.text import code_block, code_span, is_printable_line, one_line, shell_word

if TYPE_CHECKING:
    from loratune.lora.served import Served

Arguments = Mapping[str, Any]
_NONE: Arguments = MappingProxyType({})
CLIENTS = {"peft": "PEFT", "vllm": "vLLM", "sglang": "SGLang", "gguf": "llama.cpp", "ollama": "Ollama"}
"""Value of `to` → name of the program."""
TYPES = ("f32", "f16", "bf16", "q8_0")
"""Weight types of a GGUF file of base and adapter."""
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Valid values of vLLM's --max-lora-rank (vllm/config/lora.py)."""

_QUANTIZATION_CODE = {
    "8bit": "load_in_8bit=True",
    "4bit": 'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True',
}


LOADER = "AutoModelForCausalLM"
"""The class of transformers that loads language models."""
LLAMA_CPP, VLLM = "xllamacpp", "vllm"
"""The packages that run llama.cpp and vLLM."""


def is_installed() -> bool:
    """Whether llama.cpp can be run."""
    return find_spec(LLAMA_CPP) is not None


@dataclass(frozen=True)
class ExportOptions:
    """The options of an export.

    Attributes:
        to: The program, a key of `CLIENTS`.
        merged: The weight type of a GGUF file of base and adapter; None: the adapter alone (gguf), f16 (ollama).
        llama_cpp: A checkout of llama.cpp, for its converters; None: the converters of the package are used.
        base_gguf: A GGUF file of the base.
        verify: Whether the export is run in its program, which SGLang never is; None: if it is installed.
        vllm_python: The Python of an environment with vLLM; None: this one, if it has vLLM.

    Raises:
        ConfigError: An option has an invalid value, names a missing file, or does not apply to this program; `verify`
            needs a program that is not installed.
    """

    to: str
    merged: str | None = None
    llama_cpp: Path | None = None
    base_gguf: Path | None = None
    verify: bool | None = None
    vllm_python: Path | None = None

    def __post_init__(self) -> None:
        given = {"merged": self.merged, "llama_cpp": self.llama_cpp, "base_gguf": self.base_gguf}
        what = "only works with `to='gguf'` and `to='ollama'`"
        if not self.uses_llama_cpp and (wrong := [name for name, value in given.items() if value is not None]):
            raise ConfigError([Problem(Code.USAGE_CONFLICT, what, key=name) for name in wrong])
        self._check_vllm()
        if self.base_gguf and not self.base_gguf.is_file():
            raise ConfigError(Problem(Code.USAGE_BAD_VALUE, "no such file", str(self.base_gguf), "base_gguf"))
        if self.uses_llama_cpp and self.verify and not is_installed():
            code, purpose = Code.SYSTEM_MISSING_PACKAGE, "runs llama.cpp"
            raise ConfigError(missing_package(code, LLAMA_CPP, purpose, "llama-cpp", key="verify"))

    def _check_vllm(self) -> None:
        """Raises ConfigError: vLLM is named for another program, or is not found; SGLang is to be run."""
        python, key = self.vllm_python, "vllm_python"
        if python and self.to != "vllm":
            raise ConfigError(Problem(Code.USAGE_CONFLICT, "only works with `to='vllm'`", key=key))
        if python and not python.is_file():
            raise ConfigError(Problem(Code.USAGE_BAD_VALUE, "no such file", str(python), key))
        if self.to == "sglang" and self.verify:
            raise ConfigError(Problem(Code.USAGE_CONFLICT, "SGLang is not run; leave it out", key="verify"))
        if self.to == "vllm" and self.verify and not self.runs_vllm:
            what, fix = (
                "needs vLLM, which is not installed here",
                "name the Python of an environment that has it: `vllm_python=...`",
            )
            raise ConfigError(Problem(Code.SYSTEM_MISSING_PACKAGE, what, key="verify", fix=fix))

    @property
    def runs_vllm(self) -> str:
        """The Python that runs vLLM; empty if the export is not run in vLLM."""
        if self.to != "vllm" or self.verify is False:
            return ""
        return str(self.vllm_python or (sys.executable if find_spec(VLLM) else ""))

    @property
    def uses_llama_cpp(self) -> bool:
        """Whether the export is a GGUF file."""
        return self.to in ("gguf", "ollama")

    @property
    def merged_type(self) -> str | None:
        """The weight type of a file of base and adapter; None for the adapter alone."""
        return self.merged or ("f16" if self.to == "ollama" else None)

    @property
    def why_not_verified(self) -> str:
        """Why the export is not run in its program; empty if it is."""
        if self.verify is False:
            return "`verify=False`"
        return install("llama-cpp") if self.uses_llama_cpp and not is_installed() else ""


def name_of(directory: str) -> str:
    """The name of an adapter in programs: the name of its directory, in characters that all of them accept."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", directory).strip("-.") or "adapter"


def vllm(
    base: str, name: str, directory: str, rank: int, template: str | None = None, arguments: Arguments = _NONE
) -> str:
    """The command that serves an adapter with vLLM.

    Args:
        base: The base, a directory or a hub id.
        name: The name of the adapter in requests.
        directory: The directory of the adapter.
        rank: The rank of the adapter.
        template: A chat template that replaces the template of the base.
        arguments: Arguments of the chat template.
    """
    most = next((most for most in VLLM_RANKS if rank <= most), rank)
    rendering = f" --chat-template {shell_word(template)}" if template else ""
    rendering += _option("--default-chat-template-kwargs", arguments)
    module = shell_word(f"{name}={directory}")
    return f"vllm serve {shell_word(base)} --enable-lora --max-lora-rank {most}{rendering} --lora-modules {module}"


def _option(name: str, arguments: Arguments) -> str:
    return f" {name} {shell_word(json.dumps(dict(arguments)))}" if arguments else ""


def sglang(base: str, name: str, directory: str, template: str | None = None) -> str:
    """The command that serves an adapter with SGLang. Arguments as in `vllm`."""
    rendering = f" --chat-template {shell_word(template)}" if template else ""
    paths = f"--lora-paths {shell_word(f'{name}={directory}')}"
    return f"python -m sglang.launch_server --model-path {shell_word(base)} --enable-lora{rendering} {paths}"


def llama_cpp_arguments(data: DataSection) -> dict[str, Any]:
    """The arguments of the chat template for llama.cpp, which gives `enable_thinking: true` unless told otherwise, so
    that no default of a template holds."""
    closed = {"enable_thinking": False} if data.empty_reasoning == "context" else {}
    return closed | data.chat_template_kwargs


def llama_server(file: Path, base: str | None, *, chat: bool | None = None, arguments: Arguments = _NONE) -> str:
    """The command that serves a GGUF file with llama.cpp.

    Args:
        file: The model, or an adapter.
        base: The GGUF file of the base of an adapter.
        chat: Whether the chat template next to an adapter is used; None: if it exists.
        arguments: Arguments of the chat template.
    """
    values = _option("--chat-template-kwargs", arguments)
    if base is None:
        return f"llama-server --jinja -m {shell_word(str(file))}{values}"
    template, rendering = file.with_name("chat_template.jinja"), ""
    if template.is_file() if chat is None else chat:
        rendering = f" --jinja --chat-template-file {shell_word(str(template))}"
    rendering += f"{'' if rendering else ' --jinja'}{values}" if values else ""
    return f"llama-server -m {shell_word(base)} --lora {shell_word(str(file))}{rendering}"


def sections(
    run: RunConfig,
    name: str,
    example: str,
    *,
    are_layers_known: bool,
    loader: str = LOADER,
    quantized: str | None = None,
    in_vllm: "Served | str | None" = None,
) -> str:
    """The section of a model card on how to use an adapter, with the programs that support it.

    Args:
        run: The config of its run.
        name: The name of the adapter directory.
        example: The command that tries it, see `card.example_command`.
        are_layers_known: Whether llama.cpp supports adapters for the adapted kinds of layers.
        loader: The class of transformers that loads the base.
        quantized: The method by which the files of the base hold it quantized.
        in_vllm: What vLLM does with the adapter, see `served.servers`; None: it applies it unchanged.
    """
    blocks = [f"{code_block(_peft(run, name, loader), 'python')}\n\nor {code_span(f'loratune {example}')}"]
    if quantized:
        text = f"The files of the base are quantized ({quantized}). Where transformers cannot load them, use "
        blocks[0] += f"\n\n{text}{code_span(f'loratune merge --adapter {shell_word(name)} --output MODEL')} instead."
    if are_layers_known and config.is_plain(run.lora):
        if run.model.gguf_file is None and not isinstance(in_vllm, str):
            exported = not config.has_one_scale(run.lora) or (in_vllm is not None and in_vllm.is_renamed)
            blocks.append(f"In vLLM:\n\n{_shell_block(_vllm(run, name, exported=exported))}")
        base = "" if run.model.gguf_file else ", where `BASE.gguf` is the base as a GGUF file"
        blocks.append(f"In llama.cpp{base}:\n\n{_shell_block(_llama_cpp(run, name))}")
    return "\n\n".join(blocks)


def _shell_block(commands: Iterable[str]) -> str:
    return code_block("\n".join(commands), "sh")


def _vllm(run: RunConfig, name: str, *, exported: bool) -> Iterator[str]:
    directory = name
    if exported:
        directory = f"{name}-vllm"
        yield f"loratune export --adapter {shell_word(name)} --to vllm --output {shell_word(directory)}"
    template = f"{directory}/chat_template.jinja" if _has_own_template(run) else None
    base, rank, arguments = run.model.name_or_path, config.highest_rank(run.lora), run.data.chat_template_kwargs
    yield vllm(base, name_of(name), directory, rank, template, arguments)


def _llama_cpp(config: RunConfig, name: str) -> Iterator[str]:
    directory = f"{name}-gguf"
    yield f"loratune export --adapter {shell_word(name)} --to gguf --output {shell_word(directory)}"
    base = f"{config.model.name_or_path}/{config.model.gguf_file}" if config.model.gguf_file else "BASE.gguf"
    file, arguments = Path(directory) / f"{name_of(directory)}.gguf", llama_cpp_arguments(config.data)
    yield llama_server(file, base, chat=_has_own_template(config), arguments=arguments)


def _has_own_template(run: RunConfig) -> bool:
    """Whether the adapter was trained with another chat template than its base has."""
    return run.data.chat_template is not None or run.data.empty_reasoning == "context"


def _peft(config: RunConfig, name: str, loader: str) -> str:
    """Python code that loads base, adapter and tokenizer. PEFT loads a base by itself if it is a language model.

    loader: The class of transformers that loads the base.
    """
    base, name, classes, lines, options = config.model, _quoted(name), ["AutoTokenizer"], [""], list[str]()
    if base.gguf_file is not None:
        classes.append("GgufConfig")
        options = [f"gguf_file={_quoted(base.gguf_file)}", "quantization_config=GgufConfig(dequantize=True)"]
    elif base.quantization != "none":
        classes.append("BitsAndBytesConfig")
        lines.append(f"quantization = BitsAndBytesConfig({_QUANTIZATION_CODE[base.quantization]})")
        options = ["quantization_config=quantization"]
    if base.gguf_file is None and loader == LOADER:
        peft = "AutoPeftModelForCausalLM"
        lines.append(f"model = {peft}.from_pretrained({', '.join([name, *options])})")
    else:
        peft, given = "PeftModel", [f"    {option}," for option in (_quoted(base.name_or_path), *options)]
        lines += [f"base = {loader}.from_pretrained(", *given, ")", f"model = PeftModel.from_pretrained(base, {name})"]
        classes.append(loader)
    imports = [f"from peft import {peft}", f"from transformers import {', '.join(sorted(classes))}"]
    lines.append(f"tokenizer = AutoTokenizer.from_pretrained({name})")
    if config.data.chat_template_kwargs:
        values = ", ".join(f"{key}={value!r}" for key, value in config.data.chat_template_kwargs.items())
        prompt = f"tokenizer.apply_chat_template(messages, add_generation_prompt=True, {values})"
        lines.append(one_line(f"prompt = {prompt}  # of `messages`"))
    return "\n".join([*imports, *lines])


def _quoted(text: str) -> str:
    """A text as a Python literal."""
    return one_line(json.dumps(text, ensure_ascii=not is_printable_line(text)))
