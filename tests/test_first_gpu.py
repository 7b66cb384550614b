"""`scripts/gpu.sh`: parcels for a machine without a network, and parts that do not stop each other."""

import base64
import csv
import hashlib
import json
import os
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, run_command

from first_gpu import pack, parts, run

SCRIPT = ROOT / "scripts" / "gpu.sh"


def wheel(directory: Path, name: str, version: str, files: dict[str, bytes]) -> Path:
    info = f"{name}-{version}.dist-info"
    about = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}-{version}-py3-none-any.whl"
    pack.write_wheel(path, files | about)
    return path


# --- parcels


def test_a_reduced_wheel_has_one_library_for_gpus_and_a_correct_record(tmp_path: Path) -> None:
    libraries = {f"bitsandbytes/libbitsandbytes_{name}.so": name.encode() for name in ("cpu", "cuda128", "cuda130")}
    whole = wheel(tmp_path / "whole", "bitsandbytes", "0.50.2", {"bitsandbytes/__init__.py": b"x = 1\n", **libraries})
    (tmp_path / "new").mkdir()
    with zipfile.ZipFile(pack.reduce_bitsandbytes(whole, "130", tmp_path / "new")) as archive:
        names = {*archive.namelist()}
        record = {
            row[0]: row[1:]
            for row in csv.reader(archive.read("bitsandbytes-0.50.2.dist-info/RECORD").decode().splitlines())
        }
        for name in names:
            content = archive.read(name)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            own = name.endswith("/RECORD")
            assert record.pop(name) == (["", ""] if own else [f"sha256={digest}", str(len(content))])
    assert not record and {name for name in names if name.endswith(".so")} == {
        "bitsandbytes/libbitsandbytes_cpu.so", "bitsandbytes/libbitsandbytes_cuda130.so"
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"has no libbitsandbytes_cuda140\.so, only libbitsandbytes_cpu\.so"):
        pack.reduce_bitsandbytes(whole, "140", tmp_path / "new")


def test_a_parcel_holds_at_most_60_mib(tmp_path: Path) -> None:
    new = tmp_path / "new"
    new.mkdir()
    sizes = (40, 35, 25, 20, 20, 10, 1)
    for number, size in enumerate(sizes):
        os.truncate(os.open(new / f"{number}.whl", os.O_CREAT | os.O_WRONLY), size << 20)
    (new / "model.whl").write_bytes(os.urandom(1 << 20) * 50)
    whole = hashlib.sha256((new / "model.whl").read_bytes()).digest()
    made = [
        *pack.fill(tmp_path, "wheels", new.glob("?.whl")),
        *pack.fill(tmp_path, "model", pack.split(new / "model.whl")),
    ]
    held = [sum(path.stat().st_size for path in parcel.iterdir()) for parcel in made]
    assert max(held) <= 60 << 20 and sum(held) == sum(sizes) + 50 << 20
    assert [parcel.name for parcel in made] == ["wheels-1", "wheels-2", "wheels-3", "model-1"]
    assert pack.parcels_in(tmp_path) == sorted(made)
    pieces = sorted((tmp_path / "model-1").iterdir())
    assert hashlib.sha256(b"".join(path.read_bytes() for path in pieces)).digest() == whole


def test_a_parcel_that_cannot_be_installed_stops_no_other(tmp_path: Path) -> None:
    """A parcel is installed again only if it could not be."""
    parcels, work = tmp_path / "parcels", tmp_path / "work"
    wheel(parcels / "wheels-1", "first_of_two", "1.0", {"first_of_two.py": b"value = 1\n"})
    broken = wheel(parcels / "bitsandbytes-1", "second_of_two", "1.0", {"second_of_two.py": b""})
    whole = broken.read_bytes()
    broken.write_bytes(whole[:100])
    (parcels / "model-1").mkdir()
    (parcels / "model-1" / "m.whl.0").write_bytes(b"one")
    work.mkdir()
    bad, good = run.install(parcels, work)
    assert (bad["parcel"], bad["status"]) == ("bitsandbytes-1", "failed")
    assert broken.name in bad["error"] and bad["error"] == bad["stderr"][-1]
    assert (good["part"], good["parcel"], good["status"]) == ("install", "wheels-1", "ok")
    assert (work / "site" / "first_of_two.py").is_file()
    broken.write_bytes(whole)
    assert [(one["parcel"], one["status"]) for one in run.install(parcels, work)] == [("bitsandbytes-1", "ok")]
    assert {path.name for path in (work / "site").glob("*.py")} == {"first_of_two.py", "second_of_two.py"}
    assert run.install(parcels, work) == run.install(tmp_path / "none", work) == []


