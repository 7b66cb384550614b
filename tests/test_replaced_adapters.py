"""An adapter directory that a new run replaces while it is used: what was opened is used, or an error says so."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROWS, Ran, config_in, tree, write_rows

import loratune
from loratune.codes import Code
from loratune.export import portable
from loratune.lora import adapter_files

pytestmark = pytest.mark.usefixtures("untraced_module")

Moment = tuple[str, int, str]
"""A line of loratune that reads from the directory, by file and number, and what it opens or lists."""
PROMPTS = ["3 and 3 make", "7 and 7 make"]


class Watch:
    """Sees each file that Python opens, and each directory that it lists, and swaps the directory at one moment."""

    def __init__(self) -> None:
        self.directory, self.moments, self.swap_at = "", list[Moment](), -1
        self.swap: Callable[[], object] = lambda: None

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """The audit hook, which Python never removes."""
        if not self.directory or event not in ("open", "os.listdir", "os.scandir"):
            return
        if not str(arguments[0]).startswith(self.directory):
            return
        frame: Any = sys._getframe(1)
        while "/loratune/" not in frame.f_code.co_filename and frame.f_back is not None:
            frame = frame.f_back
        moment = (frame.f_code.co_filename, frame.f_lineno, str(arguments[0]))
        if moment not in self.moments:
            self.moments.append(moment)
            if len(self.moments) == self.swap_at:
                directory, self.directory = self.directory, ""
                self.swap()
                self.directory = directory

    @contextmanager
    def over(self, directory: Path, swap_at: int = -1, swap: Callable[[], object] = lambda: None) -> Iterator[None]:
        """Watch inside. swap_at: the number of the moment, from 1, at which the directory is swapped."""
        self.directory, self.moments, self.swap_at, self.swap = str(directory), [], swap_at, swap
        try:
            yield
        finally:
            self.directory = ""


WATCH = Watch()
sys.addaudithook(WATCH)


class Place:
    """A directory with an adapter, and another adapter that replaces it as `train --overwrite` does."""

    def __init__(self, path: Path, old: Path, new: Path):
        self.path, self._old, self._new, self._next = path, old, new, path.with_name("next")

    def fill(self) -> Path:
        for path, source in ((self.path, self._old), (self._next, self._new)):
            shutil.rmtree(path, ignore_errors=True)
            shutil.copytree(source, path)
        return self.path

    def swap(self) -> None:
        replaced = self.path.with_name("replaced")
        self.path.rename(replaced)
        self._next.rename(self.path)
        shutil.rmtree(replaced)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path, cli: Callable[..., Ran]) -> tuple[Path, Path]:
    """Two adapters of different ranks, rows and settings."""
    folder = tmp_path_factory.mktemp("trained")
    make = config_in(folder, tiny_dir)
    assert cli("train", make(training={"max_steps": 6}, output_dir=str(folder / "old"))).code == 0
    rows = write_rows(folder / "few.jsonl", ROWS[:20])
    other = {"lora": {"r": 4}, "data": {"train": str(rows), "max_length": 64}, "training": {"max_steps": 3, "seed": 7}}
    assert cli("train", make("new.yaml", output_dir=str(folder / "new"), **other)).code == 0
    return folder / "old", folder / "new"


@pytest.fixture(scope="module")
def place(trained: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("place") / "adapter", *trained)


def outcome(work: Callable[[], Any]) -> Any:
    """A result, or None for the error of an adapter that has changed."""
    try:
        return work()
    except loratune.AdapterError as error:
        assert error.exit_code == 5 and {one.code for one in error.problems} <= {
            Code.ADAPTER_CHANGED, Code.ADAPTER_NOT_FOUND,
        }, error  # fmt: skip
        return None


def opened(path: Path) -> Any:
    """What an adapter tells without loading anything."""
    one = loratune.Adapter(path)
    assert one.config is not None
    return one.record, one.config, one.directory.files.config, one.directory.files.tensors


def merged(one: loratune.Adapter, folder: Path) -> Any:
    return tree(one.merge(folder / "merged", overwrite=True).directory)


def exported(one: loratune.Adapter, folder: Path) -> Any:
    return tree(one.export("peft", folder / "plain", overwrite=True).directory)


def copied(one: loratune.Adapter, folder: Path) -> Any:
    """What `push` uploads."""
    shutil.rmtree(folder / "copy", ignore_errors=True)
    return tree(portable.copy(one.directory.files, folder / "copy", "me/skill", "who/base").path)


METHODS: dict[str, Callable[[loratune.Adapter, Path], Any]] = {
    "generate": lambda one, folder: one.generate(PROMPTS, max_new_tokens=4),
    "chat": lambda one, folder: one.chat(max_new_tokens=4).ask(PROMPTS[0]).text,
    "evaluate": lambda one, folder: one.evaluate(ROWS[:4]).to_dict(),
    "merge": merged,
    "export": exported,
    "push": copied,
    "report": lambda one, folder: one.report(folder / "page.html", overwrite=True).read_text(),
}


def moments(place: Place, work: Callable[[], Any]) -> tuple[Any, list[Moment]]:
    """What work gives without a swap, and when it reads from the directory."""
    with WATCH.over(place.path):
        return work(), WATCH.moments


def test_an_adapter_is_opened_whole_or_not_at_all(place: Place) -> None:
    """Whatever has been read when the directory is replaced, record, settings and tensors are those of one adapter."""
    before, read = moments(place, lambda: opened(place.fill()))
    place.swap()
    after = opened(place.path)
    assert before[0] != after[0] and before[1] != after[1] and len(read) > 10
    found = []
    for number in range(1, len(read) + 1):
        place.fill()
        with WATCH.over(place.path, number, place.swap):
            found.append(outcome(lambda: opened(place.path)))
    assert all(one in (None, before, after) for one in found) and None in found


@pytest.mark.parametrize("method", METHODS)
def test_no_method_mixes_two_adapters(method: str, place: Place, tmp_path: Path) -> None:
    """The directory is replaced after it was opened: before the method begins, and at each of its reads. The result is
    that of the opened adapter, or an error."""
    use = METHODS[method]
    one = loratune.Adapter(place.fill())
    expected, read = moments(place, lambda: use(one, tmp_path))
    seen = {moment if method == "generate" else moment[0]: number for number, moment in reversed([*enumerate(read, 1)])}
    for number in (0, *seen.values()):
        one = loratune.Adapter(place.fill())
        record, tensors_before = one.record, one.directory.files.tensors
        if number == 0:
            place.swap()
        with WATCH.over(place.path, number, place.swap):
            assert outcome(lambda: use(one, tmp_path)) in (None, expected), read[number - 1]  # noqa: B023
        assert one.record == record and one.directory.files.tensors == tensors_before


def test_what_is_loaded_is_used_after_the_directory_is_gone(place: Place) -> None:
    one = loratune.Adapter(place.fill())
    texts = one.generate(PROMPTS, max_new_tokens=4)
    shutil.rmtree(place.path)
    assert one.generate(PROMPTS, max_new_tokens=4) == texts and one.metrics["steps"] == 6
    fresh = loratune.Adapter(place.fill())
    shutil.rmtree(place.path)
    for use in METHODS.values():
        with pytest.raises(loratune.AdapterError) as refused:
            use(fresh, place.path.parent)
        assert [problem.code for problem in refused.value.problems] == [Code.ADAPTER_CHANGED]


def test_several_adapters_are_those_that_were_opened(place: Place, tmp_path: Path) -> None:
    paths = {"one": place.path, "two": shutil.copytree(place.fill(), tmp_path / "two")}
    for mix in (None, {"one": 0.5, "two": 0.5}):
        place.fill()
        adapters = loratune.Adapters(paths, mix=mix)
        _ = adapters.opened.directories
        place.swap()
        assert outcome(lambda: [*adapters.answers(PROMPTS, max_new_tokens=4)]) is None  # noqa: B023


def test_a_command_reports_that_its_adapter_is_replaced(
    place: Place, cli: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the worst moment: safetensors has opened the file of the weights, and torch opens it once more to map it."""
    swapped, map_file = list[str](), torch.UntypedStorage.from_file

    def swap_and_map(name: str, **options: Any) -> Any:
        if name.startswith(str(place.path)):
            swapped.append(name)
            shutil.rmtree(place.path)
        return map_file(name, **options)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", swap_and_map)
    ran = cli("generate", "--adapter", place.fill(), *PROMPTS)
    assert swapped and ran.code == 5 and f"[{Code.ADAPTER_CHANGED}]" in ran.err, ran.err


def test_the_card_may_change_and_files_that_nothing_reads_may_appear(place: Place) -> None:
    files = adapter_files.inspect(place.fill())
    (place.path / "README.md").write_text("mine")
    (place.path / "page.html").write_text("a report")
    (place.path / ".DS_Store").write_text("")
    with files.reading():
        pass
    (place.path / "extra_vocab.txt").write_text("")
    with pytest.raises(loratune.AdapterError), files.reading():
        pass


@pytest.mark.parametrize("method", ["generate", "export"])
def test_what_cannot_be_read_in_the_place_of_a_file_is_not_opened(method: str, place: Place, tmp_path: Path) -> None:
    one = loratune.Adapter(place.fill())
    assert one.config is not None
    weights = place.path / adapter_files.WEIGHTS_FILE
    weights.unlink()
    os.mkfifo(weights)
    assert outcome(lambda: METHODS[method](one, tmp_path)) is None
