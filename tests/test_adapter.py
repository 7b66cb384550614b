"""The adapter directory: stock PEFT loads it, and every kind of damage is refused."""

import json
import os
import pickle
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import PLAIN, ROWS, Process, Ran, check_refused, is_problem, meanings, tiny_llama, tree, write_rows
from fork_server import ForkServer
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from typer.testing import CliRunner

from loratune import config
from loratune.adapter import loading
from loratune.adapter.directory import AdapterDirectory
from loratune.cli import app
from loratune.codes import Code
from loratune.config import LoraSection
from loratune.errors import NumericError
from loratune.lora import adapter_files, attach, creation, parameters, tensors

WEIGHTS, CONFIG = adapter_files.WEIGHTS_FILE, adapter_files.CONFIG_FILE
Damage = Callable[[Path], Any]


@contextmanager
def umask(value: int) -> Iterator[None]:
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


def train(place: Path, base: Path, name: str = "out") -> Path:
    """Train through the command line, and return the adapter directory."""
    values = {
        "model": {"name_or_path": str(base), "dtype": "float32"},
        **PLAIN,
        "data": {"train": str(write_rows(place / "rows.jsonl", ROWS))},
        "training": {"learning_rate": 1e-2, "max_steps": 3},
        "output_dir": str(place / name),
    }
    path = place / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    ran = CliRunner().invoke(app, ["train", str(path)])
    assert ran.exit_code == 0, ran.stderr
    return place / name


@pytest.fixture(scope="module")
def trained(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("trained"), tiny_dir)


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    """A copy of the adapter directory, to be damaged."""
    return Path(shutil.copytree(trained, tmp_path / "adapter"))


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.arange(40, 60)[None]


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


@pytest.fixture(scope="module")
def ours(trained: Path, ids: Tensor) -> Tensor:
    """The logits of the adapter as loratune opens it."""
    return logits(loading.load(AdapterDirectory.open(trained)).model, ids)


def test_stock_peft_gives_the_same_logits(trained: Path, tiny_dir: Path, ids: Tensor, ours: Tensor) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)
    assert not torch.allclose(logits(plain, ids), ours, atol=1e-3)
    assert torch.equal(logits(PeftModel.from_pretrained(plain, str(trained)), ids), ours)
    auto = AutoPeftModelForCausalLM.from_pretrained(str(trained), dtype=torch.float32)
    assert torch.equal(logits(auto, ids), ours)


def test_a_stock_pipeline_answers_as_generate_does(trained: Path, cli: Callable[..., Ran]) -> None:
    write = pipeline("text-generation", model=str(trained), dtype=torch.float32)
    answer = write("3 and 3 make", max_new_tokens=8, do_sample=False, return_full_text=False)[0]["generated_text"]
    ran = cli("generate", "--adapter", trained, "--max-new-tokens", 8, "3 and 3 make")
    assert ran.code == 0, ran.err
    assert answer
    assert ran.out == answer + "\n"


def test_contents_of_the_adapter_directory(trained: Path, tiny_dir: Path) -> None:
    files = {path.name for path in trained.iterdir()}
    assert files == {
        "adapter_config.json", "adapter_model.safetensors", "README.md", "run.yaml", "loratune.json",
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "train_rows.hashes",
    }  # fmt: skip
    tensors = load_file(trained / WEIGHTS)
    assert len(tensors) == 16  # 2 layers, 4 modules, A and B
    assert all("lora_" in name and tensor.dtype == torch.float32 for name, tensor in tensors.items())
    assert AutoTokenizer.from_pretrained(trained).encode("ab") == [64, 65]  # byte-level: indices of the letters
    assert adapter_files.inspect(trained).base == str(tiny_dir)
    assert json.loads((trained / "loratune.json").read_text())["seed"] == 42


def test_run_yaml_repeats_the_run(trained: Path, cli: Callable[..., Ran], tmp_path: Path) -> None:
    ran = cli("train", trained / "run.yaml", "--set", f"output_dir={tmp_path / 'again'}")
    assert ran.code == 0, ran.err
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (trained / WEIGHTS).read_bytes()
    assert (tmp_path / "again" / CONFIG).read_bytes() == (trained / CONFIG).read_bytes()
    first, second = config.load(trained / "run.yaml"), config.load(tmp_path / "again" / "run.yaml")
    assert second.model_copy(update={"output_dir": first.output_dir}) == first


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_file_modes_follow_the_umask(tiny_dir: Path, tmp_path: Path, mask: int, mode: int) -> None:
    with umask(mask):
        out = train(tmp_path, tiny_dir)
    assert {stat.S_IMODE(path.stat().st_mode) for path in out.rglob("*") if path.is_file()} == {mode}


