"""Files written by earlier releases can be read: adapters, configs, checkpoints and studies. What 1.0 promised holds.

`release_0.tar.xz` was made by revision 096b964, before there was a release; the others by `write_release.py`. Each was
made in a directory of its name, as records contain absolute paths.
"""

import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Ran, alone
from running import WEIGHTS
from safetensors.torch import load_file
from write_release import GRID, promises

from loratune import __version__
from loratune.compare.verdict import NAMES

ARCHIVES = sorted(path.name.removesuffix(".tar.xz") for path in Path(__file__).parent.glob("release_*.tar.xz"))
STABLE = [name for name in ARCHIVES if name != "release_0"]


@pytest.fixture(
    params=[pytest.param(name, marks=[] if name == STABLE[-1] else [pytest.mark.slow]) for name in ARCHIVES]
)
def release(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, with the base, rows, configs, two adapters, and an interrupted run and study."""
    place = Path("/tmp", f"loratune-{request.param.replace('_', '-')}")
    with alone(place.name):
        shutil.rmtree(place, ignore_errors=True)
        with tarfile.open(Path(__file__).with_name(f"{request.param}.tar.xz")) as archive:
            archive.extractall(place.parent, filter="data")
        monkeypatch.chdir(place)
        yield place
        shutil.rmtree(place)


def keys(values: Any, place: str = "") -> set[str]:
    """The paths of the keys of nested values; all entries of a list count as one."""
    if isinstance(values, dict):
        return {path for key, value in values.items() for path in {f"{place}.{key}"} | keys(value, f"{place}.{key}")}
    return {path for value in values for path in keys(value, f"{place}[]")} if isinstance(values, list) else set()


def test_an_earlier_checkpoint_is_resumed(cli: Callable[..., Ran], release: Path) -> None:
    """From step 4 of 6, with the same final weights as the uninterrupted run. Its record has all keys of that run's."""
    ran = cli("train", "sft.yaml", "--resume")
    assert ran.code == 0, ran.err
    found, expected = (load_file(release / name / WEIGHTS) for name in ("sft", "whole"))
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert weight.numpy() == pytest.approx(expected[name].numpy(), rel=1e-4, abs=1e-7), name
    records = [json.loads((release / name / "loratune.json").read_text()) for name in ("sft", "whole")]
    losses = [[entry["loss"] for entry in record["curve"] if "loss" in entry] for record in records]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    if release.name != "loratune-release-0":
        assert keys(records[1]) - keys(records[0]) == set()


@pytest.mark.parametrize(("name", "rows"), [("whole", "rows.jsonl"), ("dpo", "pairs.jsonl")])
def test_an_earlier_adapter_can_be_used(cli: Callable[..., Ran], release: Path, name: str, rows: str) -> None:
    ran = cli("evaluate", "--adapter", release / name, "--data", release / rows, "--json")
    assert ran.code == 0, ran.err
    found, recorded = json.loads(ran.out), json.loads((release / name / "loratune.json").read_text())
    gain = recorded["metrics"]["gain"]
    if name == "dpo":
        assert found["adapter"]["loss"] == pytest.approx(gain["adapter"], rel=1e-4)
    assert found["verdict"] in NAMES and found["adapter"]["loss"] < found["base"]["loss"]
    for arguments in (
        ("generate", "--adapter", release / name, "--max-new-tokens", "4", "0 and 0 make"),
        ("report", "--adapter", release / name, "--output", release / f"{name}.html"),
        ("train", release / name / "run.yaml", "--set", f"output_dir={release}/again", "--dry-run"),
    ):
        assert cli(*arguments).code == 0, arguments


def test_an_earlier_study_is_continued(cli: Callable[..., Ran], release: Path) -> None:
    """Two of its trials are finished, and the third is pending."""
    before = json.loads((release / "best.study" / "results.json").read_text())
    config = "study.yaml" if release.name == "loratune-release-0" else "best.yaml"
    ran = cli("sweep", config, "--grid", GRID)
    assert ran.code == 0, ran.err
    assert (release / "best" / WEIGHTS).is_file()
    results = json.loads((release / "best.study" / "results.json").read_text())
    assert len(results["trials"]) == 3 and keys(before) - keys(results) == set()


# What releases promise


def accepted(schema: dict[str, Any], definitions: dict[str, Any], place: str = "") -> dict[str, set[str]]:
    """Key of a config or an output → what it accepts: types, and the values of enumerations."""
    found: dict[str, set[str]] = {place: set()}
    for part in (schema, *schema.get("anyOf", ()), *schema.get("oneOf", ()), *schema.get("allOf", ())):
        part = definitions[part["$ref"].rpartition("/")[2]] if "$ref" in part else part
        values = part.get("enum", [part["const"]] if "const" in part else None)
        types = part.get("type", [])
        found[place] |= (
            {repr(value) for value in values} if values else {*([types] if isinstance(types, str) else types)}
        )
        others = {"[]": part.get("items"), "*": part.get("additionalProperties")}
        inner = part.get("properties", {}) | {name: one for name, one in others.items() if isinstance(one, dict)}
        for name, one in inner.items():
            for key, atoms in accepted(one, definitions, f"{place}.{name}".strip(".")).items():
                found[key] = found.get(key, set()) | atoms
    return found


def broken(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """The promises of a release that a later one does not keep."""
    before, after = (accepted(one["schema"], one["schema"].get("$defs", {})) for one in (old, new))
    for key, atoms in before.items():
        lost = atoms - after.get(key, set()) - ({"'integer'"} if "number" in after.get(key, set()) else set())
        yield from (f"the key {key} does not accept {one}" for one in sorted(lost))
        if key not in after:
            yield f"there is no key {key}"
    yield from broken_outputs(old["outputs"], new["outputs"])
    yield from (f"there is no error code {code}" for code in sorted({*old["codes"]} - {*new["codes"]}))
    for name, number in old["exit_codes"].items():
        if new["exit_codes"].get(name) != number:
            yield f"{name} no longer ends with exit code {number}"
    for command, options in old["options"].items():
        gone = {*options} - {*new["options"].get(command, ())}
        yield from (f"{command} has no {option}" for option in sorted(gone))


def always(schema: dict[str, Any], place: str = "") -> set[str]:
    """The fields that an output always has."""
    found = {f"{place}.{name}".strip(".") for name in schema.get("required", ())}
    inner = (
        schema.get("properties", {}) | {"[]": schema["items"]} if "items" in schema else schema.get("properties", {})
    )
    return found.union(*(always(one, f"{place}.{name}".strip(".")) for name, one in inner.items()))


def broken_outputs(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """The fields of outputs that are gone, or hold something else. Only values of enumerations may be added to one."""
    for command, schema in old.items():
        later = new.get(command, {})
        before, after = accepted(schema, {}), accepted(later, {})
        for key, kinds in before.items():
            now = after.get(key, set())
            if kinds - now or any(not kind.startswith("'") for kind in now - kinds):
                yield f"{command} --json has {key} as {sorted(now)}, no longer as {sorted(kinds)}"
        yield from (f"{command} --json may lack {key}" for key in sorted(always(schema) - always(later)))


WITHDRAWN = {
    *(f"the key training.adapter_scale does not accept {one}" for one in ("'auto'", "number")),
    "there is no key training.adapter_scale",
    "sweep has no --halving",
    "init has no data",  # an argument, which is given by its place; its name was one of Python
    "report has no --study",
    "train --json has adapter_scale as [], no longer as ['null', 'number']",
    "train --json has adapter_scale_choice as [], no longer as ['object']",
}
"""Promises that were taken back before 1.0 was published."""


def promised(name: str) -> dict[str, Any]:
    with tarfile.open(Path(__file__).with_name(f"{name}.tar.xz")) as archive:
        file = archive.extractfile(f"loratune-{name.replace('_', '-')}/promises.json")
        assert file is not None
        return dict(json.load(file))


@pytest.mark.parametrize("name", STABLE)
def test_promises_of_earlier_releases_are_kept(name: str) -> None:
    """Keys, values, codes and options may be added. Before one goes, see `configs/guide/programs.md#stability`."""
    assert __version__.split(".")[0] == name.removeprefix("release_").split(".")[0], "a major release may break them"
    assert {*broken(promised(name), promises())} - WITHDRAWN == set()


def test_broken_promises_are_detected() -> None:
    old, new = promised(STABLE[0]), promised(STABLE[0])
    del new["schema"]["$defs"]["LoraSection"]["properties"]["r"]
    new["schema"]["$defs"]["ModelSection"]["properties"]["quantization"]["enum"].remove("4bit")
    new["codes"].remove("config.conflict")
    new["exit_codes"]["DataError"] = 5
    new["options"]["train"].remove("--resume")
    merge, error = new["outputs"]["merge"], new["outputs"]["error"]["properties"]["errors"]["items"]
    merge["properties"]["note"]["type"] = "integer"
    merge["properties"]["added"] = {"type": "string"}
    del error["properties"]["fix"]
    error["required"].remove("place")
    del new["outputs"]["env"]
    found = list(broken(old, new))
    assert "there is no key lora.r" in found and "the key model.quantization does not accept '4bit'" in found
    assert "there is no error code config.conflict" in found and "train has no --resume" in found
    assert "DataError no longer ends with exit code 4" in found
    assert [line for line in found if line.startswith(("merge", "error"))] == [
        "merge --json has note as ['integer'], no longer as ['string']",
        "error --json has errors.[].fix as [], no longer as ['string']",
        "error --json may lack errors.[].place",
    ]
    assert any(line.startswith("env --json has") for line in found)
