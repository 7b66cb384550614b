"""Several adapters on one base: each row is answered by its own adapter, and a mixture is exactly the weighted sum."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import PLAIN, Ran, check_refused, meanings, tiny_llama, write_rows
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from loratune import kernels
from loratune.adapter import generation, loading
from loratune.adapter.directory import AdapterDirectory
from loratune.cli import app
from loratune.codes import Code
from loratune.errors import AdapterError
from loratune.kernels import Adapted, RowsMixedError
from loratune.kernels.lora_linear import InferenceLinear
from loratune.lora import attach, merging
from loratune.lora.adapter_files import inspect

pytestmark = pytest.mark.usefixtures("untraced_module")

Cli = Callable[..., Ran]
NEW = 8
PROMPTS = ["go:", "a much longer question, with more tokens:", "x", "Übermut\nand tabs:"]
OTHER_TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
FRAMES = {
    "chat": "<|user|>{}<|end|>\n<|assistant|>",
    "terse": "[user] {}<|endoftext|>[assistant] ",
    "raw": "{}",
    "ranks": "{}",
    "dora": "{}",
    "head": "{}",
}


def train(path: Path, base: Path, rows: list[dict[str, Any]], **data: Any) -> Path:
    path.mkdir()
    values = {
        "model": {"name_or_path": str(base), "dtype": "float32"},
        **PLAIN,
        "data": {"train": str(write_rows(path / "rows.jsonl", rows)), **data},
        "training": {"learning_rate": 2e-2, "max_steps": 12},
        "output_dir": str(path / "adapter"),
    }
    (path / "run.yaml").write_text(yaml.safe_dump(values))
    ran = CliRunner().invoke(app, ["train", str(path / "run.yaml"), "--allow-worse"])
    assert ran.exit_code == 0, ran.stderr
    return path / "adapter"


def make(path: Path, base: Path, seed: int, **lora: Any) -> Path:
    """An adapter made by stock PEFT, with random weights and no record."""
    settings = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"]} | lora
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(**settings))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name or "trainable_tokens_delta" in name:
            nn.init.normal_(parameter, std=0.3)
        elif name.endswith("bias") and parameter.requires_grad:
            nn.init.normal_(parameter)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path) -> dict[str, Path]:
    """Three trained adapters with different templates and answer endings, and three made by stock PEFT."""
    place = tmp_path_factory.mktemp("adapters")
    template = place / "terse.jinja"
    template.write_text(OTHER_TEMPLATE)
    asked, answers = [f"{number}:" for number in range(12)], ["yes", "no", "ox"] * 4

    def chats(order: int) -> list[dict[str, Any]]:
        return [
            {"messages": [{"role": "user", "content": one}, {"role": "assistant", "content": other}]}
            for one, other in zip(asked, answers[::order], strict=True)
        ]

    plain = [{"prompt": one, "completion": other} for one, other in zip(asked, answers[1:] + answers[:1], strict=True)]
    ranks = {"use_rslora": True, "rank_pattern": {"o_proj": 7}, "alpha_pattern": {"layers.1.self_attn.q_proj": 3}}
    return {
        "chat": train(place / "chat", tiny_dir, chats(1)),
        "terse": train(place / "terse", tiny_dir, chats(-1), chat_template=str(template)),
        "raw": train(place / "raw", tiny_dir, plain),
        "ranks": make(place / "ranks", tiny_dir, 1, target_modules=["q_proj", "o_proj", "down_proj"], **ranks),
        "dora": make(place / "dora", tiny_dir, 2, use_dora=True),
        "head": make(place / "head", tiny_dir, 3, modules_to_save=["lm_head"]),
    }


def options(adapters: dict[str, Path], *names: str) -> list[str]:
    return [word for name in names for word in ("--adapter", f"{name}={adapters[name]}")]


def opened(adapters: dict[str, Path], *names: str) -> list[generation.LoadedAdapter]:
    return loading.load_all([AdapterDirectory.open(adapters[name]) for name in names])


class Stock:
    """Base and adapter in stock transformers and PEFT, one prompt at a time, without padding or a cache."""

    def __init__(self, name: str, adapter: Path, base: Path):
        source = adapter if (adapter / "tokenizer_config.json").is_file() else base
        self.tokenizer, self.frame = AutoTokenizer.from_pretrained(source), FRAMES[name]
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        self.model = PeftModel.from_pretrained(model, str(adapter)).eval()
        self.ends = self.tokenizer.convert_tokens_to_ids(
            ["<|endoftext|>"] if name == "terse" else ["<|endoftext|>", "<|end|>"]
        )

    @torch.no_grad()
    def answer(self, prompt: str, new: int = NEW) -> str:
        ids = self.tokenizer(self.frame.format(prompt)).input_ids
        start = len(ids)
        while len(ids) < start + new and (len(ids) == start or ids[-1] not in self.ends):
            ids = [*ids, int(self.model(torch.tensor([ids])).logits[0, -1].argmax())]
        return str(self.tokenizer.decode(ids[start:], skip_special_tokens=True))


@pytest.mark.parametrize("names", [("chat", "raw", "ranks"), ("terse", "chat", "dora", "ranks", "head", "raw")])
def test_each_row_is_answered_by_its_own_adapter(
    cli: Cli, adapters: dict[str, Path], tiny_dir: Path, tmp_path: Path, names: tuple[str, ...]
) -> None:
    """Interleaved rows match what stock PEFT answers for each adapter alone; base answers match the base alone."""
    rows = [{"prompt": prompt, "adapter": name} for prompt in PROMPTS for name in names]
    rows += [{"prompt": "nobody's:"}, {"prompt": "null:", "adapter": None}]
    out = tmp_path / "answers.jsonl"
    source = write_rows(tmp_path / "asked.jsonl", rows)
    ran = cli(
        "generate", *options(adapters, *names), "--input", source, "--output", out, "--max-new-tokens", NEW, "--base"
    )
    assert (ran.code, ran.out) == (0, ""), ran.err
    stock = {name: Stock(name, adapters[name], tiny_dir) for name in names}
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    expected = [stock[row.get("adapter") or names[0]].answer(row["prompt"]) for row in rows]
    assert [answer["completion"] for answer in answers] == expected
    assert len({*expected}) > len(names)
    for name, one in stock.items():
        with one.model.disable_adapter():
            of_base = [answer["base"] for answer in answers if answer.get("adapter") == name]
            assert of_base == [one.answer(prompt) for prompt in PROMPTS]


def test_rows_of_plain_adapters_share_a_batch(adapters: dict[str, Path]) -> None:
    """The logits match those of each adapter alone up to rounding. Adapters that are not plain LoRA are excluded."""
    names = ("chat", "raw", "ranks", "dora", "head")
    loaded = opened(adapters, *names)
    assert [adapter.mixes for adapter in loaded] == [True, True, True, False, False]
    rows = [0, 2, 1, 1, 2, 0]
    ids = torch.arange(40, 40 + 6 * 9).view(6, 9)
    model: Any = loaded[0].model
    with torch.inference_mode():
        with generation.adapters_of_rows([loaded[row] for row in rows]):
            together = model(input_ids=ids).logits
        for number, row in enumerate(rows):
            with generation.adapters_of_rows([loaded[row]]):
                assert torch.allclose(together[number], model(input_ids=ids[number : number + 1]).logits[0], atol=1e-5)
        assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_plain_adapters_need_one_generate_call(adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """One batch for all plain adapters, and one for each other adapter."""
    loaded = opened(adapters, "chat", "raw", "ranks", "dora")
    assert not any(adapter.prompts.mixes_padding for adapter in loaded)  # found by calls that are not counted
    sizes: list[int] = []
    generate = loaded[0].model.generate

    def counted(**keywords: Any) -> Any:
        sizes.append(len(keywords["input_ids"]))
        return generate(**keywords)

    monkeypatch.setattr(loaded[0].model, "generate", counted)
    generation.complete([(adapter, [50 + place, 51, 52]) for place, adapter in enumerate(loaded * 2)], 2)
    assert sizes == [6, 2]


def test_switching_adapters_leaves_no_state_behind(adapters: dict[str, Path]) -> None:
    loaded = opened(adapters, "chat", "head", "dora", "ranks")
    ids = torch.arange(40, 60)[None]

    def logits(adapter: generation.LoadedAdapter) -> Tensor:
        with torch.inference_mode(), generation.adapters_of_rows([adapter]):
            result: Tensor = adapter.model(input_ids=ids).logits
            return result

    first = [logits(adapter) for adapter in loaded]
    for before in range(len(loaded)):
        for after in range(len(loaded)):
            assert torch.equal(logits(loaded[before]), first[before])
            assert torch.equal(logits(loaded[after]), first[after])
    for adapter, name in zip(loaded, ("chat", "head", "dora", "ranks"), strict=True):
        info = AdapterDirectory.open(adapters[name])
        alone = loading.load(replace(info, base=info.base.model_copy(update={"dtype": "float32"})))
        assert torch.equal(logits(alone), logits(adapter))
        with adapter.without_adapter():
            bare = logits(adapter)
        with torch.inference_mode():
            assert torch.equal(bare, tiny_llama().eval()(input_ids=ids).logits)


def test_rows_are_isolated_from_other_adapters() -> None:
    """Even if another adapter has non-finite weights."""
    torch.manual_seed(0)
    layer = nn.Linear(8, 6)
    good, bad = (
        Adapted(layer, nn.Parameter(torch.randn(3, 8)), nn.Parameter(torch.randn(6, 3)), 2.0) for _ in range(2)
    )
    assert bad.down is not None
    bad.down.data[0] = torch.inf
    x = torch.rand(2, 4, 8) + 0.1
    with torch.inference_mode():
        mixed = InferenceLinear(layer, [good, bad, Adapted(layer)], rows=[0, 2])(x)
        assert torch.allclose(mixed[0], InferenceLinear(layer, [good])(x[0]), atol=1e-6)
        assert torch.allclose(mixed[1], layer(x[1]), atol=1e-6)
        assert not InferenceLinear(layer, [good, bad], rows=[0, 1])(x)[1].isfinite().all()


def test_fast_layers_have_the_attributes_of_the_layer() -> None:
    """As PEFT's layers have: Jamba multiplies by `dt_proj.weight` itself, past the adapter."""
    layer = nn.Linear(8, 6)
    fast = InferenceLinear(layer, [Adapted(layer, nn.Parameter(torch.randn(3, 8)), nn.Parameter(torch.randn(6, 3)))])
    assert fast.weight is layer.weight and fast.bias is layer.bias and fast.out_features == 6
    assert [*fast.parameters()] == []
    with pytest.raises(AttributeError, match="nothing"):
        _ = fast.nothing