# Damaged directories: each kind of damage is done to a copy of a valid one.


def rewrite(change: Callable[[dict[str, Tensor]], Any]) -> Damage:
    def damage(path: Path) -> None:
        tensors = load_file(path / WEIGHTS)
        change(tensors)
        save_file(tensors, path / WEIGHTS, {"format": "pt"})

    return damage


def configure(**values: Any) -> Damage:
    def damage(path: Path) -> None:
        known = json.loads((path / CONFIG).read_text())
        (path / CONFIG).write_text(json.dumps(known | values))

    return damage


def write(name: str, content: Callable[[bytes], bytes]) -> Damage:
    return lambda path: (path / name).write_bytes(content((path / name).read_bytes()))


def as_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("not a directory")


def drop_five(tensors: dict[str, Tensor]) -> None:
    for name in sorted(tensors)[:5]:
        del tensors[name]


def rename_all(tensors: dict[str, Tensor]) -> None:
    for name in sorted(tensors):
        tensors[name.replace("self_attn", "attention")] = tensors.pop(name)


FIRST = "base_model.model.model.layers.0.self_attn.k_proj"
FEW = f"{FIRST}.lora_A.weight, {FIRST}.lora_B.weight, {FIRST.replace('k_proj', 'o_proj')}.lora_A.weight"

Refusal = tuple[Code, str, str, str]
"""A code, the reported file within the directory, a key, and a part of the message."""

DAMAGED, NOT_JSON = (Code.ADAPTER_INVALID, WEIGHTS, "", ""), (Code.ADAPTER_INVALID, CONFIG, "", "")
UNREADABLE: dict[str, tuple[Damage, Refusal]] = {
    "missing": (shutil.rmtree, (Code.ADAPTER_NOT_FOUND, "", "", "")),
    "a file": (as_file, (Code.ADAPTER_NOT_FOUND, "", "", "")),
    "no config": (lambda path: (path / CONFIG).unlink(), (Code.ADAPTER_NOT_FOUND, "", "", CONFIG)),
    "no weights": (lambda path: (path / WEIGHTS).unlink(), (Code.ADAPTER_NOT_FOUND, "", "", f"{WEIGHTS} in this dir")),
    "truncated": (write(WEIGHTS, lambda raw: raw[:-50]), DAMAGED),
    "cut in its header": (write(WEIGHTS, lambda raw: raw[:60]), DAMAGED),
    "zero bytes": (write(WEIGHTS, lambda raw: b""), DAMAGED),
    "random": (write(WEIGHTS, lambda raw: bytes(reversed(raw))), DAMAGED),
    "cut config": (write(CONFIG, lambda raw: raw[:-9]), NOT_JSON),
    "empty config": (write(CONFIG, lambda raw: b""), NOT_JSON),
    "config not UTF-8": (write(CONFIG, lambda raw: b"\xff" + raw), NOT_JSON),
    "a list": (write(CONFIG, lambda raw: b"[]"), (Code.ADAPTER_INVALID, CONFIG, "", "")),
    "not LoRA": (configure(peft_type="IA3"), (Code.ADAPTER_INVALID, CONFIG, "", "")),
    "no base": (configure(base_model_name_or_path=None),
                (Code.ADAPTER_INVALID, CONFIG, "base_model_name_or_path", "")),
    "no targets": (configure(target_modules=None), (Code.ADAPTER_INVALID, CONFIG, "target_modules", "")),
}  # fmt: skip

# These can be detected only with the base: `params` reads an adapter without it.
UNFIT: dict[str, tuple[Damage, list[Refusal]]] = {
    "layer 9": (configure(layers_to_transform=[9]), [(Code.ADAPTER_MISMATCH, "", "", "")]),
    "five missing": (rewrite(drop_five),
                     [(Code.ADAPTER_MISMATCH, "", "", f"5 tensors are missing, among them {FEW} ")]),
    "one extra": (rewrite(lambda found: found.update(z=torch.ones(2))),
                  [(Code.ADAPTER_MISMATCH, "", "", "1 tensors belong to no module, among them z ")]),
    "renamed": (rewrite(rename_all),
                [(Code.ADAPTER_MISMATCH, "", "", f"16 tensors are missing, among them {FEW} "),
                 (Code.ADAPTER_MISMATCH, "", "", "16 tensors belong to no module")]),
    "too wide": (rewrite(lambda found: found.update({f"{FIRST}.lora_A.weight": torch.ones(8, 33)})),
                 [(Code.ADAPTER_MISMATCH, "", "",
                   f"1 tensors have another shape, among them {FIRST}.lora_A.weight (8, 33) where the base needs")]),
}  # fmt: skip


