"""Some cases of `scripts/fuzz.py` and a short `scripts/soak.py`; both are run at length by hand."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from fuzz import PROPERTIES, Reached, fuzz, watch

ARMED: list[bool] = []


@pytest.fixture(scope="module", autouse=True)
def _watched() -> None:
    watch(ARMED)  # for good: an audit hook cannot be taken back


@pytest.mark.parametrize("cases", [30, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", PROPERTIES)
def test_every_case_ends_well(name: str, cases: int) -> None:
    ends = fuzz(name, cases, ARMED)
    assert ends["sound"] > 0 and len(ends) > 1


def test_what_reaches_out_is_seen() -> None:
    ARMED.append(True)
    try:
        with pytest.raises(Reached):
            subprocess.run(["true"], check=True)
    finally:
        ARMED.clear()


@pytest.mark.parametrize(("kills", "steps"), [(3, 30), pytest.param(8, 60, marks=pytest.mark.slow)])
def test_a_short_soak(kills: int, steps: int, smollm2: Path) -> None:
    command = [sys.executable, ROOT / "scripts" / "soak.py", "--kills", str(kills), "--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "lost                   0" in done.stdout