def test_wheels_stay_when_their_parcel_is_gone(tmp_path: Path) -> None:
    """They are replaced by newer ones, also of another version."""
    site = tmp_path / "site"
    wheel(tmp_path / "1" / "wheels-1", "first_of_two", "1.0", {"first_of_two.py": b"value = 1\n"})
    run.install(tmp_path / "1", tmp_path)
    wheel(tmp_path / "2" / "bitsandbytes-1", "second_of_two", "1.0", {"second_of_two.py": b""})
    run.install(tmp_path / "2", tmp_path)
    assert (site / "first_of_two.py").is_file() and (site / "second_of_two.py").is_file()
    wheel(tmp_path / "3" / "wheels-1", "first_of_two", "2.0", {"first_of_two.py": b"value = 2\n"})
    assert [one["parcel"] for one in run.install(tmp_path / "3", tmp_path)] == ["wheels-1"]
    assert (site / "first_of_two.py").read_bytes() == b"value = 2\n" and (site / "second_of_two.py").is_file()
    assert {path.name for path in site.glob("first*.dist-info")} == {"first_of_two-2.0.dist-info"}
    assert run.install(tmp_path / "3", tmp_path) == []


def test_pieces_of_the_model_stay_when_their_parcel_is_gone(tmp_path: Path) -> None:
    for number in range(2):
        parcel = tmp_path / str(number) / f"model-{number}"
        parcel.mkdir(parents=True)
        (parcel / f"m.whl.{number}").write_bytes(b"one")
        run.keep_pieces(tmp_path / str(number), tmp_path)
    assert sorted(path.name for path in (tmp_path / "pieces").iterdir()) == ["m.whl.0", "m.whl.1"]


# --- parts


