"""The base model: every way in which loading can fail, and the dtype of its weights."""

import json
import platform
import shutil
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from conftest import ROWS, Ran, check_refused, problem_text, tiny_llama, tree
from safetensors.torch import load_file, save_file
from transformers import (
    BartConfig,
    BertConfig,
    Blip2Config,
    CLIPConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

from loratune.adapter import loading
from loratune.adapter.directory import AdapterDirectory
from loratune.codes import Code
from loratune.config import LoraSection, ModelSection
from loratune.lora import creation
from loratune.model import load
from loratune.model.source import KEY as NAME

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 9\n"


class Hub(BaseHTTPRequestHandler):
    """Answer as huggingface.co does, with a status and an error header, or drop the connection."""

    ANSWERS = {  # noqa: RUF012
        "/who/absent": (404, "RepoNotFound"),
        "/who/private": (401, "RepoNotFound"),
        "/who/gated": (403, "GatedRepo"),
        "/who/empty": (404, "EntryNotFound"),
    }

    def do_HEAD(self) -> None:
        name = "/".join(self.path.split("/")[:3])
        if name not in self.ANSWERS:
            return
        status, code = self.ANSWERS[name]
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.end_headers()

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def cache_model(home: Path, name: str) -> None:
    """Put a model configuration into the hub cache."""
    commit, repository = "0" * 40, home / "hub" / f"models--{name.replace('/', '--')}"
    tiny_llama().config.save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)


@pytest.mark.parametrize(
    ("name", "online", "code", "text"),
    [
        ("who/absent", True, Code.MODEL_NOT_FOUND, "check the name"),
        ("who/private", True, Code.MODEL_NOT_FOUND, "check the name"),
        ("who/gated", True, Code.MODEL_GATED, "https://huggingface.co/who/gated"),
        ("who/empty", True, Code.MODEL_NOT_FOUND, "config.json"),
        ("who/hangs-up", True, Code.MODEL_HUB_UNREACHABLE, ""),
        ("no such: name", True, Code.MODEL_NOT_FOUND, ""),
        ("who/absent", False, Code.MODEL_HUB_UNREACHABLE, ""),
        ("who/cached", False, None, ""),
    ],
)
def test_hub_errors_are_distinguished(
    name: str, online: bool, code: Code | None, text: str,
    hub: str, tmp_path: Path, cli: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    template = f"{hub}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    constants = {
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_OFFLINE": not online,
        "HF_HUB_CACHE": str(tmp_path / "hub"),
    }
    for constant, value in constants.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{constant}", value)
    cache_model(tmp_path, "who/cached")
    ran = cli("params", "--model", name)
    if code is None:
        assert ran.code == 0 and ran.out.startswith("trainable params: "), ran.err
        return
    check_refused(ran, 3, (code, name, NAME))
    assert (ran.out, ran.err.count("\n")) == ("", 1) and text in ran.err


@pytest.mark.parametrize("name", ["./gone", "/gone", "~/gone", "a/b/c"])
def test_paths_are_never_looked_up_on_the_hub(name: str, cli: Callable[..., Ran]) -> None:
    ran = cli("params", "--model", name)
    check_refused(ran, 3, (Code.MODEL_NOT_FOUND, name, NAME))
    assert (ran.out, ran.err.count("\n")) == ("", 1)


def test_path_that_is_not_a_model_directory_is_refused(tmp_path: Path, cli: Callable[..., Ran]) -> None:
    for name, fix in (("model.bin", "; name its directory\n"), ("model.gguf", "set model.gguf_file: model.gguf\n")):
        file = tmp_path / "files" / name
        file.parent.mkdir(exist_ok=True)
        file.touch()
        ran = cli("params", "--model", file)
        check_refused(ran, 3, (Code.MODEL_NOT_FOUND, str(file), NAME))
        assert (ran.out, ran.err.count("\n")) == ("", 1) and ran.err.endswith(fix)
    ran = cli("params", "--model", tmp_path)
    check_refused(ran, 3, (Code.MODEL_NOT_FOUND, str(tmp_path), NAME))
    assert (ran.out, ran.err.count("\n")) == ("", 1)