@pytest.mark.parametrize("shape", [(8,), (4, 8), (3, 4, 8), (2, 2, 4, 8)])
def test_layer_with_unexpected_batch_shape_raises_rows_mixed_error(shape: tuple[int, ...]) -> None:
    layer = nn.Linear(8, 6)
    lora = Adapted(layer, nn.Parameter(torch.randn(3, 8)), nn.Parameter(torch.randn(6, 3)))
    with torch.inference_mode(), pytest.raises(RowsMixedError):
        InferenceLinear(layer, [lora, lora], rows=[0, 1])(torch.rand(shape))


def test_models_that_flatten_rows_run_one_adapter_at_a_time(
    adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def flattened(self: Any, x: Tensor) -> Tensor:
        raise RowsMixedError("as of a router")

    with monkeypatch.context() as patch:
        patch.setattr(InferenceLinear, "forward", flattened)
        loaded = opened(adapters, "chat", "ranks")
    assert [adapter.mixes for adapter in loaded] == [False, False]
    requests = [(adapter, [50, 51, 52]) for adapter in loaded]
    assert generation.complete(requests, 4) == [adapter.complete([ids], 4)[0] for adapter, ids in requests]


def test_prompts_go_to_the_first_adapter_unless_use_names_another(cli: Cli, adapters: dict[str, Path]) -> None:
    tail = ("--max-new-tokens", NEW, *PROMPTS)
    alone = {name: cli("generate", "--adapter", adapters[name], *tail).out for name in ("chat", "raw")}
    several = ("generate", *options(adapters, "chat", "raw"))
    assert cli(*several, *tail).out == alone["chat"] != alone["raw"]
    assert cli(*several, "--use", "raw", *tail).out == alone["raw"]
    shown = cli(*several, "--use", "raw", "--base", "--max-new-tokens", 2, "a").out.splitlines()
    assert [line[:11] for line in shown] == ["a", "  base     ", "  raw      "]


def test_row_naming_an_unknown_adapter_is_refused(cli: Cli, adapters: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"prompt": "a", "adapter": name} for name in ("chat", "sql", 7, "", "base", "raw")]
    path = write_rows(tmp_path / "asked.jsonl", rows)
    ran = cli("generate", *options(adapters, "chat", "raw"), "--input", path)
    unknown = Code.USAGE_BAD_VALUE
    check_refused(ran, 4, *[(unknown, f"{path}:{line}", "adapter") for line in (2, 3, 4, 5)])
    assert ran.out == "" and ran.err.count("the adapters are chat, raw") == 4
    ran = cli("generate", *options(adapters, "chat"), "--input", path)
    check_refused(ran, 4, *[(unknown, f"{path}:{line}", "adapter") for line in (2, 3, 4, 5, 6)])
    ran = cli("generate", *options(adapters, "chat", "raw"), "--mix", "chat:1", "--input", path)
    check_refused(ran, 4, *[(unknown, f"{path}:{line}", "adapter") for line in range(1, 7)])
    ran = cli("generate", "--adapter", adapters["chat"], "--input", path, "--max-new-tokens", 1)
    assert (ran.code, ran.err) == (0, "")  # the only adapter is unnamed, and `adapter` is an ordinary field of the row