def test_a_part_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    code = {
        "raises": "print('{\"half\": 1}', flush=True); raise ValueError('broken')",
        "good": "print('text'); print('{\"value\": 2.5}'); print('{\"value\": 3}')",
        "too slow": f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(300)"])
open({str(pid)!r}, "w").write(str(child.pid))
print('{{"a": 1}}', flush=True)
print("\\n".join(f"line {{number}}" for number in range(20)), file=sys.stderr, flush=True)
time.sleep(300)
""",
        "silent": "",
        "killed": "import os; os.kill(os.getpid(), 9)",
        "last": "print('{\"value\": 4}')",
    }
    commands = {name: [sys.executable, "-S", "-c", text] for name, text in code.items()}
    start = time.monotonic()
    results: list[dict[str, Any]] = [one for found in run.run(commands, tmp_path, os.environ, 3.0) for one in found]
    assert time.monotonic() - start < 60 and all(one["seconds"] >= 0 for one in results)
    left = Path("/proc", pid.read_text(), "stat")  # what it has started is ended with it
    while left.exists() and left.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() - start < 60
        time.sleep(0.01)
    traceback = ["Traceback (most recent call last):", 'File "<string>", line 1, in <module>', "ValueError: broken"]
    nothing = {"error": "it printed nothing", "stderr": []}
    keys = ("part", "status", "seconds")
    assert [(one["part"], one["status"], {key: one[key] for key in one if key not in keys}) for one in results] == [
        ("raises", "ok", {"half": 1}), ("raises", "failed", {"error": "ValueError: broken", "stderr": traceback}),
        ("good", "ok", {"value": 2.5}), ("good", "ok", {"value": 3}),
        ("too slow", "ok", {"a": 1}),
        ("too slow", "timeout", {"error": "line 19", "stderr": [f"line {number}" for number in range(10, 20)]}),
        ("silent", "failed", nothing), ("killed", "failed", nothing), ("last", "ok", {"value": 4}),
    ]  # fmt: skip


def test_the_script_writes_a_line_for_each_part_also_where_all_fail(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHON": sys.executable}
    command = [SCRIPT, "run", "--dry", "--limit", "0.01", "--parcels", tmp_path, "--work", tmp_path / "work"]
    done = run_command([*command, "self", "machine"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "failed: machine, self-test; results are in" in done.stdout, done.stderr
    lines = (tmp_path / "work" / "results-dry" / "results.jsonl").read_text(encoding="utf-8").splitlines()
    assert [(one["part"], one["status"]) for one in map(json.loads, lines)] == [
        ("machine", "timeout"), ("self-test", "timeout")
    ]  # fmt: skip


def test_speeds_are_counted_from_the_rows() -> None:
    """The first update has no time, and the next ones are not counted while the machine warms up."""
    lengths = [10, 20] * 8
    answer = {"updates": 8, "steps": [9.0, 9.0, 9.0, 9.0, 1.0, 2.0, 3.0], "losses": [5.0, *[4.0] * 6, 3.0]}
    found = parts.measured(answer, lengths, 2)
    assert (found["step_seconds"], found["tokens_per_second"], found["tokens_per_step"]) == (2.0, 15.0, 30)
    assert (found["first_loss"], found["last_loss"]) == (5.0, 3.0)
    with pytest.raises(SystemExit, match="7 updates with 7 times instead of 8"):
        parts.measured(answer | {"updates": 7}, lengths, 2)


def test_both_ways_to_train_are_side_by_side() -> None:
    one = {
        "base": "7b", "quantization": "8bit", "with": "loratune", "step_seconds": 0.5, "tokens_per_second": 4000.0,
        "gpu_bytes": 8 << 30, "rss_bytes": 1 << 30, "first_loss": 10.8, "last_loss": 9.5,
    }  # fmt: skip
    lines = run.table(
        [{"value": 1}, one | {"tokens_per_second": 1.0}, one, one | {"with": "trainer+peft"}]
    ).splitlines()
    assert lines[2] == "| 7b | 8bit | loratune | 0.5000 | 4,000 | 8.00 | 1.00 | 10.8000 to 9.5000 |"
    assert "trainer+peft" in lines[3] and len(lines) == 4 and run.table([{"value": 1}]) == ""


def test_the_script_names_its_parts() -> None:
    shown = run_command([SCRIPT], capture_output=True, text=True, check=False)
    assert shown.returncode == 2 and "scripts/gpu.sh pack" in shown.stderr
    environment = os.environ | {"PYTHON": sys.executable}
    command = [SCRIPT, "run", "no-such-part"]
    refused = run_command(command, env=environment, capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and "no such part: no-such-part; there are machine, self-test" in refused.stderr


@pytest.mark.slow
def test_dry_both_ways_to_train_give_the_same_losses(tmp_path: Path) -> None:
    """The same parts as on a card, with a tiny base of random weights on a CPU."""
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    command = [SCRIPT, "run", "--dry", "--parcels", tmp_path / "none", "--work", tmp_path, "machine", "7b-bf16"]
    done = run_command(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    results = [*map(json.loads, (tmp_path / "results-dry" / "results.jsonl").read_text().splitlines())]
    machine, ours, stock = results
    assert machine["part"] == "machine" and machine["packages"]["torch"] and machine["gpu"] == ""
    assert ours["with"] == "loratune" and ours.keys() == stock.keys() and len(ours["losses"]) == 3
    assert ours["losses"] == pytest.approx(stock["losses"], rel=5e-3)
    assert ours["weights"] == "random" and ours["tokens_per_second"] > 0
