"""A script that runs an adapter in vLLM, with the Python of vLLM's environment.

    PYTHON vllm_process.py RESULT < REQUEST

It reads a request, see `vllm.compare`, and writes a result to a file, both as JSON: vLLM prints to stdout. It ends with
the process that started it.
"""

import ctypes
import json
import math
import signal
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any


def ignored(model: Any) -> list[str]:
    """The modules of the adapter that no layer of vLLM's model takes."""
    manager = model.lora_manager
    return sorted({*manager.get_adapter(1).loras} - {*manager.modules})


def run(request: Mapping[str, Any]) -> dict[str, Any]:
    """The log-probability of each token of the answers, the ignored modules, and the version of vLLM."""
    vllm, lora = import_module("vllm"), import_module("vllm.lora.request")
    longest = max(len(row["prompt"]) + len(row["answer"]) for row in request["rows"])
    model = vllm.LLM(
        request["base"], enable_lora=True, max_lora_rank=request["rank"], dtype="float32", enforce_eager=True,
        max_model_len=longest + 8, max_num_seqs=8, limit_mm_per_prompt=request["limits"],
        skip_tokenizer_init=True,
    )  # fmt: skip
    # Each token by a request of its own: on a CPU, vLLM 0.32 fails on prompt_logprobs together with an adapter.
    prompts = [
        {"prompt_token_ids": row["prompt"] + row["answer"][:at]}
        for row in request["rows"]
        for at in range(len(row["answer"]))
    ]
    tokens = [token for row in request["rows"] for token in row["answer"]]
    sampling = vllm.SamplingParams(max_tokens=1, temperature=0, logprobs=20, detokenize=False)
    adapter = lora.LoRARequest("exported", 1, request["adapter"])
    outputs = model.generate(prompts, sampling, lora_request=adapter)
    found = [output.outputs[0].logprobs[0].get(token) for token, output in zip(tokens, outputs, strict=True)]
    logprobs = [one.logprob if one else -math.inf for one in found]
    return {"logprobs": logprobs, "ignored": model.apply_model(ignored)[0], "version": vllm.__version__}


if __name__ == "__main__":
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    Path(sys.argv[1]).write_text(json.dumps(run(json.load(sys.stdin))), "utf-8")
