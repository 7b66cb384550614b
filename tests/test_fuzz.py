"""Some cases of `scripts/fuzz.py` and a short run of `scripts/soak.py`; both are run at length by hand."""

import sys
from pathlib import Path

import pytest
from conftest import ROOT, mainly, run_command
from fuzz import PROPERTIES, ForbiddenCall, fuzz, install_audit_hook

ARMED: list[bool] = []


@pytest.fixture(scope="module", autouse=True)
def _audit_hook() -> None:
    install_audit_hook(ARMED)  # for the rest of the process: an audit hook cannot be removed


@pytest.mark.parametrize("cases", mainly([25], [25, 60, 100]))
@pytest.mark.parametrize("name", PROPERTIES)
def test_every_case_ends_with_success_or_a_documented_error(name: str, cases: int) -> None:
    ends = fuzz(name, cases, ARMED)
    assert ends["valid"] > 0 and len(ends) > 1


def test_forbidden_calls_are_detected() -> None:
    ARMED.append(True)
    try:
        with pytest.raises(ForbiddenCall):
            run_command(["true"], check=True)
    finally:
        ARMED.clear()


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "steps"), [(3, 30), (8, 60)])
def test_a_short_soak(kills: int, steps: int, smollm2: Path) -> None:
    command = [sys.executable, ROOT / "scripts" / "soak.py", "--kills", str(kills), "--steps", str(steps)]
    done = run_command(command, timeout=1000, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "lost                   0" in done.stdout