def test_tilde_is_expanded_in_model_paths(
    tiny_dir: Path, cli: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tiny_dir.parent))
    assert cli("params", "--model", f"~/{tiny_dir.name}").code == 0


# Damaged model directories. Each case damages a copy of a good one and then starts training.

Damage = Callable[[Path], Any]


def configure(**values: Any) -> Damage:
    def damage(path: Path) -> None:
        known = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(known | values))

    return damage


def rewrite(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    def damage(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors", {"format": "pt"})

    return damage


def write(name: str, content: bytes) -> Damage:
    return lambda path: (path / name).write_bytes(content)


def cut(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def shards(path: Path) -> list[Path]:
    (path / "model.safetensors").unlink()
    tiny_llama().save_pretrained(path, max_shard_size="40KB")
    return sorted(path.glob("model-*.safetensors"))


def cut_shard(path: Path) -> None:
    shard = shards(path)[1]
    shard.write_bytes(shard.read_bytes()[:-100])


def pickled(path: Path) -> None:
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(LFS)


UP = "model.layers.1.mlp.up_proj.weight"
Refusal = tuple[Code, str, str]
"""Code, name of the damaged file within the model directory, and a part of the message."""

BROKEN: dict[str, tuple[Damage, Refusal]] = {
    "T5": (lambda path: T5Config(architectures=["T5ForConditionalGeneration"]).save_pretrained(path),
           (Code.MODEL_UNSUPPORTED, "", "T5ForConditionalGeneration (model type t5)")),
    "Bart": (lambda path: BartConfig(architectures=["BartForCausalLM"]).save_pretrained(path),
             (Code.MODEL_UNSUPPORTED, "", "BartForCausalLM (model type bart)")),
    "classifier": (configure(architectures=["LlamaForSequenceClassification"]),
                   (Code.MODEL_UNSUPPORTED, "", "LlamaForSequenceClassification (model type llama)")),
    "half of a pair": (lambda path: CLIPConfig(architectures=["CLIPModel"]).save_pretrained(path),
                       (Code.MODEL_UNSUPPORTED, "", "CLIPModel (model type clip)")),
    "multimodal": (lambda path: Blip2Config(architectures=["Blip2ForConditionalGeneration"]).save_pretrained(path),
                   (Code.MODEL_UNSUPPORTED, "", "Blip2ForConditionalGeneration (model type blip-2)")),
    "encoder": (lambda path: BertConfig(architectures=["BertForMaskedLM"]).save_pretrained(path),
                (Code.MODEL_UNSUPPORTED, "", "BertForMaskedLM (model type bert)")),
    "unknown type": (configure(model_type="lama"), (Code.MODEL_UNREADABLE, "", "model type `lama`")),
    "cut": (cut, (Code.MODEL_DAMAGED, "model.safetensors", "")),
    "cut shard": (cut_shard, (Code.MODEL_DAMAGED, "model-00002-of-00004.safetensors", "")),
    "empty": (write("model.safetensors", b""), (Code.MODEL_DAMAGED, "model.safetensors", "")),
    "LFS": (write("model.safetensors", LFS), (Code.MODEL_DAMAGED, "model.safetensors", "`git lfs pull`")),
    "LFS shard": (lambda path: shards(path)[1].write_bytes(LFS),
                  (Code.MODEL_DAMAGED, "model-00002-of-00004.safetensors", "")),
    "LFS pickle": (pickled, (Code.MODEL_DAMAGED, "pytorch_model.bin", "")),
    "no shard": (lambda path: shards(path)[1].unlink(),
                 (Code.MODEL_UNREADABLE, "", "model-00002-of-00004.safetensors")),
    "no weights": (lambda path: (path / "model.safetensors").unlink(),
                   (Code.MODEL_UNREADABLE, "", "no file named model.safetensors")),
    "missing tensor": (rewrite(lambda found: found.pop(UP)),
                       (Code.MODEL_DAMAGED, "", f"lack 1 tensors of the model, among them {UP}")),
    "more layers": (configure(num_hidden_layers=3),
                    (Code.MODEL_DAMAGED, "", "lack 9 tensors of the model, among them model.layers.2.")),
    "fewer layers": (configure(num_hidden_layers=1),
                (Code.MODEL_DAMAGED, "",
                 "hold 9 tensors more than config.json asks for, among them model.layers.1.input_layernorm.weight")),
    "a bias": (rewrite(lambda found: found.update({UP.replace("weight", "bias"): torch.zeros(64)})),
               (Code.MODEL_DAMAGED, "",
                "hold 1 tensors more than config.json asks for, among them model.layers.1.mlp.up_proj.bias")),
    "other shape": (rewrite(lambda found: found.update({UP: torch.ones(64, 33)})),
                (Code.MODEL_DAMAGED, "",
                 f"1 tensors have another shape than config.json asks for, among them {UP} (64, 33) for (64, 32)")),
    "no JSON": (write("config.json", b'{"a": '), (Code.MODEL_UNREADABLE, "", "")),
    "wrong value": (configure(num_hidden_layers="two"),
                    (Code.MODEL_UNREADABLE, "", "expected int, got str (value: 'two')")),
    "no heads": (configure(num_attention_heads=0), (Code.MODEL_UNREADABLE, "", "")),
    "tokenizer": (write("tokenizer.json", b'{"a'), (Code.MODEL_UNREADABLE, "", "")),
    "no tokenizer": (lambda path: [file.unlink() for file in path.glob("tokenizer*")],
                     (Code.MODEL_UNREADABLE, "", "")),
}  # fmt: skip


@pytest.fixture
def copy(tiny_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_dir, tmp_path / "model"))


@pytest.mark.parametrize("kind", BROKEN)
def test_damaged_models_are_refused(
    kind: str, copy: Path, tmp_path: Path, cli: Callable[..., Ran], run_config: Callable[..., Path]
) -> None:
    damage, (code, file, text) = BROKEN[kind]
    damage(copy)
    path = run_config(model={"name_or_path": str(copy)})
    before = tree(tmp_path)
    ran = cli("train", path)
    check_refused(ran, 3, (code, str(copy / file), ""))
    assert (ran.out, ran.err.count("\n")) == ("", 1)
    assert text in ran.err
    assert tree(tmp_path) == before


def test_harmless_extra_tensors_are_ignored(copy: Path) -> None:
    """Buffers of older versions, the head of another task, and a multi-token-prediction layer."""
    whole = load.load_base(ModelSection(name_or_path=str(copy), dtype="float32"))
    names = ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.0.self_attn.masked_bias", "score.weight")
    rewrite(lambda found: found.update({name: torch.ones(4) for name in names}))(copy)
    base = load.load_base(ModelSection(name_or_path=str(copy), dtype="float32"))
    assert torch.equal(base(torch.arange(9)[None]).logits, whole(torch.arange(9)[None]).logits)
    configure(num_hidden_layers=1, num_nextn_predict_layers=1)(copy)
    assert len(load.load_base(ModelSection(name_or_path=str(copy))).model.layers) == 1


@pytest.mark.parametrize("command", ["train", "params"])
def test_repository_code_is_not_run(
    command: str, copy: Path, tmp_path: Path, cli: Callable[..., Ran], run_config: Callable[..., Path]
) -> None:
    marker = tmp_path / "executed"
    classes = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model", "AutoTokenizer": [None, "code.T"]}
    configure(model_type="strange", auto_map=classes)(copy)
    (copy / "code.py").write_text(f"open({str(marker)!r}, 'w')\n")
    ran = cli(command, run_config(model={"name_or_path": str(copy)}))
    check_refused(ran, 3, (Code.MODEL_FOREIGN_CODE, str(copy), ""))
    assert ran.out == "" and "model.trust_remote_code: true and model.revision" in ran.err
    assert not marker.exists()


def test_repository_code_runs_with_trust_remote_code(
    copy: Path,
    tmp_path: Path,
    cli: Callable[..., Ran],
    run_config: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    marker = tmp_path / "executed"
    configure(model_type="strange", auto_map={"AutoConfig": "strange.Config"})(copy)
    (copy / "strange.py").write_text(
        f"from transformers import LlamaConfig\nopen({str(marker)!r}, 'w')\n"
        "class Config(LlamaConfig):\n    model_type = 'strange'\n"
    )
    trusted = {"name_or_path": str(copy), "trust_remote_code": True, "revision": "main"}
    ran = cli("params", run_config(model=trusted))
    assert marker.exists()
    check_refused(ran, 3, (Code.MODEL_UNREADABLE, str(copy), ""))  # the configuration has no model class
    assert ran.out == "" and "Unrecognized configuration class" in ran.err


GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 32, "n_head": 4, "n_layer": 2}
MAMBA = {"model_type": "mamba", "architectures": ["MambaForCausalLM"], "hidden_size": 32, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("shape", "wanted", "message", "candidate"),
    [
        (MAMBA, ["q"], "mamba has no attention in which roles (q, k, v, o) could be found", "mixer.in_proj ×2"),  # noqa: RUF001
        (GPT2, ["q", "up_proj"], "`up_proj` matches no module of gpt2", "nearest: c_proj"),
    ],
)
def test_unmatched_targets_list_candidates(
    shape: dict[str, Any],
    wanted: list[str],
    message: str,
    candidate: str,
    tmp_path: Path,
    cli: Callable[..., Ran],
    run_config: Callable[..., Path],
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(shape))
    ran = cli("params", run_config(model={"name_or_path": str(tmp_path)}, lora={"target_modules": wanted}))
    assert (ran.code, ran.out) == (3, "")
    assert problem_text(ran.err).startswith(f"lora.target_modules: {message}")
    assert candidate in ran.err


def test_model_without_a_pad_token_trains(
    tokenizer: PreTrainedTokenizerFast, cli: Callable[..., Ran], run_config: Callable[..., Path], tmp_path: Path
) -> None:
    assert tokenizer.pad_token_id is None
    assert (
        len({len(tokenizer(row["prompt"]).input_ids) for row in ROWS[:8]})
        == 1
        < len({len(tokenizer(row["prompt"]).input_ids) for row in ROWS})
    )  # the rows differ in length, so batches are padded
    ran = cli("train", run_config(training={"max_steps": 2}))
    assert ran.code == 0, ran.err
    opened = loading.load(AdapterDirectory.open(tmp_path / "out"))
    assert (opened.model.config.vocab_size, len(opened.tokenizer)) == (264, len(tokenizer))
    assert opened.model.get_input_embeddings().weight.shape[0] == 264
    assert opened.tokenizer.pad_token_id is None
    assert load.pad_id(opened.tokenizer) == tokenizer.eos_token_id


@pytest.mark.skipif(torch.cuda.is_available() or platform.machine() != "x86_64", reason="reads the flags of an x86 CPU")
def test_auto_dtype_is_bfloat16_if_the_cpu_supports_it(tiny_dir: Path) -> None:
    has_it = "avx512_bf16" in Path("/proc/cpuinfo").read_text().split()
    expected = torch.bfloat16 if has_it else torch.float32
    base = load.load_base(ModelSection(name_or_path=str(tiny_dir)))
    assert {parameter.dtype for parameter in base.parameters()} == {expected}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_applies_to_frozen_weights_only(dtype: str, tiny_dir: Path) -> None:
    base = load.load_base(ModelSection(name_or_path=str(tiny_dir), dtype=dtype))
    tuned = creation.attach(base, LoraSection(), {"target_modules": ["q_proj"]}, seed=0)
    held = {parameter.dtype for parameter in tuned.parameters() if not parameter.requires_grad}
    assert held == {getattr(torch, dtype)}
    assert {parameter.dtype for parameter in tuned.parameters() if parameter.requires_grad} == {torch.float32}


def test_tied_weights_are_not_reported_missing(tmp_path: Path) -> None:
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    assert not any("lm_head" in name for name in load_file(tmp_path / "model.safetensors"))
    base = load.load_base(ModelSection(name_or_path=str(tmp_path)))
    assert base.get_output_embeddings().weight is base.get_input_embeddings().weight


def test_context_length_is_read_from_known_keys() -> None:
    assert load.context_length(LlamaConfig(max_position_embeddings=77)) == 77
    assert load.context_length(load.AutoConfig.for_model("gpt2", n_positions=88)) == 88
    assert load.context_length(load.AutoConfig.for_model("bloom")) is None
