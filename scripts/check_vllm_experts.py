"""Exported experts as vLLM reads them: the change of each expert in vLLM's own tensors, beside PEFT's.

    python scripts/check_vllm_experts.py PYTHON [--families mixtral,gpt_oss]

PYTHON is that of an environment with vLLM, which `scripts/check_vllm.py` makes. vLLM computes experts with LoRA on GPUs
only, so its code that loads, stacks and scales an adapter is run here, without a model. Bases and adapters are those of
`scripts/compare_clients.py`. Exit code 1: a change differs by more than 1e-5 of the largest one.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from compare_clients import MIXTURES, run, write
from peft import AutoPeftModelForCausalLM
from safetensors.torch import save_file

from loratune.lora.parameters import layers_of

MOST = 1e-5

# Runs in vLLM's environment: prints the form of an export, and the largest difference of a change, as a share.
INSIDE = r"""
import json, re, sys
from types import SimpleNamespace
import torch
from safetensors.torch import load_file
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import PackedLoRALayerWeights
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.peft_helper import PEFTHelper

export, changes, names = sys.argv[1], load_file(sys.argv[2]), sys.argv[3].split(",")
count, largest = len(next(change for change in changes.values() if change.dim() == 3)), 0.0
keys = [*load_file(export + "/adapter_model.safetensors")]
single = any(re.search(r"\.experts\.0\.", key) for key in keys)
known = {"experts", "q_proj", "v_proj", "o_proj"}
known |= {f"experts.{e}.{name}" for e in range(count) for name in names if single}
helper = PEFTHelper.from_local_dir(export, None)
model = LoRAModel.from_local_checkpoint(export, known, helper, device="cpu", lora_model_id=1, dtype=torch.float32)
for owner in sorted({re.sub(r"(\.experts)\..*", r"\1", path.removesuffix(".base_layer"))
                     for path in model.loras if ".experts" in path}):
    if single:
        loras = [model.get_lora(f"{owner}.{e}.{name}") for e in range(count) for name in names]
        packed = PackedLoRALayerWeights.pack_moe(loras, owner).optimize()
        gate, down, up = (b @ a for a, b in zip(packed.lora_a, packed.lora_b))
        gate_up = torch.cat([gate, up], 1)
    else:
        for path in (owner, owner + ".base_layer"):
            model.get_lora(path).optimize()
        module = SimpleNamespace(w13_lora_a_stacked=[torch.zeros(1, count, 1)], global_num_experts=count, ep_rank=0)
        manager = SimpleNamespace(_get_lora_layer_weights=lambda lora, path: lora.get_lora(path), _is_3d_moe_model=True)
        LoRAModelManager._stack_moe_lora_weights(manager, model, module, owner)
        lora = model.get_lora(owner)
        gate_up, down = (b @ a for a, b in zip(lora.lora_a, lora.lora_b))
    layer = re.search(r"layers\.\d+\.", owner)[0]
    for leaf, found in (("gate_up_proj", gate_up), ("down_proj", down)):
        change = next(value for name, value in changes.items() if layer in name and name.endswith(leaf))
        largest = max(largest, float((found - (change if change.shape == found.shape else change.mT)).abs().max()))
size = max(float(change.abs().max()) for change in changes.values() if change.dim() == 3)
print(json.dumps(["single" if single else "stacked", largest / size]))
"""


def compare(folder: Path, family: str, python: Path) -> tuple[str, float]:
    """How experts of a family are exported, and the largest difference in vLLM, as a share of the largest change."""
    adapter, export, changes = write(folder, family, "experts"), folder / "export", folder / "changes.safetensors"
    code, said = run("export", "--adapter", adapter, "--to", "vllm", "--output", export)
    if code:
        return f"refused: {said}", 0.0
    layers = layers_of(AutoPeftModelForCausalLM.from_pretrained(adapter))
    save_file(
        {name: layer.get_delta_weight("default").detach().contiguous() for name, layer in layers.items()}, changes
    )
    names = "w1,w2,w3" if family == "mixtral" else "gate_proj,down_proj,up_proj"
    command = [str(python), "-P", "-c", INSIDE, str(export), str(changes), names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    form, largest = json.loads(done.stdout.splitlines()[-1])
    return form, largest


def main() -> None:
    """Print a line for each family."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", type=Path)
    parser.add_argument("--families", default=",".join(MIXTURES))
    given, is_equal = parser.parse_args(), True
    with tempfile.TemporaryDirectory() as folder:
        for family in given.families.split(","):
            form, largest = compare(Path(folder) / family, family, given.python)
            print(f"{family:18} {form:8} {largest:.1e}", flush=True)
            is_equal = is_equal and largest <= MOST
    sys.exit(not is_equal)


if __name__ == "__main__":
    main()