NAME, TWICE, MIX = Code.USAGE_BAD_VALUE, Code.USAGE_BAD_VALUE, Code.USAGE_BAD_VALUE
ADAPTER = "--adapter"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([ADAPTER, "a.b={raw}"], (NAME, "", ADAPTER)),
        ([ADAPTER, "a/b={raw}"], (NAME, "", ADAPTER)),
        ([ADAPTER, "={raw}"], (NAME, "", ADAPTER)),
        ([ADAPTER, "base={raw}"], (NAME, "", ADAPTER)),
        ([ADAPTER, "mix={raw}"], (NAME, "", ADAPTER)),
        ([ADAPTER, "__base__={raw}"], (NAME, "", ADAPTER)),
        ([ADAPTER, "a,b={raw}"], (NAME, "", ADAPTER)),
        ([ADAPTER, "a:b={raw}"], (NAME, "", ADAPTER)),
        ([ADAPTER, "ä={raw}"], (NAME, "", ADAPTER)),
        ([ADAPTER, "x" * 65 + "={raw}"], (NAME, "", ADAPTER)),
        ([ADAPTER, "a="], (Code.USAGE_BAD_VALUE, "", ADAPTER)),
        ([ADAPTER, ""], (Code.USAGE_BAD_VALUE, "", ADAPTER)),
        ([ADAPTER, "a={raw}", ADAPTER, "a={chat}"], (TWICE, "{chat}", ADAPTER)),
        ([ADAPTER, "a={raw}", ADAPTER, "b={raw}/../adapter"], (TWICE, "{raw}/../adapter", ADAPTER)),
        ([ADAPTER, "{raw}", ADAPTER, "{chat}"], (NAME, "{raw}", ADAPTER)),
        ([ADAPTER, "a={raw}", ADAPTER, "{chat}"], (NAME, "{chat}", ADAPTER)),
        ([ADAPTER, "a={raw}", "--use", "b"], (NAME, "", "--use")),
        ([ADAPTER, "{raw}", "--use", ""], (NAME, "", "--use")),
        ([ADAPTER, "a={raw}", "--use", "a", "--mix", "a:1"], (Code.USAGE_CONFLICT, "", "")),
        ([ADAPTER, "a={raw}", "--mix", "b:1"], (NAME, "", "--mix")),
        ([ADAPTER, "{raw}", "--mix", ":1"], (MIX, "", "--mix")),
        ([ADAPTER, "a={raw}", "--mix", ""], (MIX, "", "--mix")),
        ([ADAPTER, "a={raw}", "--mix", "a"], (MIX, "", "--mix")),
        ([ADAPTER, "a={raw}", "--mix", "a:x"], (MIX, "", "--mix")),
        ([ADAPTER, "a={raw}", "--mix", "a:nan"], (MIX, "", "--mix")),
        ([ADAPTER, "a={raw}", "--mix", "a:inf"], (MIX, "", "--mix")),
        ([ADAPTER, "a={raw}", "--mix", "a:\u0660.\u0665"], (MIX, "", "--mix")),
        ([ADAPTER, "a={raw}", "--mix", "a:1,a:2"], (MIX, "", "--mix")),
        ([ADAPTER, "a={raw}", "--mix", "a:1,"], (MIX, "", "--mix")),
    ],
)
def test_invalid_options_are_refused(
    cli: Cli, adapters: dict[str, Path], arguments: list[str], expected: tuple[Code, str, str]
) -> None:
    code, where, key = expected
    ran = cli("generate", *(argument.format(**adapters) for argument in arguments), "prompt")
    check_refused(ran, 2, (code, where.format(**adapters), key))
    assert ran.out == ""


