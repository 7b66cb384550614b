"""Where a model is: a directory of this machine, or a repository of the hub. Told apart without torch."""

from pathlib import Path

from loratune.errors import ModelError, Problem
from loratune.model import gguf

KEY = "model.name_or_path"


def is_directory(
    name_or_path: str, revision: str | None = None, gguf_file: str | None = None, *, trusted: bool = False
) -> bool:
    """Whether this is a model directory; False leaves a name that may be a hub id.

    revision is for hub ids only, but for trusted code, which is always pinned. With a gguf_file, the directory needs
    nothing else.
    Raises ModelError: a path where nothing is, a file, a directory without a model, a directory and a revision; what
    `gguf.check` says of the GGUF file.
    """
    path = Path(name_or_path).expanduser()
    if gguf_file is not None:
        gguf.check_name(gguf_file)
    if path.is_dir():
        if revision is not None and not trusted:
            raise ModelError(Problem("a directory has no revisions", name_or_path, "model.revision", "leave it out"))
        if gguf_file is not None:
            gguf.check(path / gguf_file)
        elif not (path / "config.json").is_file():
            what = "no config.json in this directory, so it holds no model"
            raise ModelError(Problem(what, name_or_path, KEY, _other_than(path)))
        return True
    if path.exists():
        fix = f"name its directory, and set {gguf.KEY}: {path.name}" if path.suffix == ".gguf" else "name its directory"
        raise ModelError(Problem("is a file, not a model directory", name_or_path, KEY, fix))
    if name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1:
        raise ModelError(Problem("no such directory", name_or_path, KEY, "check the path"))
    return False


def local_or_hub(name_or_path: str) -> str:
    """The name by which a model can be found from anywhere: an absolute path for a directory, else the hub id."""
    path = Path(name_or_path).expanduser()
    return str(path.absolute()) if path.is_dir() else name_or_path


def _other_than(directory: Path) -> str:
    if files := sorted(file.name for file in directory.glob("*.gguf")):
        return f"set {gguf.KEY} to {' or '.join(files[:3])}"
    return "name the directory that has one"