@pytest.mark.parametrize("kind", [*UNREADABLE, *UNFIT])
def test_a_damaged_directory_is_refused(kind: str, copy: Path, tmp_path: Path, cli: Callable[..., Ran]) -> None:
    if kind in UNFIT:
        damage, refusals = UNFIT[kind]
        unrecorded(copy)
    else:
        damage, refusals = UNREADABLE[kind][0], [UNREADABLE[kind][1]]
    damage(copy)
    before = tree(tmp_path)
    commands = [("generate", "x", "--adapter", copy), ("params", "--adapter", copy)]
    for command in commands if kind in UNREADABLE else commands[:1]:
        ran = cli(*command)
        check_refused(ran, 5, *((code, str(copy / file), key) for code, file, key, _ in refusals))
        assert ran.out == "" and all(text.strip() in ran.err for *_, text in refusals)
        assert ran.err.count("\n") == len(refusals) + (kind in UNFIT)  # it follows a note that nothing was verified
        assert "Traceback" not in ran.err
    assert tree(tmp_path) == before


def test_renamed_tensors_are_reported_under_both_names(copy: Path, cli: Callable[..., Ran]) -> None:
    rewrite(rename_all)(copy)
    unrecorded(copy)
    _, missing, extra = cli("generate", "x", "--adapter", copy).err.splitlines()
    assert "16 tensors are missing" in missing
    assert f"16 tensors belong to no module, among them {FEW.replace('self_attn', 'attention')}" in extra


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nonfinite_tensors_are_refused(value: float, copy: Path, cli: Callable[..., Ran]) -> None:
    rewrite(lambda tensors: tensors[f"{FIRST}.lora_B.weight"].view(-1)[5].fill_(value))(copy)
    unrecorded(copy)
    ran = cli("generate", "x", "--adapter", copy)
    check_refused(ran, 5, (Code.ADAPTER_NOT_FINITE, str(copy), ""))
    assert f"1 tensors hold NaN or inf, among them {FIRST}.lora_B.weight" in ran.err


def unrecorded(path: Path) -> None:
    """As other tools leave an adapter: without a list of its files."""
    (path / "loratune.json").unlink()


def edit(name: str, old: str, new: str) -> Damage:
    def damage(path: Path) -> None:
        text = (path / name).read_text()
        assert old in text
        (path / name).write_text(text.replace(old, new))

    return damage


EDITS = {
    CONFIG: edit(CONFIG, '"lora_alpha": 16', '"lora_alpha": 32'),
    WEIGHTS: rewrite(lambda tensors: tensors[f"{FIRST}.lora_B.weight"].view(-1)[5].add_(1)),
    "chat_template.jinja": edit("chat_template.jinja", "<|end|>", "<|fin|>"),
    "run.yaml": edit("run.yaml", "loss_on: completion", "loss_on: all"),
    "tokenizer.json": Path.unlink,
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_file_is_refused(name: str, copy: Path, cli: Callable[..., Ran]) -> None:
    """The weights, and all other files that affect the adapter's output. `--force` uses them anyway."""
    damage = EDITS[name]
    damage(copy / name if damage is Path.unlink else copy)
    code = Code.ADAPTER_CHANGED
    for command in (("generate", "1 and 1 make"), ("evaluate", "--data", copy.parent / "rows.jsonl")):
        ran = cli(*command, "--adapter", copy)
        check_refused(ran, 5, (code, str(copy / name), ""))
        assert ran.err.endswith("--force\n") and ran.err.count("\n") == 1
    if name != "tokenizer.json":
        ran = cli("generate", "1 and 1 make", "--adapter", copy, "--force", "--max-new-tokens", 2)
        assert ran.code == 0 and is_problem(ran.err, (code, str(copy / name), "")) and ran.err.count("\n") == 1


@pytest.mark.parametrize("name", ["special_tokens_map.json", "config.json", "merges.txt", "modeling.py"])
def test_an_added_file_that_would_be_read_is_refused(name: str, copy: Path, cli: Callable[..., Ran]) -> None:
    (copy / name).write_text('{"eos_token": "hello"}')
    (copy / "notes.txt").write_text("mine")
    ran = cli("generate", "1 and 1 make", "--adapter", copy)
    check_refused(ran, 5, (Code.ADAPTER_CHANGED, str(copy / name), ""))
    assert ran.err.endswith("--force\n") and ran.err.count("\n") == 1


RECORDS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no fingerprints": lambda record: record.pop("fingerprints"),
    "no fingerprint of the base": lambda record: record["fingerprints"].update(base=None),
    "no list of files": lambda record: record.update(files=["x"]),
    "a list without the weights": lambda record: record["files"].pop(WEIGHTS),
}


