"""A script that runs llama.cpp and its converters in a separate process, as a failure of llama.cpp ends the process.

    python -P llama_cpp_process.py answer < request.json
    python -P llama_cpp_process.py convert CONVERTERS MODEL_DIRECTORY FILE OUTTYPE TOKENIZER_FILE

`answer` scores the answers of an adapter with llama.cpp (the package xllamacpp). It reads a request as JSON, see
`gguf.compare`, and writes one line of JSON per question.

`convert` is llama.cpp's model converter with the tokenizer of an existing GGUF file. The converter identifies a
tokenizer by a hash of its output on a test text, and refuses unknown ones, such as tokenizers that transformers made
from a GGUF file. Their entries can be copied from that file.
"""

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

_CANDIDATES, _ALL = 64, 1 << 20
"""The number of top tokens that are requested, first and on a second try."""
_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
_TEMPLATE = "tokenizer.chat_template"


class LlamaCpp:
    """A llama.cpp server with one model."""

    def __init__(self, request: Mapping[str, Any]):
        xllamacpp = import_module("xllamacpp")
        parameters = xllamacpp.CommonParams()
        parameters.model.path = request["model"]
        longest = max(len(question["prompt"]) + len(question["answer"]) for question in request["questions"])
        parameters.n_ctx = -(-(longest + 64) // 256) * 256
        parameters.n_parallel, parameters.warmup, parameters.n_gpu_layers = 1, False, 0
        parameters.use_jinja = True
        parameters.cpuparams.n_threads = request["threads"]
        if request["template"] is not None:
            parameters.chat_template = request["template"]
        if request["adapter"]:
            parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(request["adapter"], 1.0)]
        self._server = xllamacpp.Server(parameters)

    def answer(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """The log-probability of each token of an answer, the likeliest token at each position, and the number of
        tokens of the rendered prompt."""
        prompt, answer = question["prompt"], question["answer"]
        scored = [self.score([*prompt, *answer[:at]], token) for at, token in enumerate(answer)]
        logprobs, top = zip(*scored, strict=True) if scored else ((), ())
        return {"logprobs": logprobs, "top": top, "count": self.count(question["request"])}

    def score(self, ids: Sequence[int], token: int) -> tuple[float, Mapping[str, Any]]:
        """The log-probability of a token after some ids, and the likeliest token there."""
        for candidates in (_CANDIDATES, _ALL):
            found = self._next_tokens(ids, candidates)
            for one in found:
                if one["id"] == token:
                    return float(one["logprob"]), found[0]
        return -math.inf, found[0]

    def _next_tokens(self, ids: Sequence[int], candidates: int) -> Sequence[Mapping[str, Any]]:
        """The likeliest next tokens. llama.cpp returns tokens only once their bytes form whole characters."""
        for tokens in (1, 8, 64):
            if found := content(self._complete(ids, tokens, candidates)["choices"][0]):
                return list(found[0]["top_logprobs"])
        raise RuntimeError("llama.cpp gives no probabilities of the next token")

    def count(self, request: Mapping[str, Any]) -> int | None:
        """The number of tokens of a rendered prompt; None for a prompt of ids."""
        if "messages" in request:
            chat = {**request, "max_tokens": 1, "temperature": 0.0}
            answer = self._checked(self._server.handle_chat_completions(chat), "usage")
        elif "prompt" in request:
            answer = self._complete(request["prompt"], 1, 1)
        else:
            return None
        return int(answer["usage"]["prompt_tokens"])

    def _complete(self, prompt: str | Sequence[int], tokens: int, candidates: int) -> Mapping[str, Any]:
        request = {
            "prompt": prompt, "n_predict": tokens, "n_probs": candidates, "temperature": 0.0, "cache_prompt": True,
        }  # fmt: skip
        return self._checked(self._server.handle_completions(request), "choices")

    @staticmethod
    def _checked(answer: Any, key: str) -> Mapping[str, Any]:
        answer = json.loads(answer) if isinstance(answer, str) else answer
        if key not in answer:
            raise RuntimeError(f"llama.cpp refuses a prompt: {answer}")
        return dict(answer)


def content(choice: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The tokens of an answer, which may be empty."""
    return [*((choice.get("logprobs") or {}).get("content") or ())]


def convert(converters: Path, directory: Path, file: Path, outtype: str, tokenizer: Path) -> None:
    """Convert a model directory. Arguments as in `gguf.convert_model`."""
    sys.path[:0] = [str(converters), str(converters / "gguf-py")]
    gguf, conversion = import_module("gguf"), import_module("conversion")
    hparams = conversion.ModelBase.load_hparams(directory, False)
    kind: Any = conversion.get_model_class(conversion.get_model_architecture(hparams, conversion.ModelType.TEXT))
    fields = gguf.GGUFReader(tokenizer).fields

    class WithTokenizer(kind):
        """The converter of the architecture, with the tokenizer of the GGUF file."""

        model_arch = kind.model_arch

        def set_vocab(self) -> None:
            """Copy the tokenizer of the GGUF file, and write the chat template of the directory."""
            template = directory / "chat_template.jinja"
            if template.is_file():
                self.gguf_writer.add_chat_template(template.read_text(encoding="utf-8"))
            for name, field in fields.items():
                if name.startswith("tokenizer.") and name != _TEMPLATE:
                    inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
                    self.gguf_writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)

    import_module("torch").set_grad_enabled(False)
    WithTokenizer(directory, getattr(gguf.LlamaFileType, _TYPES[outtype]), file).write()


def answer() -> None:
    """Answer the questions of a request."""
    with open(os.dup(1), "w") as out:
        os.dup2(2, 1)  # whatever llama.cpp prints
        request = json.load(sys.stdin)
        llama = LlamaCpp(request)
        for question in request["questions"]:
            print(json.dumps(llama.answer(question)), file=out, flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "answer":
        answer()
    else:
        convert(Path(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]), sys.argv[5], Path(sys.argv[6]))
