"""The neutral judge: `python -P -m peers.evaluate MODEL ROWS DEVICE [ADAPTER ...]`.

Plain transformers and PEFT in fp32, one row at a time. Prints JSON: the loss in nats per supervised token, of the base
without an adapter and with each adapter in turn.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peers.common import Row, read


@torch.inference_mode()
def loss(model: Any, rows: list[Row], device: str) -> float:
    """Nats per supervised token."""
    total, count = 0.0, 0
    for row in rows:
        ids, labels = (torch.tensor([row[name]], device=device) for name in ("input_ids", "labels"))
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits.float(), labels[0, 1:], reduction="sum").item()
        count += int((labels[0, 1:] >= 0).sum())
    return total / count


def checked(model: Any, adapter: str) -> None:
    """See that the file's tensors are the model's, all of them: PEFT passes over names that it does not know."""
    held = {name: tensor.cpu().float() for name, tensor in get_peft_model_state_dict(model).items()}
    file = {name: tensor.float() for name, tensor in load_file(Path(adapter) / "adapter_model.safetensors").items()}
    if held.keys() != file.keys() or not all(torch.equal(held[name], file[name]) for name in held):
        sys.exit(f"error: {adapter} did not load as it is")
    if not all(tensor.any() for tensor in held.values()):
        sys.exit(f"error: {adapter} has tensors that are zero")


def main() -> None:
    """Score, and print."""
    place, file, device, *adapters = sys.argv[1:]
    rows, losses = read(Path(file)), []
    for adapter in [None, *adapters]:
        model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).to(device).eval()
        if adapter:
            model = PeftModel.from_pretrained(model, adapter).eval()
            checked(model, adapter)
        losses.append(loss(model, rows, device))
    print(json.dumps(losses))


if __name__ == "__main__":
    main()
