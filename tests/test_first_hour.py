"""The tables of `scripts/compare_first_hour.py`, and how outcomes are judged."""

from pathlib import Path

import pytest

from first_hour import faults, table
from first_hour.process import Ran, plain
from first_hour.tools import TOOLS

ROOT = Path(__file__).parents[1]
RESULTS = table.read(ROOT / "scripts" / "first_hour" / "results.jsonl")
GB = 10**9
INSTALLED = {
    "part": "install",
    "tool": "trl",
    "exit": 0,
    "seconds": 75.4,
    "bytes": 3 * GB,
    "torch_bytes": GB,
    "typed": 7,
}
TRAINED = {"part": "train", "tool": "trl", "exit": 0, "seconds": 100.0, "minutes": 4.0, "steps": 20, "of": 20}
SCORED = {"part": "score", "tool": "trl", "exact": 0.905, "nats": 0.1234, "divergence": 0.0506}


def cell(what: str, *results: table.Result) -> str:
    """TRL's cell of a row of the short table."""
    line = next(line for line in table.short(results).splitlines() if line.startswith(f"| {what}"))
    return line.strip("|").split("|")[1 + list(TOOLS).index("trl")].strip()


def test_the_short_table_has_the_newest_result_of_each_part() -> None:
    results = [INSTALLED | {"seconds": 1.0}, INSTALLED, TRAINED, SCORED]
    found = [cell(what, *results) for what in ("installation", "lines", "time", "exact", "loss", "KL")]
    assert found == ["1:15; 3.0 (2.0)", "7", "1:40", "90.5%", "0.12", "0.051"]
    assert cell("time", TRAINED | {"exit": -9, "seconds": 240.0, "of": 60}) == "4:00, stopped at step 20 of 60"
    assert "ten wrong" not in table.short(results) and "time" not in table.short([INSTALLED, TRAINED | {"steps": 0}])


def test_outcomes_are_counted_and_shown() -> None:
    outcome = {"part": "fault", "tool": "trl", "exit": 1, "seconds": 9.0, "last": "`x`", "note": ""}
    kinds = ["says", "says", "right", "traceback", "silent", "silent"]
    results = [outcome | {"fault": fault, "verdict": kind} for fault, kind in zip(faults.FAULTS, kinds, strict=False)]
    assert cell("ten", *results) == "3, 1, 2"
    assert "| - | says what is wrong (1; 9 s) | - |" in table.wrong_inputs(results)
    assert "- TRL: `'x'`" in table.last_lines(results)


@pytest.mark.parametrize(
    ("fault", "exit_code", "said", "expected"),
    [
        ("key", 2, "error: config.yaml:9: training.learing_rate: unknown key", "says"),
        ("key", 0, "done", "silent"),
        ("key", 0, "warning: learing_rate is not known", "says"),
        ("key", 1, "Traceback (most recent call last):\nTypeError: learing_rate", "traceback"),
        ("disk", 1, "killed", "traceback"),
    ],
)
def test_an_outcome_is_judged_by_exit_code_and_messages(fault: str, exit_code: int, said: str, expected: str) -> None:
    assert faults.verdict(fault, Ran(exit_code, 1.0, said)) == expected


def test_terminal_output_becomes_lines() -> None:
    assert plain("a\r\n\x1b[31mred\x1b[0m\n 1/2\r 2/2\r\n") == "a\nred\n 2/2\n"


def test_pages_have_the_tables_of_the_kept_results() -> None:
    for page in (ROOT / "README.md", ROOT / "scripts" / "first_hour" / "README.md"):
        text = page.read_text(encoding="utf-8")
        assert table.short(RESULTS) in text
        assert table.filled(text, RESULTS) == text
        assert table.filled(text, RESULTS[:1]) != text
