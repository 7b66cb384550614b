"""`training.adapter_scale`: a trained update is multiplied by a number, given or chosen on the validation rows."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import ROWS, Ran, check_refused, config_in, tree, write_rows
from fork_server import ForkServer
from peft import PeftModel
from running import WEIGHTS, Cli, MakeConfig, checkpoints, stopped
from safetensors.torch import load_file
from test_distributed import finished, sharded, trained
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

import loratune
from loratune.codes import Code
from loratune.compare import gain
from loratune.compare.metrics import RowLosses
from loratune.data import TokenizedDataset
from loratune.data.rendering.spans import TokenizedRow
from loratune.statistics import mean_ratio_interval
from loratune.training import scale, time_budget
from loratune.training.checkpoints.store import MANIFEST, RUN, seal

pytestmark = pytest.mark.usefixtures("untraced_module")

KEY = "training.adapter_scale"
HELD_OUT = [{"prompt": f"{number} and {number} make", "completion": f" {2 * number + 1}"} for number in range(40, 70)]
OVERTRAINED = {"learning_rate": 0.02, "max_steps": 24, "eval_steps": 12}
"""With all linear layers, a weaker update is then better on the held-out rows, down to about three quarters."""


def made(folder: Path, model: Path, name: str, **training: Any) -> Path:
    held_out = write_rows(folder / "held-out.jsonl", HELD_OUT)
    return config_in(folder, model)(
        f"{name}.yaml", lora={"target_modules": "all-linear"}, data={"validation": str(held_out)},
        training=OVERTRAINED | training, output_dir=str(folder / name),
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path, cli: Cli) -> tuple[dict[str, Path], dict[str, Ran]]:
    """The same run with its own update, with half of it, and with a chosen part."""
    folder = tmp_path_factory.mktemp("scales")
    settings: dict[str, Any] = {"whole": {}, "half": {"adapter_scale": 0.5}, "chosen": {"adapter_scale": "auto"}}
    done = {name: cli("train", made(folder, tiny_dir, name, **changes)) for name, changes in settings.items()}
    assert [ran.code for ran in done.values()] == [0, 0, 0], done
    return {name: folder / name for name in settings}, done


def metrics_of(adapter: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((adapter / "loratune.json").read_text())["metrics"]
    return found


def check_scaled(adapter: Path, whole: Path, factor: float) -> None:
    """Every B is that of the other adapter times the factor, bit by bit, and all else is equal."""
    found, expected = load_file(adapter / WEIGHTS), load_file(whole / WEIGHTS)
    assert found.keys() == expected.keys()
    changed = [name for name in found if "lora_B" in name or "lora_embedding_B" in name]
    assert len(changed) == len(found) / 2
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor * factor if name in changed else tensor), name
    configs = [json.loads((path / "adapter_config.json").read_text()) for path in (adapter, whole)]
    assert configs[0] == configs[1]


def stock_losses(adapter: Path, model: Path, factor: float) -> tuple[list[float], list[int]]:
    """Nats and supervised tokens of each held-out row in stock PEFT, one row at a time."""
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter).eval()
    for module in stock.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] *= factor
    nats, counts, tokenizer = list[float](), list[int](), AutoTokenizer.from_pretrained(model)
    for row in HELD_OUT:
        given, answer = tokenizer(row["prompt"]).input_ids, [*tokenizer(row["completion"]).input_ids, 256]
        with torch.no_grad():
            logits = stock(torch.tensor([given + answer])).logits[0, len(given) - 1 : -1].double()
        nats.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum")))
        counts.append(len(answer))
    return nats, counts


Runs = tuple[dict[str, Path], dict[str, Ran]]


def test_the_choice_is_that_of_stock_peft(runs: Runs, tiny_dir: Path) -> None:
    adapters, done = runs
    whole, counts = stock_losses(adapters["whole"], tiny_dir, 1)
    base, tokens = stock_losses(adapters["whole"], tiny_dir, 0)[0], sum(counts)
    gained, expected = (sum(base) - sum(whole)) / tokens, 1.0
    losses = {1.0: sum(whole) / tokens}
    for factor in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3):
        nats, _ = stock_losses(adapters["whole"], tiny_dir, factor)
        losses[factor] = sum(nats) / tokens
        interval = mean_ratio_interval(np.subtract(nats, whole), np.array(counts, np.float64))
        assert interval is not None
        if interval.high > 0.01 * gained:
            break
        expected = factor
    found = metrics_of(adapters["chosen"])
    assert 0.3 < expected < 1 and found["adapter_scale"] == expected
    evidence = found["adapter_scale_choice"]
    assert evidence["rows"] == len(HELD_OUT) and evidence["gain"] == pytest.approx(gained, abs=1e-4)
    assert {one["scale"]: one["loss"] for one in evidence["tried"]} | {1.0: evidence["loss"]} == pytest.approx(losses)
    assert found["held_out_loss"] == pytest.approx(losses[expected], abs=1e-5)
    line = (
        f"{expected:g}: the loss on 30 validation rows is {losses[expected]:.4f} instead of {losses[1.0]:.4f} (upper "
        "bound of the difference "
    )
    assert f"adapter scale: {line}" in done["chosen"].err and line in done["chosen"].out
    assert f"- **Adapter scale:** {line}" in (adapters["chosen"] / "README.md").read_text()


def test_b_is_multiplied_and_everything_is_measured_after_that(runs: Runs, cli: Cli, tmp_path: Path) -> None:
    adapters, done = runs
    whole, factor = adapters["whole"], metrics_of(adapters["chosen"])["adapter_scale"]
    for name, scaled_by in {"half": 0.5, "chosen": factor}.items():
        check_scaled(adapters[name], whole, scaled_by)
        found, before = metrics_of(adapters[name]), metrics_of(whole)
        rows = tmp_path / "rows.jsonl"
        write_rows(rows, HELD_OUT)
        asked = ("evaluate", "--data", rows, "--json", "--adapter")
        measured = json.loads(cli(*asked, adapters[name]).out)["adapter"]["loss"]
        assert found["held_out_loss"] == pytest.approx(measured, abs=1e-6)
        assert found["gain"]["adapter"] == pytest.approx(measured, abs=1e-6)
        at = json.loads(cli(*asked, whole, "--adapter-scale", scaled_by).out)["adapter"]["loss"]
        assert measured == pytest.approx(at, rel=1e-5) and abs(measured - before["held_out_loss"]) > 1e-5
        for key in ("first_loss", "last_loss", "best_held_out_loss", "last_held_out_loss", "kept_step"):
            assert found[key] == before[key], key
        low, high = found["held_out_interval"]
        assert low < found["held_out_loss"] < high
        text = f"at adapter scale {scaled_by:g}; before scaling {before['held_out_loss']:.4f} at step"
        card = (adapters[name] / "README.md").read_text()
        assert f"{text} {found['kept_step']}, kept: the lowest of 2 evaluations" in card
    assert "adapter scale 0.5: as training.adapter_scale sets it" in " ".join(done["half"].out.split())
    assert "adapter_scale" not in metrics_of(whole) and "adapter scale" not in done["whole"].err + done["whole"].out


def test_run_yaml_repeats_the_run_and_its_choice(runs: Runs, cli: Cli, tmp_path: Path) -> None:
    chosen = runs[0]["chosen"]
    assert yaml.safe_load((chosen / "run.yaml").read_text())["training"]["adapter_scale"] == "auto"
    assert cli("train", chosen / "run.yaml", "--set", f"output_dir={tmp_path / 'again'}").code == 0
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (chosen / WEIGHTS).read_bytes()


@pytest.mark.parametrize("scale", [0, 1e-30])
def test_an_adapter_that_is_its_base_is_refused(scale: float, cli: Cli, run_config: MakeConfig) -> None:
    ran = cli("train", config := run_config(training={"adapter_scale": scale}))
    line = next(number for number, text in enumerate(config.read_text().splitlines(), 1) if "adapter_scale" in text)
    check_refused(ran, 2, (Code.CONFIG_BAD_VALUE, f"{config}:{line}", KEY))
    ran = cli("train", run_config(training={"max_steps": 4, "learning_rate": 1e-30, "adapter_scale": 0.5}))
    assert ran.code == 6 and f"[{Code.LORA_UNCHANGED}]" in ran.err


# The rule


def at(losses: dict[float, float], spread: float = 0.0, rows: int = 100) -> Callable[[float], RowLosses]:
    """Rows of one token whose mean loss at each scale is given; other scales must not be asked for."""
    noise = np.resize([spread, -spread], rows)
    return lambda one: RowLosses.of([losses[one] + (one != 1) * value for value in noise], [1.0] * rows)


def test_the_smallest_scale_within_a_hundredth_of_the_gain() -> None:
    losses = {0.0: 3.0, 1.0: 2.0, 0.9: 2.001, 0.8: 2.005, 0.7: 2.009, 0.6: 2.011}
    found = scale.choose(at(losses))
    assert found.value == 0.7 and [one["scale"] for one in found.evidence["tried"]] == [0.9, 0.8, 0.7, 0.6]
    assert str(found) == (
        "0.7: the loss on 100 validation rows is 2.0090 instead of 2.0000 (upper bound of the difference +0.0090, 1 % "
        "of the gain is 0.0100)"
    )
    uncertain = scale.choose(at(losses, spread=0.03))  # by 0.006 on either side
    assert uncertain.value == 0.9
    few = scale.choose(at(losses, spread=0.03, rows=10))
    assert few.value == 1 and str(few).startswith(
        "1: at 0.9 the loss on 10 validation rows is 2.0010 instead of 2.0000"
    )


def test_the_search_ends_at_the_first_scale_that_fails_or_at_the_last() -> None:
    losses = {0.0: 3.0, 1.0: 2.0} | {one: 1.9 for one in scale.SCALES}
    assert scale.choose(at(losses)).value == 0.3
    assert scale.choose(at(losses | {0.6: 2.5})).value == 0.7


@pytest.mark.parametrize(("base", "adapter"), [(2.0, 2.1), (2.0, 2.0), (2.0, math.nan), (math.inf, 2.0)])
def test_without_a_gain_the_scale_is_one(base: float, adapter: float) -> None:
    found = scale.choose(at({0.0: base, 1.0: adapter}), "pair")
    assert found.value == 1 and "there is no gain on 100 validation pairs" in str(found)
    json.dumps(found.to_dict(), allow_nan=False)


def test_too_few_rows(cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    config = run_config(data={"validation": 0.1}, training={"max_steps": 8, "adapter_scale": "auto"})
    ran = cli("train", config, "--allow-worse")
    assert ran.code == 0, ran.err
    assert "adapter scale: 1: 4 distinct validation rows are too few, 5 are needed" in ran.err
    assert metrics_of(tmp_path / "out")["adapter_scale"] == 1


class Numbered:
    """Rows of ten tokens; the first two are equal."""

    lengths, owners = np.full(500, 10), None

    def __init__(self, weights: Any = None):
        self.weights = weights

    def __len__(self) -> int:
        return 500

    def side(self, number: int) -> int:
        return 0

    def row(self, number: int) -> TokenizedRow:
        return TokenizedRow("", (max(1, number), *range(1, 10)), ((1, 10),))


def test_at_most_a_hundred_rows_are_scored() -> None:
    drawn = gain.draw(TokenizedDataset(Numbered()), scale.MOST_ROWS, range(500))  # type: ignore[arg-type]
    assert len(drawn) == 100 and drawn == gain.draw(TokenizedDataset(Numbered()), 100, range(500))  # type: ignore[arg-type]


def test_rows_count_by_their_weight() -> None:
    """As in the held-out loss; rows of weight 0 do not count."""
    drawn = gain.draw(TokenizedDataset(Numbered(np.arange(500) % 3)), 100, range(500))  # type: ignore[arg-type]
    assert drawn and all(number % 3 for number in drawn)
    heavy, light = ({count for number, count in drawn.items() if number % 3 == part} for part in (2, 1))
    assert max(heavy) == pytest.approx(2 * min(light))


def test_a_time_budget_includes_the_passes(run_config: MakeConfig) -> None:
    counts = []
    for asked in (1, 0.5, "auto"):
        config = run_config(data={"validation": 0.2}, training={"max_steps": 2, "adapter_scale": asked})
        counts.append(len([*time_budget._passes_at_the_end(loratune.plan(loratune.load_config(config)), 1000)]))
    assert [count - counts[0] for count in counts] == [0, 1, 10]


# What it works with


def embeddings(folder: Path) -> dict[str, Any]:
    return {"lora": {"target_modules": ["embed_tokens", "q_proj"]}}


def experts(folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "num_local_experts": 4, "vocab_size": 264}
    MixtralForCausalLM(MixtralConfig(bos_token_id=None, eos_token_id=256, **shape)).save_pretrained(folder / "experts")
    return {"model": {"name_or_path": str(folder / "experts")}, "lora": {"target_parameters": ["experts"]}}


def dpo(folder: Path) -> dict[str, Any]:
    pairs = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": " none"} for row in ROWS]
    rows = write_rows(folder / "pairs.jsonl", pairs)
    return {"data": {"train": str(rows)}, "training": {"objective": "dpo", "learning_rate": 0.02}}


def kto(folder: Path) -> dict[str, Any]:
    judged = [{**row, "label": number % 2 == 0} for number, row in enumerate(ROWS)]
    rows = write_rows(folder / "judged.jsonl", judged)
    return {"data": {"train": str(rows)}, "training": {"objective": "kto", "learning_rate": 0.02}}


def orthogonal(folder: Path) -> dict[str, Any]:
    return {"lora": {"init_lora_weights": "orthogonal", "use_rslora": True, "rank_pattern": {"q": 4}}}


@pytest.mark.parametrize("variant", [embeddings, experts, dpo, kto, orthogonal])
def test_what_it_works_with(
    variant: Callable[[Path], dict[str, Any]], cli: Cli, run_config: MakeConfig, tiny_dir: Path, tmp_path: Path
) -> None:
    sections = variant(tmp_path)
    if "model" in sections:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tiny_dir / name, tmp_path / "experts")
    sections["data"] = sections.get("data", {}) | {"validation": 0.3}
    sections["training"] = {"max_steps": 10, "learning_rate": 0.02} | sections.get("training", {})
    for name in ("1", "0.5", "auto"):
        chosen = sections | {"training": sections["training"] | {"adapter_scale": yaml.safe_load(name)}}
        ran = cli("train", run_config(**chosen, output_dir=str(tmp_path / name)), "--allow-worse")
        assert ran.code == 0, ran.err
    check_scaled(tmp_path / "0.5", tmp_path / "1", 0.5)
    found = metrics_of(tmp_path / "auto")
    check_scaled(tmp_path / "auto", tmp_path / "1", found["adapter_scale"])
    tried = found["adapter_scale_choice"].get("tried", [])
    assert found["adapter_scale"] in (1, *(one["scale"] for one in tried))
    if found["gain"]["unit"] != "token":
        assert f"validation {found['gain']['unit']}s" in ran.err
        gained = metrics_of(tmp_path / "1")["gain"]
        assert found["adapter_scale_choice"]["gain"] == pytest.approx(gained["better_by"], abs=1e-4)


def test_an_adapter_that_continues_another(runs: Runs, cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    """The whole update from the base is multiplied, with that of the adapter it starts from."""
    for name, asked in {"1": 1.0, "0.5": 0.5}.items():
        lora = {"target_modules": "all-linear", "start_from": str(runs[0]["whole"])}
        config = run_config(
            lora=lora, training={"max_steps": 2, "adapter_scale": asked}, output_dir=str(tmp_path / name)
        )
        assert cli("train", config, "--allow-worse").code == 0
    check_scaled(tmp_path / "0.5", tmp_path / "1", 0.5)


# What is refused


@pytest.mark.parametrize("value", ["-0.1", "2.1", ".nan", ".inf", "true", "autos", "null"])
def test_a_scale_that_is_none_is_refused(value: str, cli: Cli, run_config: MakeConfig, tmp_path: Path) -> None:
    ran = cli("train", config := run_config(data={"validation": 0.2}), "--set", f"{KEY}={value}")
    check_refused(ran, 2, (Code.CONFIG_BAD_VALUE, "--set", KEY))
    assert config.exists() and not (tmp_path / "out").exists()


def test_auto_without_validation_rows_is_refused(cli: Cli, run_config: MakeConfig) -> None:
    ran = cli("train", config := run_config(training={"adapter_scale": "auto"}))
    where = next(number for number, line in enumerate(config.read_text().splitlines(), 1) if "adapter_scale" in line)
    check_refused(ran, 2, (Code.CONFIG_CONFLICT, f"{config}:{where}", f"{KEY} and data.validation"))


@pytest.mark.parametrize("asked", ["auto", 0.5])
@pytest.mark.parametrize(
    "lora",
    [
        {"use_dora": True}, {"bias": "all"}, {"bias": "lora_only"}, {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [1]}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_product_is_refused(
    lora: dict[str, Any], asked: float | str, cli: Cli, run_config: MakeConfig
) -> None:
    sections: dict[str, Any] = {"lora": lora, "data": {"validation": 0.2}}
    config = run_config(**sections, training={"adapter_scale": asked})
    line = next(number for number, line in enumerate(config.read_text().splitlines(), 1) if "adapter_scale" in line)
    conflict = (Code.CONFIG_CONFLICT, f"{config}:{line}", f"{KEY} and lora.{next(iter(lora))}")
    check_refused(cli("train", config), 2, conflict)
    loratune.load_config(run_config(**sections, training={"adapter_scale": 1}))


# Runs that were interrupted


@pytest.fixture
def earlier(cli: Cli, run_config: MakeConfig, tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """The config of an interrupted run whose checkpoints do not know the key, and the adapter that it ends with."""
    training = {"max_steps": 12, "save_steps": 1, "learning_rate": 0.02}
    config = run_config(data={"validation": 0.2}, training=training)
    assert cli("train", config, "--set", f"output_dir={tmp_path / 'straight'}").code == 0
    assert stopped(cli, tmp_path / "out.partial", "train", config).code == 130
    for checkpoint in checkpoints(tmp_path / "out.partial"):
        record = json.loads((checkpoint / RUN).read_text())
        assert record["config"]["training"].pop("adapter_scale") == 1
        (checkpoint / RUN).write_text(json.dumps(record))
        (checkpoint / MANIFEST).unlink()
        seal(checkpoint)
    return config, tmp_path / "straight"


def test_a_run_from_before_is_resumed(earlier: tuple[Path, Path], cli: Cli, tmp_path: Path) -> None:
    config, straight = earlier
    ran = cli("train", config, "--resume")
    assert ran.code == 0, ran.err
    assert tree(tmp_path / "out")[WEIGHTS] == tree(straight)[WEIGHTS]
    assert "adapter_scale" not in metrics_of(tmp_path / "out")


def test_another_scale_of_a_resumed_run_has_to_be_allowed(earlier: tuple[Path, Path], cli: Cli, tmp_path: Path) -> None:
    config, straight = earlier
    for value in ("auto", "0.5"):
        ran = cli("train", config, "--resume", "--set", f"{KEY}={value}")
        check_refused(ran, 7, (Code.RESUME_CHANGED, "", KEY))
        assert f"allow the change with --allow-change {KEY}" in ran.err
    ran = cli("train", config, "--resume", "--set", f"{KEY}=0.5", "--allow-change", KEY)
    assert ran.code == 0, ran.err
    check_scaled(tmp_path / "out", straight, 0.5)
    assert json.loads((tmp_path / "out" / "loratune.json").read_text())["changes"][0]["key"] == KEY


def test_a_run_that_was_interrupted_makes_the_same_choice(cli: Cli, tiny_dir: Path, runs: Runs, tmp_path: Path) -> None:
    config = made(tmp_path, tiny_dir, "chosen", adapter_scale="auto", save_steps=1)
    assert stopped(cli, tmp_path / "chosen.partial", "train", config).code == 130
    ran = cli("train", config, "--resume")
    assert ran.code == 0, ran.err
    assert metrics_of(tmp_path / "chosen")["adapter_scale"] == metrics_of(runs[0]["chosen"])["adapter_scale"]
    assert (tmp_path / "chosen" / WEIGHTS).read_bytes() == (runs[0]["chosen"] / WEIGHTS).read_bytes()


# Several processes


@pytest.mark.distributed
@pytest.mark.parametrize("how", ["copied", "fsdp2"])
def test_several_processes_choose_the_same(
    how: str, processes: ForkServer, runs: Runs, tiny_dir: Path, tmp_path: Path
) -> None:
    """`copied`: each process has the whole model; `fsdp2`: a part of it, also of A and B."""
    config = made(tmp_path, tiny_dir, "run", adapter_scale="auto", per_device_train_batch_size=4)
    if how == "copied":
        found = trained(processes, config, tmp_path / "out", 2)["metrics"]
    else:
        children = sharded(processes, config, tmp_path / "out")
        assert finished(children) == [0, 0], children[0].said() + children[1].said()
        found = metrics_of(tmp_path / "out")
    expected = metrics_of(runs[0]["chosen"])
    assert found["adapter_scale"] == expected["adapter_scale"]
    assert found["held_out_loss"] == pytest.approx(expected["held_out_loss"], abs=1e-3)
    assert found["gain"]["adapter"] == pytest.approx(found["held_out_loss"], abs=1e-4)