@pytest.mark.parametrize("name", RECORDS)
def test_an_incomplete_record_is_refused(name: str, copy: Path, cli: Callable[..., Ran]) -> None:
    record = json.loads((copy / "loratune.json").read_text())
    RECORDS[name](record)
    (copy / "loratune.json").write_text(json.dumps(record))
    ran = cli("generate", "1 and 1 make", "--adapter", copy)
    check_refused(ran, 5, (Code.ADAPTER_INVALID, str(copy / "loratune.json"), ""))


def test_files_that_users_may_edit(copy: Path, tmp_path: Path, cli: Callable[..., Ran], tiny_dir: Path) -> None:
    """The card, and the path of the base."""
    (copy / "README.md").write_text("# My adapter")
    shutil.copytree(tiny_dir, tmp_path / "moved")
    configure(base_model_name_or_path=str(tmp_path / "moved"))(copy)
    ran = cli("generate", "1 and 1 make", "--adapter", copy, "--max-new-tokens", 2)
    assert (ran.code, ran.err) == (0, "")


def test_a_different_base_of_the_same_shape_is_refused(copy: Path, tmp_path: Path, cli: Callable[..., Ran]) -> None:
    other = tiny_llama()
    other.model.embed_tokens.weight.data[0, 0] += 1
    other.save_pretrained(tmp_path / "other")
    configure(base_model_name_or_path=str(tmp_path / "other"))(copy)
    what = f"{copy}: was trained on another base than {tmp_path / 'other'}, by its settings or weights"
    ran = cli("generate", "1 and 1 make", "--adapter", copy)
    fix = "use its base, or use the adapter all the same with --force"
    assert (ran.code, ran.err) == (5, f"error[adapter.mismatch]: {what}; {fix}\n")
    ran = cli("generate", "1 and 1 make", "--adapter", copy, "--force", "--max-new-tokens", 2)
    assert (ran.code, ran.err) == (0, f"{what} [adapter.mismatch]\n")


CODE = Code.ADAPTER_UNSAFE
NAMED = {
    "code": ({"auto_mapping": {"base_model_class": "X", "parent_library": "os"}}, CODE, "auto_mapping"),
    "more code": ({"megatron_config": {"x": 1}, "megatron_core": "os"}, CODE, "megatron_config"),
    "a path": ({"base_model_name_or_path": "../../x"}, Code.ADAPTER_UNSAFE, "base_model_name_or_path"),
    "unknown": ({"use_telepathy": True}, Code.ADAPTER_INVALID, "use_telepathy"),
}


@pytest.mark.parametrize(("values", "code", "key"), NAMED.values(), ids=NAMED)
def test_unsafe_or_unknown_configuration_keys_are_refused(
    values: dict[str, Any], code: Code, key: str, copy: Path, cli: Callable[..., Ran]
) -> None:
    configure(**values)(copy)
    unrecorded(copy)
    ran = cli("generate", "x", "--adapter", copy)
    check_refused(ran, 5, (code, str(copy / CONFIG), key))


