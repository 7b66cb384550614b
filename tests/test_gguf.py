"""A base in a GGUF file: training equals that on the same model in safetensors, and the adapter records how to load
it."""

import json
import re
import shutil
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import gguf
import pytest
import torch
from conftest import (
    ROOT,
    ROWS,
    Ran,
    check_refused,
    is_problem,
    meanings,
    problem_text,
    run_command,
    tiny_llama,
    tree,
    write_rows,
)
from fork_server import ForkServer
from hub_server import READ_SETTINGS
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from loratune.adapter import loading
from loratune.adapter.directory import AdapterDirectory
from loratune.codes import Code
from loratune.config import ModelSection
from loratune.data import batch_check
from loratune.errors import ModelError
from loratune.kernels import acceleration
from loratune.kernels.upstream import is_fake
from loratune.lora.adapter_files import WEIGHTS_FILE
from loratune.model import load, source
from loratune.model.source import GGUF_KEY as KEY
from loratune.model.source import KEY as NAME
from loratune.model.source import check_gguf as check

FILE = "tiny.gguf"
Cli = Callable[..., Ran]
MakeConfig = Callable[..., Path]

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers": "blk",
}


def write_gguf(path: Path, llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, **extra: int) -> Path:
    """Write a Llama as llama.cpp's converter does, in float32. extra: further numeric metadata."""
    config, writer = llama.config, gguf.GGUFWriter(path, "llama")
    for key, value in extra.items():
        writer.add_uint16(key.replace("_", "."), value)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    words = sorted(tokenizer.get_vocab().items(), key=lambda word: word[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([word for word, _ in words])
    writer.add_token_scores([0.0] * len(words))
    writer.add_token_types([3 if number > 255 else 1 for _, number in words])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    for name, tensor in llama.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:  # llama.cpp rotates adjacent values, transformers rotates halves
            tensor = tensor.unflatten(0, (heads, 2, -1)).swapaxes(1, 2).flatten(0, 2)
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> tuple[Path, Path]:
    """The same model twice: a directory with only a GGUF file, and one as transformers writes it."""
    packed, plain = (tmp_path_factory.mktemp("gguf") / name for name in ("packed", "plain"))
    packed.mkdir()
    llama = tiny_llama(vocab_size=len(tokenizer))
    write_gguf(packed / FILE, llama, tokenizer)
    llama.save_pretrained(plain)
    tokenizer.save_pretrained(plain)
    return packed, plain


def test_the_loaded_weights_are_bit_identical(pair: tuple[Path, Path]) -> None:
    packed, plain = (
        load.load_base(ModelSection(name_or_path=str(path), gguf_file=file, dtype="float32")).state_dict()
        for path, file in zip(pair, (FILE, None), strict=True)
    )
    assert packed.keys() == plain.keys()
    assert all(torch.equal(packed[name], plain[name]) for name in plain)


def test_training_generating_and_evaluating_equal_the_plain_model(
    pair: tuple[Path, Path], run_config: MakeConfig, cli: Cli, tmp_path: Path
) -> None:
    sections: dict[str, Any] = {"data": {"validation": str(tmp_path / "rows.jsonl")}, "training": {"max_steps": 4}}
    outputs = {}
    for kind, path, file in zip(("packed", "plain"), pair, (FILE, None), strict=True):
        base = {"name_or_path": str(path), "gguf_file": file}
        config = run_config(f"{kind}.yaml", model=base, output_dir=str(tmp_path / kind), **sections)
        counted = cli("params", config)
        trained = cli("train", config)
        assert (trained.code, "%|" in trained.err) == (0, False), trained.err  # no progress bars
        out = ("--adapter", tmp_path / kind)
        answered = cli("generate", *out, "--max-new-tokens", 4, "3 and 3 make")
        scored = cli("evaluate", *out, "--data", tmp_path / "rows.jsonl", "--json")
        read = cli("params", *out).out.splitlines()[2:]  # below the names of adapter and base
        outputs[kind] = [counted, trained.err, answered, scored, read, tree(tmp_path / kind)[WEIGHTS_FILE]]
        assert [ran.code for ran in (counted, trained, answered, scored)] == [0, 0, 0, 0]
    outputs["plain"][1] = re.sub(r"[\d,]+ tokens/s.*", "", outputs["plain"][1])
    outputs["packed"][1] = re.sub(r"[\d,]+ tokens/s.*", "", outputs["packed"][1])
    assert outputs["packed"] == outputs["plain"]


@pytest.fixture(scope="module")
def adapter_dir(pair: tuple[Path, Path], processes: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on the GGUF file, trained for one step."""
    path = tmp_path_factory.mktemp("adapter")
    (path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (path / "run.yaml").write_text(
        f"model: {{name_or_path: {pair[0]}, gguf_file: {FILE}, dtype: float32}}\n"
        f"data: {{train: {path / 'rows.jsonl'}}}\ntraining: {{max_steps: 1, learning_rate: 0.01}}\n"
        f"output_dir: {path / 'out'}\n"
    )
    child = processes.start("train", path / "run.yaml")
    assert child.wait() == 0, child.said()
    return path / "out"


def logits(tuned: Any) -> torch.Tensor:
    with torch.inference_mode():
        return tuned(torch.arange(12)[None]).logits


def test_the_adapter_records_how_to_load_its_base(
    adapter_dir: Path, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert json.loads((adapter_dir / "adapter_config.json").read_text())["base_model_name_or_path"] == str(pair[0])
    record = json.loads((adapter_dir / "loratune.json").read_text())
    assert record["base"] == {"name_or_path": str(pair[0]), "revision": None, "gguf_file": FILE, "quantized": None}
    with_config = loading.load(AdapterDirectory.open(adapter_dir)).model

    (alone := tmp_path / "alone").mkdir()
    for file in adapter_dir.iterdir():
        if file.name != "run.yaml":
            (alone / file.name).write_bytes(file.read_bytes())
    opened = AdapterDirectory.open(alone, forced=True)
    assert (opened.base.gguf_file, opened.run) == (FILE, None)

    monkeypatch.chdir(adapter_dir.parent)  # the card names the directory by its actual name
    (code,) = re.findall(r"```python\n(.*?)```", (adapter_dir / "README.md").read_text(), flags=re.DOTALL)
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    assert torch.equal(logits(namespace["model"].float()), logits(with_config))
    assert namespace["tokenizer"]("a").input_ids == [64]
    with namespace["model"].disable_adapter():
        assert not torch.equal(logits(namespace["model"]), logits(with_config))


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ("[]", f"[{Code.ADAPTER_INVALID}]"),
        ("{", f"[{Code.ADAPTER_INVALID}]"),
        ('{"base": {"gguf_file": 3}}', "loratune.json: base.gguf_file: "),
    ],
)
def test_an_invalid_record_of_the_base_is_reported(
    record: str, problem: str, adapter_dir: Path, tmp_path: Path, cli: Cli
) -> None:
    for file in adapter_dir.iterdir():
        if file.name != "run.yaml":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    if record.startswith('{"'):  # the rest of the record is unchanged
        known = json.loads((adapter_dir / "loratune.json").read_text())
        del known["files"]["run.yaml"]
        record = json.dumps(known | json.loads(record))
    (tmp_path / "loratune.json").write_text(record)
    ran = cli("generate", "x", "--adapter", tmp_path)
    assert (ran.code, ran.out) == (5, "")
    last = ran.err.splitlines()[-1]
    assert problem_text(last).startswith(f"{tmp_path / 'loratune.json'}: ") and problem in last


def test_files_in_the_working_directory_are_not_loaded(
    pair: tuple[Path, Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a control: transformers prefers a file of that name in the working directory."""
    other = tiny_llama(vocab_size=len(tokenizer), num_hidden_layers=1)
    write_gguf(tmp_path / FILE, other, tokenizer)
    monkeypatch.chdir(tmp_path)
    wrong = AutoModelForCausalLM.from_pretrained(pair[0], gguf_file=FILE, config=other.config)
    assert torch.equal(wrong.get_input_embeddings().weight, other.get_input_embeddings().weight)
    assert len(wrong.model.layers) == 1
    assert load.load_base(ModelSection(name_or_path=str(pair[0]), gguf_file=FILE)).config.num_hidden_layers == 2


def test_tokenizer_and_config_of_the_directory_take_precedence(
    pair: tuple[Path, Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / FILE).write_bytes((pair[0] / FILE).read_bytes())
    section = ModelSection(name_or_path=str(tmp_path), gguf_file=FILE)
    assert load.load_tokenizer(section).eos_token == tokenizer.eos_token
    assert load.load_config(section).max_position_embeddings == 512
    config = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=99).config
    config.save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|end|>").save_pretrained(tmp_path)
    assert load.load_tokenizer(section).eos_token == "<|end|>"
    assert load.load_base(section).config.max_position_embeddings == 99


# Files that are not valid GGUF. Each error is reported before torch is imported.


def cut(count: int) -> Callable[[bytes], bytes]:
    return lambda content: content[:count]


FAULTY: dict[str, tuple[Callable[[bytes], bytes], Code, str]] = {
    "text": (lambda content: b"hello", Code.MODEL_DAMAGED, ""),
    "empty": (cut(0), Code.MODEL_DAMAGED, ""),
    "LFS": (lambda content: b"version https://git-lfs.github.com/spec/v1\n", Code.MODEL_DAMAGED, ""),
    "magic alone": (cut(4), Code.MODEL_DAMAGED, "cut off"),
    "header": (cut(900), Code.MODEL_DAMAGED, "cut off"),
    "last byte": (lambda content: content[:-1], Code.MODEL_DAMAGED, "cut off"),
    "version 1": (lambda content: content[:4] + b"\1" + content[5:], Code.MODEL_DAMAGED, "version 1 which"),
    "nonsense": (lambda content: content[:24] + b"\xff" * 200, Code.MODEL_DAMAGED, "damaged"),
    "type": (lambda content: content[:24] + struct.pack("<QcI", 1, b"a", 99) + content[37:], Code.MODEL_DAMAGED,
             "99) is not a valid GGUFValueType"),
}  # fmt: skip

WITHOUT_TORCH = """
import json, sys
from typer.testing import CliRunner
from loratune.cli import app
ran = CliRunner().invoke(app, ["train", sys.argv[1]])
print(json.dumps(["torch" in sys.modules, ran.exit_code, ran.stdout, ran.stderr]))
"""


def without_torch(config: Path) -> Ran:
    """The error of a run that must end before torch is imported."""
    child = run_command([sys.executable, "-c", WITHOUT_TORCH, config], capture_output=True, text=True, check=True)
    with_torch, *ran = json.loads(child.stdout)
    assert not with_torch
    return Ran(*ran)


APART = [pytest.param(kind, True, marks=() if kind == "header" else pytest.mark.slow) for kind in FAULTY]
"""In a separate process, to check that torch is not imported."""


@pytest.mark.parametrize(("kind", "apart"), [*((kind, False) for kind in FAULTY), *APART])
def test_an_invalid_file_is_refused(
    kind: str, apart: bool, pair: tuple[Path, Path], run_config: MakeConfig, tmp_path: Path, cli: Cli
) -> None:
    content, (damage, code, text) = (pair[0] / FILE).read_bytes(), FAULTY[kind]
    file = tmp_path / "model" / FILE
    file.parent.mkdir()
    file.write_bytes(damage(content))
    config = run_config(model={"name_or_path": str(file.parent), "gguf_file": FILE})
    before = tree(tmp_path)
    ran = without_torch(config) if apart else cli("train", config)
    check_refused(ran, 3, (code, str(file), "" if kind == "LFS" else KEY))
    assert ran.out == ""
    assert text in ran.err
    assert tree(tmp_path) == before


def test_a_valid_file_is_accepted(pair: tuple[Path, Path]) -> None:
    check(pair[0] / FILE)


@pytest.mark.parametrize(
    ("file", "refusal", "text"),
    [
        ("other.gguf", (Code.MODEL_NOT_FOUND, "{path}/other.gguf", KEY), "there is tiny.gguf"),
        ("../packed/tiny.gguf", (Code.MODEL_NOT_FOUND, "../packed/tiny.gguf", KEY), "name the directory"),
        ("/tiny.gguf", (Code.MODEL_NOT_FOUND, "/tiny.gguf", KEY), "name the directory"),
        (None, (Code.MODEL_NOT_FOUND, "{path}", NAME), "set model.gguf_file to tiny.gguf"),
    ],
)
@pytest.mark.parametrize("command", ["train", "params"])
def test_a_wrong_file_name_is_refused(
    command: str,
    file: str | None,
    refusal: tuple[Code, str, str],
    text: str,
    pair: tuple[Path, Path],
    run_config: MakeConfig,
    cli: Cli,
) -> None:
    ran = cli(command, run_config(model={"name_or_path": str(pair[0]), "gguf_file": file}))
    code, where, key = refusal
    check_refused(ran, 3, (code, where.format(path=pair[0]), key))
    assert ran.out == "" and text in ran.err


def test_a_part_of_a_split_file_is_refused(
    pair: tuple[Path, Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    part = write_gguf(tmp_path / FILE, tiny_llama(vocab_size=len(tokenizer)), tokenizer, split_count=3)
    with pytest.raises(ModelError, match=r"one of 3 parts, .*; .*llama-gguf-split --merge") as caught:
        check(part)
    assert meanings(caught.value) == [(Code.MODEL_DAMAGED, str(part), KEY)]


# On the hub


class Hub(BaseHTTPRequestHandler):
    """Serves one file like huggingface.co."""

    content = b""

    def do_HEAD(self) -> None:
        found = self.path == f"/who/packed/resolve/main/{FILE}"
        self.send_response(200 if found else 404)
        self.send_header("X-Repo-Commit", "0" * 40)
        if found:
            self.send_header("ETag", '"0123456789"')
            self.send_header("Content-Length", str(len(self.content)))
        else:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(self.content)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def hub(pair: tuple[Path, Path]) -> Iterator[str]:
    Hub.content = (pair[0] / FILE).read_bytes()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_gguf_file_of_a_hub_repository(
    hub: str, run_config: MakeConfig, tmp_path: Path, processes: ForkServer
) -> None:
    local = {"HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "cache"), "NO_PROXY": "127.0.0.1"}
    base = {"name_or_path": "who/packed", "gguf_file": FILE, "dtype": "float32"}
    config = run_config(model=base, training={"max_steps": 2})
    train = processes.start("train", config, first=READ_SETTINGS, **local)
    assert train.wait() == 0, train.said()
    absent = run_config(model=base | {"gguf_file": "gone.gguf"})
    params = processes.start("params", absent, first=READ_SETTINGS, **local)
    params.wait()
    words = ("generate", "--adapter", tmp_path / "out", "--max-new-tokens", 2, "3 and 3 make")
    generate = processes.start(*words, first=READ_SETTINGS, **local | {"HF_HUB_OFFLINE": "1"})
    assert generate.wait() == 0, generate.said()
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == "who/packed"
    assert params.code == 3 and params.out.read_text() == ""
    assert is_problem(problem_text(params.said()), (Code.MODEL_NOT_FOUND, "who/packed", KEY))
    assert "the repository has no gone.gguf" in params.said() and params.said().count("\n") == 1


# The real model


@pytest.mark.slow
def test_training_on_the_real_model(run_config: MakeConfig, cli: Cli, tmp_path: Path) -> None:
    path = ROOT / "models" / "SmolLM2-135M-Instruct-GGUF"
    run_command([sys.executable, ROOT / "scripts" / "fetch_smollm2.py", "--gguf", path], check=True)
    base = {"name_or_path": str(path), "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf", "dtype": "auto"}
    config = run_config(model=base, training={"max_steps": 2, "learning_rate": 1e-3})
    ran = cli("params", config)
    assert ran.out.startswith("trainable params: 921,600 || all params: 135,436,608 ||"), ran.err
    ran = cli("train", config)
    assert ran.code == 0, ran.err
    ran = cli("generate", "--adapter", tmp_path / "out", "--max-new-tokens", 4, "--base", "The capital of France is")
    assert ran.code == 0, ran.err
    assert "Paris" in ran.out
    few = write_rows(tmp_path / "few.jsonl", ROWS[:4])
    ran = cli("evaluate", "--adapter", tmp_path / "out", "--data", few, "--json")
    assert ran.code == 0, ran.err
    scores = json.loads(ran.out)
    assert scores["adapter"]["loss"] < scores["base"]["loss"] - 0.1


def test_machine_and_model_are_inspected_once_per_run(
    pair: tuple[Path, Path], run_config: MakeConfig, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a copy of the file, which no other test has checked. Calls of the memory estimate for a model without
    weights do not count."""
    calls = Counter[str]()

    def counted(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def wrapped(*given: Any, **named: Any) -> Any:
            models = [value for value in given if isinstance(value, torch.nn.Module)]
            calls[name] += not any(is_fake(tensor) for model in models for tensor in model.parameters())
            return function(*given, **named)

        monkeypatch.setattr(owner, name, wrapped)

    counted(load, "check_machine")
    counted(load, "check_kernels")
    counted(source, "import_module")
    counted(acceleration, "_replace")
    counted(acceleration, "ParityCheck")
    counted(batch_check, "packing_refusal")
    base = run_config().parent / "base"
    shutil.copytree(pair[0], base)
    rows = {"validation": str(base.parent / "rows.jsonl")}
    ran = cli("train", run_config(model={"name_or_path": str(base), "gguf_file": FILE}, data=rows))
    assert ran.code == 0, ran.err
    assert calls == dict.fromkeys(
        ("check_machine", "check_kernels", "import_module", "_replace", "ParityCheck", "packing_refusal"), 1
    ), calls


def test_a_changed_file_is_checked_again(pair: tuple[Path, Path], tmp_path: Path) -> None:
    path = Path(shutil.copy(pair[0] / FILE, tmp_path))
    check(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match="cut off"):
        check(path)