def test_adapter_directory_may_contain_an_equals_sign(cli: Cli, adapters: dict[str, Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(adapters["raw"], tmp_path / "lr=1e-4"))
    expected = cli("generate", "--adapter", adapters["raw"], "--max-new-tokens", 3, "a")
    assert expected.code == 0
    for value in (path, f"its-name={path}"):
        assert cli("generate", "--adapter", value, "--max-new-tokens", 3, "a") == expected


@pytest.fixture(scope="module")
def other_base(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A base of the same shape with other weights."""
    path = tmp_path_factory.mktemp("other") / "llama"
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(0.1)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_adapters_of_different_bases_are_refused_unless_forced(
    cli: Cli, adapters: dict[str, Path], other_base: Path, tmp_path: Path
) -> None:
    """Compared by fingerprint if there is one, else by name. A base that was only moved is accepted."""
    rows = [{"prompt": "a:", "completion": "b"}] * 4
    other = train(tmp_path / "trained", other_base, rows)
    unrecorded = make(tmp_path / "made", other_base, 5)
    moved = Path(shutil.copytree(adapters["raw"], tmp_path / "moved"))
    config = json.loads((moved / "adapter_config.json").read_text())
    base = Path(shutil.copytree(config["base_model_name_or_path"], tmp_path / "base"))
    (moved / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    first = ("generate", *options(adapters, "chat"), "--max-new-tokens", 2)
    refused = {other: Code.ADAPTER_MISMATCH, unrecorded: Code.ADAPTER_MISMATCH}
    for path, code in refused.items():
        for mix in ((), ("--mix", "chat:1,b:1")):
            ran = cli(*first, "--adapter", f"b={path}", *mix, "a")
            check_refused(ran, 5, (code, str(path), ""))
            assert ran.out == "" and "--force" in ran.err
            ran = cli(*first, "--adapter", f"b={path}", *mix, "--force", "a")
            assert ran.code == 0 and f"[{code}]" in ran.err
    assert cli(*first, "--adapter", f"b={moved}", "a") == cli(*first, "a")


def test_base_is_loaded_with_the_settings_of_the_first_adapter(
    cli: Cli, adapters: dict[str, Path], tmp_path: Path
) -> None:
    half = Path(shutil.copytree(adapters["raw"], tmp_path / "half"))
    (half / "run.yaml").write_text((half / "run.yaml").read_text().replace("float32", "bfloat16"))
    first = ("generate", *options(adapters, "chat"), "--max-new-tokens", 2, "a")
    ran = cli(*first, "--adapter", f"half={half}", "--force")
    assert f"{half}: was trained with model.dtype bfloat16, and the base is loaded with float32\n" in ran.err
    assert ran.out == cli(*first).out


def test_adapters_that_change_the_base_cannot_share_it(
    cli: Cli, adapters: dict[str, Path], tmp_path: Path, tokenizer: Any
) -> None:
    """Trained biases are part of the base, and an unconverted PiSSA adapter subtracts a part of it."""
    base = tmp_path / "biased"
    tiny_llama(attention_bias=True).save_pretrained(base)
    tokenizer.save_pretrained(base)
    plain = make(tmp_path / "plain", base, 6)
    biased = make(tmp_path / "bias", base, 7, bias="lora_only")
    pissa = make(tmp_path / "pissa", base, 8, init_lora_weights="pissa")
    for path in (biased, pissa):
        assert cli("generate", "--adapter", path, "--max-new-tokens", 1, "a").code == 0
        ran = cli("generate", "--adapter", f"a={plain}", "--adapter", f"b={path}", "a")
        check_refused(ran, 5, (Code.ADAPTER_UNSUPPORTED, str(path), ""))


# Mixtures


def deltas(base: Path, adapter: Path) -> dict[str, Tensor]:
    """Module → weight update, as stock PEFT computes it."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(adapter))
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}
    return {name: layer.get_delta_weight("default").detach() for name, layer in layers.items()}


WEIGHTS: Sequence[dict[str, float]] = (
    {"ranks": 1.0},
    {"chat": 0.7, "raw": 0.3},
    {"ranks": 0.5, "chat": -1.5, "raw": 2.0},
    {"raw": 0.0, "ranks": 1.0},
)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_mixture_is_the_weighted_sum_of_its_adapters(
    adapters: dict[str, Path], tiny_dir: Path, tmp_path: Path, weights: dict[str, float]
) -> None:
    """Per module in stock PEFT, with different ranks and targets, rsLoRA and patterns."""
    plain = merging.weighted_sum([(inspect(adapters[name]), weight) for name, weight in weights.items()])
    config = plain.write(tmp_path).config
    assert not config["use_rslora"] and config["lora_alpha"] == config["r"]
    assert config["alpha_pattern"] == config["rank_pattern"]
    expected: dict[str, Tensor] = {}
    for name, weight in weights.items():
        for module, delta in deltas(tiny_dir, adapters[name]).items():
            expected[module] = expected.get(module, torch.zeros_like(delta)) + weight * delta
    mixed = deltas(tiny_dir, tmp_path)
    assert mixed.keys() == expected.keys()
    assert max(float(delta.abs().max()) for delta in expected.values()) > 1e-3
    for module, delta in expected.items():
        assert torch.allclose(mixed[module], delta, rtol=1e-5, atol=1e-6), module


def test_generate_mix_matches_stock_peft_on_the_sum(
    cli: Cli, adapters: dict[str, Path], tiny_dir: Path, tmp_path: Path
) -> None:
    tail = ("--max-new-tokens", NEW, *PROMPTS)
    several = ("generate", *options(adapters, "chat", "raw", "ranks"))
    assert cli(*several, "--mix", "chat:1", *tail).out == cli("generate", "--adapter", adapters["chat"], *tail).out
    mixed = cli(*several, "--mix", "raw:-0.5, ranks:1.5", *tail)
    merging.weighted_sum([(inspect(adapters["raw"]), -0.5), (inspect(adapters["ranks"]), 1.5)]).write(tmp_path)
    stock = Stock("raw", tmp_path, tiny_dir)
    answers = "".join(f"{stock.answer(prompt)}\n" for prompt in PROMPTS)
    assert (mixed.code, mixed.out.splitlines()) == (0, answers.splitlines()), mixed.err
    shown = cli(*several, "--mix", "raw:1", "--base", "--max-new-tokens", 2, "a").out.splitlines()
    assert shown[-1].startswith("  mix      ")


def test_mixture_uses_the_chat_template_of_its_first_adapter(cli: Cli, adapters: dict[str, Path]) -> None:
    several = ("generate", *options(adapters, "chat", "raw"), "--max-new-tokens", NEW, *PROMPTS)
    first, second = cli(*several, "--mix", "chat:1,raw:0"), cli(*several, "--mix", "raw:0,chat:1")
    assert first.out == cli("generate", "--adapter", adapters["chat"], "--max-new-tokens", NEW, *PROMPTS).out
    assert f"{adapters['raw']}: was trained on raw prompts; the mixture renders prompts as its first" in first.err
    assert second.out != first.out


@pytest.mark.parametrize(
    ("lora", "key"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layer_replication": [(0, 2), (0, 2)]}, "layer_replication"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
    ],
)
def test_unsupported_adapters_cannot_be_mixed(
    adapters: dict[str, Path], tmp_path: Path, lora: dict[str, Any], key: str
) -> None:
    tiny_llama(attention_bias=True).save_pretrained(tmp_path / "base")
    path = make(tmp_path / "made", tmp_path / "base", 9, **lora)
    with pytest.raises(AdapterError) as caught:
        merging.weighted_sum([(inspect(adapters["raw"]), 1.0), (inspect(path), 1.0)])
    assert meanings(caught.value) == [(Code.ADAPTER_UNSUPPORTED, str(path / "adapter_config.json"), key)]


def test_generate_reports_adapters_that_cannot_be_mixed(cli: Cli, adapters: dict[str, Path], tmp_path: Path) -> None:
    ran = cli("generate", *options(adapters, "raw", "dora"), "--mix", "raw:1,dora:1", "a")
    check_refused(ran, 5, (Code.ADAPTER_UNSUPPORTED, str(adapters["dora"] / "adapter_config.json"), "use_dora"))
    tiny_llama(hidden_size=64).save_pretrained(tmp_path / "wide")
    wide = make(tmp_path / "made", tmp_path / "wide", 10)
    ran = cli("generate", *options(adapters, "ranks"), "--adapter", f"wide={wide}", "--mix", "ranks:1,wide:1", "a")
    check_refused(ran, 5, (Code.ADAPTER_MISMATCH, str(wide), ""))


def test_embedding_adapters_can_be_mixed(tmp_path: Path, tiny_dir: Path) -> None:
    parts = [
        make(tmp_path / str(seed), tiny_dir, seed, target_modules=["embed_tokens", "v_proj"][:seed], r=2 + seed)
        for seed in (1, 2)
    ]
    for path in parts:  # PEFT initializes embeddings with a random B and a zero A
        assert "lora_embedding_A" in " ".join(inspect(path).tensors)
    (tmp_path / "mixed").mkdir()
    merging.weighted_sum([(inspect(path), 0.5) for path in parts]).write(tmp_path / "mixed")
    one, two, mixed = (deltas(tiny_dir, path) for path in (*parts, tmp_path / "mixed"))
    for module, delta in mixed.items():
        expected = 0.5 * two[module] + (0.5 * one[module] if module in one else 0)
        assert torch.allclose(delta, expected, rtol=1e-5, atol=1e-6), module


def test_layers_of_other_adapters_act_as_base_layers() -> None:
    """Layers prepared for one adapter act as the base when adapters are disabled, in any module order."""
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False))
    model.eval()
    ids = torch.arange(40, 60)[None]
    layers = kernels.InferenceLayers(model, lambda module: attach.adapted_linear(module, "second"))
    with torch.inference_mode():
        model.set_adapter("second")
        expected = model(input_ids=ids).logits
        model.set_adapter("default")
        with layers.applied():
            assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-5)
        with model.disable_adapter(), layers.applied():
            assert torch.equal(model(input_ids=ids).logits, tiny_llama().eval()(input_ids=ids).logits)