def test_an_unknown_key_that_is_null_is_noted(copy: Path, cli: Callable[..., Ran]) -> None:
    configure(use_telepathy=None)(copy)
    unrecorded(copy)
    ran = cli("generate", "1 and 1 make", "--adapter", copy, "--max-new-tokens", 2)
    unverified = f"{copy}: keeps no record of its files and its base, so neither was verified"
    assert ran.code == 0
    assert ran.err == f"{unverified}\n{copy / CONFIG}: this version of PEFT does not know use_telepathy\n"


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, "chat_template.jinja"])
def test_a_link_out_of_the_directory_is_not_followed(
    name: str, copy: Path, tmp_path: Path, cli: Callable[..., Ran]
) -> None:
    (copy / name).rename(tmp_path / "elsewhere")
    (copy / name).symlink_to(tmp_path / "elsewhere")
    for command in (("generate", "x", "--adapter", copy), ("params", "--adapter", copy)):
        ran = cli(*command)
        check_refused(ran, 5, (Code.ADAPTER_UNSAFE, str(copy / name), ""))
        assert ran.err.endswith(f"cp -rL -- {copy} NEW\n")
    odd = copy.rename(tmp_path / "an $(odd) name")
    assert cli("params", "--adapter", odd).err.endswith(f"cp -rL -- '{odd}' NEW\n")


class Trap:
    """Unpickling an instance creates a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def test_pickles_are_never_loaded(
    copy: Path, tmp_path: Path, ids: Tensor, ours: Tensor, cli: Callable[..., Ran]
) -> None:
    marker = tmp_path / "opened"
    trap = copy / "adapter_model.bin"
    trap.write_bytes(pickle.dumps(Trap(marker)))
    assert torch.equal(logits(loading.load(AdapterDirectory.open(copy)).model, ids), ours)
    (copy / WEIGHTS).unlink()
    for command in (("generate", "x", "--adapter", copy), ("params", "--adapter", copy)):
        ran = cli(*command)
        check_refused(ran, 5, (Code.ADAPTER_NOT_FOUND, str(copy), ""))
        assert "adapter_model.bin is a pickle, and pickles are not opened" in ran.err
    assert not marker.exists()
    pickle.loads(trap.read_bytes())
    assert marker.exists()  # unpickling would have created the file


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"hidden_size": 64}, Code.ADAPTER_MISMATCH, "16 tensors"),
        ({"num_hidden_layers": 1}, Code.ADAPTER_MISMATCH, "8 tensors"),
        ({"num_hidden_layers": 4}, Code.ADAPTER_MISMATCH, "16 tensors"),
    ],
)
def test_a_base_of_another_shape_is_refused(
    changes: dict[str, int], code: Code, message: str, copy: Path, tmp_path: Path, cli: Callable[..., Ran]
) -> None:
    other = tmp_path / "other"
    tiny_llama(**changes).save_pretrained(other)
    configure(base_model_name_or_path=str(other))(copy)
    ran = cli("generate", "x", "--adapter", copy)
    check_refused(ran, 5, (code, str(copy), ""))
    assert message in ran.err
    assert f"is {other} the base it was trained on?" in ran.err


@pytest.mark.parametrize("command", [("generate", "x"), ("merge",), ("export", "--to", "peft")], ids=" ".join)
def test_a_missing_base_is_reported_as_a_model_error(
    command: tuple[str, ...], copy: Path, tmp_path: Path, cli: Callable[..., Ran]
) -> None:
    configure(base_model_name_or_path=str(tmp_path / "gone"))(copy)
    output = ("--output", tmp_path / "out") if command[0] != "generate" else ()
    ran = cli(*command, "--adapter", copy, *output)
    check_refused(ran, 3, (Code.MODEL_NOT_FOUND, str(tmp_path / "gone"), ""))
    assert ran.out == "" and "if the base has moved, set base_model_name_or_path" in ran.err


# Saving


def small(**fields: Any) -> PeftModel:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 4))
    return creation.attach(base, LoraSection(**({"r": 2} | fields)), {"target_modules": ["0", "1"]}, seed=0)


def start(model: PeftModel) -> tensors.AdapterInit:
    """The initial state of the adapter of a model, with which `save` compares."""
    return creation.initialize_adapter(model, LoraSection())


def fill(model: PeftModel, name: str, value: float) -> PeftModel:
    for key, parameter in model.named_parameters():
        if name in key:
            parameter.data.fill_(value)
    return model


def test_an_untrained_adapter_is_not_saved(tmp_path: Path) -> None:
    began = start(small())
    attach.check_trained(tensors.weights(fill(small(), "1.lora_B", 0.5)), began)  # one B that changed is enough
    with pytest.raises(NumericError) as caught:
        attach.save(fill(small(), "lora_A", 0.5), tmp_path, began)
    assert meanings(caught.value) == [(Code.LORA_UNCHANGED, "", "")]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_nonfinite_adapter_is_not_saved(value: float, tmp_path: Path) -> None:
    model = fill(fill(small(), "lora_B", 1.0), "1.lora_A", value)
    with pytest.raises(NumericError, match=r"1 adapter tensors hold NaN or inf, among them .*1\.lora_A") as caught:
        attach.save(model, tmp_path, start(small()))
    assert (caught.value.exit_code, meanings(caught.value)) == (6, [(Code.TRAINING_NOT_FINITE, "", "")])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "tensors",
    [
        {"a": (1, torch.float32)},
        {"a": (0, torch.float32), "b": ((), torch.float32)},
        {f"layers.{number}.{side}": ((number + 1, 7), torch.float32) for number in range(30) for side in "AB"},
        {"h": ((3, 3), torch.bfloat16), "a": ((100, 99), torch.float32), "z": (5, torch.float16)},
        {name: ((1, torch.float16) if name < "h" else (600, torch.bfloat16)) for name in "abcdefghijkl"},
    ],
)
def test_file_bytes_equals_the_size_of_the_file(tensors: dict[str, Any], tmp_path: Path) -> None:
    made = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in tensors.items()}
    save_file(made, tmp_path / "file", {"format": "pt"})
    assert parameters.file_bytes(made) == (tmp_path / "file").stat().st_size


@pytest.mark.parametrize("fields", [{}, {"r": 7}, {"use_dora": True}, {"bias": "all"}, {"bias": "lora_only"}])
def test_count_predicts_the_file_size(fields: dict[str, Any], tmp_path: Path) -> None:
    began, model = start(small(**fields)), fill(small(**fields), "lora_B", 0.1)
    size = attach.save(model, tmp_path, began)
    assert creation.count(model, began).adapter_bytes == size == (tmp_path / WEIGHTS).stat().st_size


def test_the_base_is_recorded_under_the_requested_name(tmp_path: Path) -> None:
    base = tiny_llama()
    base.name_or_path = "/what/it/calls/itself"
    only_q = {"target_modules": ["q_proj"]}
    tuned = creation.attach(base, LoraSection(), only_q, seed=0, base_name="who/base", revision="v1")
    began = start(tuned)
    attach.save(fill(tuned, "lora_B", 1.0), tmp_path, began)
    found = adapter_files.inspect(tmp_path)
    assert (found.base, found.config["revision"]) == ("who/base", "v1")
    assert found.config["task_type"] == "CAUSAL_LM"


HASHED = """
import sys
from pathlib import Path
from torch import nn
from loratune.lora import attach, creation
from loratune.config import LoraSection

