"""The experiments of `scripts/learn.py`: the names of result files, and the tables."""

from pathlib import Path

import learn
import pytest

from learning import experiments, tables


def test_names_of_existing_results_are_stable() -> None:
    first = next(experiments.EXPERIMENTS["rate"]())
    lower = next(experiments.EXPERIMENTS["lower"]())
    assert [learn.name_of(first), learn.name_of(lower)] == ["b5f51644be28", "8b66bed23d02"]


def test_run_config_sets_every_value_explicitly(tmp_path: Path) -> None:
    paths = {"train": tmp_path / "train.jsonl", "validation": tmp_path / "validation.jsonl"}
    one = next(experiments.EXPERIMENTS["best"]())
    config = learn.config_of(one, paths, tmp_path, tmp_path / "out")
    assert config["data"] == {"train": str(paths["train"]), "validation": str(paths["validation"])}
    assert config["training"]["learning_rate"] == 2.6e-3
    assert config["training"].keys() >= {"num_train_epochs", "warmup_steps", "lr_scheduler_type"}


def result(rate: float, loss: float, seed: int = 1) -> dict[str, object]:
    """A result of the learning-rate experiment."""
    settings = {"training.learning_rate": rate}
    return {
        "name": "x",
        "model": "135M",
        "task": "mail",
        "rows": 9,
        "seed": seed,
        "settings": settings,
        "rows_loss": loss,
    }


def test_rates_have_their_regret_against_the_best() -> None:
    found = tables.rates([result(1e-3, 2.0), result(1e-2, 1.0)])
    assert "| 135M | mail (9) |  | 2.0000 (+100.0%) | **1.0000** |" in found


@pytest.mark.parametrize(
    ("worse", "verdict"), [(0.5, "| 1 | 0 | 0 |"), (-0.5, "| 0 | 1 | 0 |"), (0.0, "| 0 | 0 | 1 |")]
)
def test_peers_table_derives_the_verdict_from_the_interval(worse: float, verdict: str) -> None:
    rows = [1.0 + 0.1 * (number % 3) for number in range(60)]
    common = {
        "model": "135M",
        "task": "mail",
        "rows": 9,
        "minutes": 3.0,
        "seed": 1,
        "variant": "scaled",
        "seconds": 1.0,
    }
    losses = {"loratune": rows, "trl": [one + worse + 0.01 * (number % 2) * (-1) ** (number // 2)
                                        for number, one in enumerate(rows)]}  # fmt: skip
    results = [
        common
        | {"contestant": name, "steps": 1, "rows_loss": sum(nats) / 60, "text_loss": 3.0}
        | {"rows_nats": learn.packed(nats), "rows_tokens": learn.packed([1.0] * 60)}
        for name, nats in losses.items()
    ]
    assert f"| trl, scaled {verdict}" in tables.peers(results, [])
