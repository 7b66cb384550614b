"""How much memory merging takes, beside what the imports do: on a base of random weights of several GiB, in many files.

    python scripts/measure_merge.py [FOLDER] [--gib 5]

The base is written tensor by tensor, in the shape of a Llama of any size. The peak is that of the resident set of the
merging process (VmHWM), whose counter is set back once everything is imported. The bound is 2 x the largest tensor +
the adapter + 1 GiB. The folder is removed at the end.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from loratune.adapter.directory import AdapterDirectory
from loratune.data import no_progress
from loratune.export.merging import Merge
from loratune.lora.adapter_files import WEIGHTS_FILE
from loratune.system.tensor_files import Shards

GIB = 1 << 30


def peak() -> int:
    """The largest resident set so far, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10


def resident() -> int:
    """The resident set now, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) << 10


def write_base(folder: Path, gib: float) -> int:
    """Write a base of about this size. Returns the bytes of its largest tensor."""
    config = LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8,
        num_hidden_layers=max(1, int((gib * GIB - 2 * 128256 * 2048 * 2) / (2 * 61 * (1 << 20)))), dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    layout = {name: ("BF16", tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    folder.mkdir()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with Shards(folder, layout, GIB) as shards:
        for name, (_, shape) in layout.items():
            values = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02)
            shards.write(name, values.view(torch.uint8).numpy().reshape(-1))
    shards.write_index()
    return max(tensor.size for tensor in shards.tensors.values())


def write_adapter(folder: Path, base: Path) -> int:
    """Write an adapter on all linear layers of the blocks. Returns its bytes."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(base))
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=16))
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    state = {
        name.replace(".default", ""): torch.randn(parameter.shape) * 0.01
        for name, parameter in adapted.named_parameters()
        if "lora_" in name
    }
    adapted.peft_config["default"].save_pretrained(str(folder))
    save_file(state, folder / WEIGHTS_FILE, {"format": "pt"})
    return (folder / WEIGHTS_FILE).stat().st_size


def main() -> int:
    """Measure, print one JSON object, and return 1 if the bound does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default=tempfile.gettempdir())
    parser.add_argument("--gib", type=float, default=5)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder, prefix="measure-merge-"))
    try:
        largest = write_base(folder / "base", options.gib)
        adapter = write_adapter(folder / "adapter", folder / "base")
        (folder / "out").mkdir()
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        before, begun = resident(), time.monotonic()
        plan = Merge(AdapterDirectory.open(folder / "adapter"))
        plan.fingerprint()
        prepared = time.monotonic()
        written = plan.write(folder / "out", no_progress)
        took, bound = peak() - before, 2 * largest + adapter + GIB
        figures = {
            "base_bytes": plan.size, "base_files": len(list((folder / "base").glob("*.safetensors"))),
            "files": written.files, "changed": len(written.kept), "largest_tensor": largest, "adapter_bytes": adapter,
            "imports_resident": before, "peak_above": took, "bound": bound, "within": took <= bound,
            "fingerprint_s": round(prepared - begun, 1), "write_s": round(time.monotonic() - prepared, 1),
        }  # fmt: skip
        print(json.dumps(figures, indent=2))
        return 0 if took <= bound else 1
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