out = Path(sys.argv[1])
names = ["q_proj", "k_proj", "v_proj", "o_proj"]
base = nn.ModuleDict({name: nn.Linear(4, 4) for name in names})
model = creation.attach(base, LoraSection(), {"target_modules": names}, seed=0)
start = creation.initialize_adapter(model, LoraSection())
for name, parameter in model.named_parameters():
    if "lora_B" in name:
        parameter.data.fill_(1.0)
model.save_pretrained(str(out / "stock"))
attach.save(model, out / "ours", start)
"""


@pytest.mark.slow
def test_files_do_not_depend_on_the_hash_seed(tmp_path: Path, processes: ForkServer) -> None:
    """For an untrained adapter; `test_train.py` tests whole runs. The fork server has seed 2."""
    command = [sys.executable, "-c", HASHED, str(tmp_path / "1")]
    first = Process(command, env=os.environ | {"PYTHONHASHSEED": "1"})
    second = processes.start(tmp_path / "2", first=f"{HASHED}\nsys.exit()")
    assert [first.wait(), second.wait()] == [0, 0], second.said()
    assert tree(tmp_path / "1" / "ours") == tree(tmp_path / "2" / "ours")
    assert tree(tmp_path / "1" / "stock") != tree(tmp_path / "2" / "stock")  # PEFT's own order depends on it


def test_a_rank_above_the_layer_size_is_noted() -> None:
    assert parameters.notes(small(r=4)) == []
    (note,) = parameters.notes(small(r=8))
    assert note.startswith("lora.r: 8 is more than the 4 inputs or outputs of * ×1;")  # noqa: RUF001
    assert [note[:32] for note in parameters.notes(small(r=16))] == [
        "lora.r: 16 is more than the 4 in",
        "lora.r: 16 is more than the 12 i",
    ]
