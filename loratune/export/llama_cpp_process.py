"""A script: llama.cpp (the package xllamacpp), asked about the answers of an adapter.

It reads a request as JSON from stdin, see `llama_cpp.compare`, and writes one line of JSON for each question. It is a
process of its own because llama.cpp ends the process where it fails.

    python -P llama_cpp_process.py < request.json
"""

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

_CANDIDATES, _ALL = 64, 1 << 20
"""How many of the likeliest tokens are asked for first, and then."""


class LlamaCpp:
    """llama.cpp with one model."""

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
        """The log-probabilities of an answer's tokens, the greedy answer, and the number of tokens of the prompt."""
        prompt, answer = question["prompt"], question["answer"]
        logprobs = [self.log_probability([*prompt, *answer[:at]], token) for at, token in enumerate(answer)]
        greedy = self.greedy(prompt, len(answer))
        return {"logprobs": logprobs, "greedy": greedy, "count": self.count(question["request"])}

    def log_probability(self, ids: Sequence[int], token: int) -> float:
        """The log-probability of one token after others."""
        for candidates in (_CANDIDATES, _ALL):
            for top in self._first_token(ids, candidates)["top_logprobs"]:
                if top["id"] == token:
                    return float(top["logprob"])
        return -math.inf

    def _first_token(self, ids: Sequence[int], candidates: int) -> Mapping[str, Any]:
        """The first token of an answer. llama.cpp holds tokens back until their bytes are whole characters."""
        for tokens in (1, 8, 64):
            if found := content(self._complete(ids, tokens, candidates)["choices"][0]):
                return found[0]
        raise RuntimeError("llama.cpp gives no probabilities of the next token")

    def greedy(self, ids: Sequence[int], tokens: int) -> list[int]:
        """The likeliest answer of at most so many tokens, without the one that ends it."""
        choice = self._complete(ids, tokens, 1)["choices"][0]
        found = [int(token["id"]) for token in content(choice)]
        return found[:-1] if choice["finish_reason"] == "stop" else found

    def count(self, request: Mapping[str, Any]) -> int | None:
        """The number of tokens of a rendered prompt; None for a prompt that consists of ids."""
        if "messages" in request:
            answer = self._checked(
                self._server.handle_chat_completions({**request, "max_tokens": 1, "temperature": 0.0}), "usage"
            )
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


if __name__ == "__main__":
    with open(os.dup(1), "w") as out:
        os.dup2(2, 1)  # whatever llama.cpp prints
        request = json.load(sys.stdin)
        llama = LlamaCpp(request)
        for question in request["questions"]:
            print(json.dumps(llama.answer(question)), file=out, flush=True)
