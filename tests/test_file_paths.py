"""Every key that holds a path is treated as one: absolute in run.yaml, reduced to a name when pushed, compared on
resuming."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import meanings
from running import run_record

from loratune import config
from loratune.codes import Code
from loratune.config import OUTPUT, RunConfig, path_keys
from loratune.config.keys import groups
from loratune.errors import ResumeError
from loratune.export.portable import portable
from loratune.training.checkpoints import resume
from loratune.training.checkpoints.resume import CONTENTS, ResumePoint
from loratune.training.preflight import with_absolute_paths

TEXTS: dict[str, Callable[[str], Any]] = {
    "model.revision": str,
    "model.gguf_file": str,  # within the base; any other place is refused
    "lora.target_modules": str,
    "lora.target_parameters": str,
    "lora.modules_to_save": lambda text: [text],
    "data.train.split": str,
    "data.validation.split": str,
    "data.test.split": str,
    "data.group_by": str,
    "data.columns": lambda text: {"prompt": text},
    "data.labels": lambda text: {text: "label"},
}
"""The other keys that take free text, each with a value that contains it."""


def places_of_text() -> Iterator[str]:
    """Every place of a config that takes free text, according to the schema alone."""

    def is_open(schema: Any) -> bool:
        parts = [*schema.get("anyOf", []), schema.get("items"), schema.get("additionalProperties")]
        is_text = schema.get("type") == "string" and not {"enum", "const"} & schema.keys()
        return is_text or any(is_open(part) for part in parts if isinstance(part, dict))

    yield from (place for group in groups() for key in group.keys if is_open(key.schema) for place in key.places)


def put(values: dict[str, Any], place: str, value: Any) -> None:
    *above, name = place.split(".")
    for part in above:
        values = values.setdefault(part, {})
    values[name] = value


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A config in which every text is the relative path of an existing file."""
    monkeypatch.chdir(tmp_path)
    values: dict[str, Any] = {}
    for place in places_of_text():
        path = Path("private") / f"{place}.txt"
        path.parent.mkdir(exist_ok=True)
        path.touch()
        put(values, place, TEXTS.get(place, str)(str(path)))
    del values["data"]["group_by"]  # not allowed together with a file of validation rows
    values["data"]["test"] = [values["data"]["test"], "private/data.test.path.txt"]
    return RunConfig.model_validate(values)


def leaves(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and place not in TEXTS:
        for name, part in value.items():
            yield from leaves(part, f"{place}.{name}".lstrip("."))
    elif isinstance(value, list) and place not in TEXTS:
        for part in value:
            yield from leaves(part, place)
    elif value is not None and (place in path_keys() or place in TEXTS):
        yield place, str(value)


def test_each_text_of_the_schema_is_classified_as_path_or_not() -> None:
    """A new key that takes free text must have the type `FilePath` or be in the list above."""
    assert {*places_of_text()} == path_keys() | TEXTS.keys()
    assert not path_keys() & TEXTS.keys()


def test_paths_are_absolute_in_run_yaml_and_names_when_pushed(run: RunConfig, tmp_path: Path) -> None:
    absolute = with_absolute_paths(run)
    found = [[*leaves(one.resolved())] for one in (run, absolute, portable(absolute, "who/base"))]
    assert {place for place, _ in found[0]} == (path_keys() | TEXTS.keys()) - {"data.group_by"}
    for (place, before), (_, here), (_, pushed) in zip(*found, strict=True):
        if place in TEXTS:
            assert before == here == pushed
        else:
            assert here == str(tmp_path / before)
            assert pushed == ("who/base" if place == "model.name_or_path" else Path(before).name)
    assert config.parse(config.dump(absolute), "run.yaml") == absolute


def test_every_input_path_is_protected_from_overwriting(run: RunConfig, tmp_path: Path) -> None:
    found = config.input_paths(tmp_path, with_absolute_paths(run))
    inputs = {key.removesuffix(".path") for key in path_keys()} - {OUTPUT}
    assert {name for name, _ in found} == inputs | {"the config file"}


def test_input_files_have_fingerprints_that_resuming_compares() -> None:
    assert {key for key, _ in CONTENTS.values()} == {key.removesuffix(".path") for key in path_keys()} - {OUTPUT}
    assert {key for key, _ in CONTENTS.values()} <= {*resume.CHANGEABLE}  # existing files may have moved
    before = run_record().model_copy(update={"fingerprints": dict.fromkeys(CONTENTS, "a")})
    point = ResumePoint(Path(), before)
    for name, (key, _) in CONTENTS.items():
        now = before.model_copy(update={"fingerprints": before.fingerprints | {name: "b"}})
        with pytest.raises(ResumeError) as caught:
            point.check_same(now, "b" if name == "base" else "a")
        assert meanings(caught.value) == [(Code.RESUME_CHANGED, "", key)]
    point.check_same(before, "a")
