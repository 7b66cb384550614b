"""What `--overwrite` replaces: a directory of the same kind that holds nothing else, and that nothing else needs.

`loratune.json` lists the files of an adapter, a merged model or an export. Without that record, an adapter may consist
of the files that PEFT and tokenizers are known to write.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loratune.codes import Code
from loratune.errors import ConfigError, Problem
from loratune.system import records
from loratune.system.directories import CONFIG, is_recorded, read_record, scan_recorded, shortened
from loratune.system.files import contains, is_file, is_incidental_file

Inputs = Sequence[tuple[str, str]]
"""What a command reads: how the user names it, e.g. `data.train`, and its path."""
CONFIG_INPUT = "the config file"
"""How the config of a run is named among its inputs. It is not read again once the run has started."""
START_INPUT = "lora.start_from"
"""How the adapter that a run starts from is named. Every file in its directory belongs to it."""


@dataclass(frozen=True)
class OutputKind:
    """What is written to an output directory.

    Attributes:
        noun: What messages call it.
        key: The config key, or the option, by which the user names the directory.
        unfinished: The end of the name of the sibling directory in which it is put together.
    """

    noun: str
    key: str
    unfinished: str

    def is_in(self, directory: Path) -> bool:
        """Whether the directory holds one."""
        if self == ADAPTER:
            return is_file(directory / CONFIG)
        record = read_record(directory)
        return isinstance(record, dict) and isinstance(record.get("kind"), str)


ADAPTER = OutputKind("adapter", "output_dir", "partial")
"""What training writes."""
EXPORT = OutputKind("exported model or adapter", "--output", "export")
"""What is made from an adapter. Its record says of which kind it is."""


def check_replaceable(directory: Path, where: str, inputs: Inputs, output: OutputKind, proceed: str = "") -> None:
    """Check that a directory may be replaced.

    Args:
        directory: The directory.
        where: The directory as messages name it.
        inputs: What the command reads.
        output: What is to be written there.
        proceed: What to do after the directory was moved away; by default, or instead, another one may be chosen.

    Raises:
        ConfigError: It is in use, see `check_unused`; it holds no such output, one of a newer release, or other files;
            its files may not be removed.
        OSError: It cannot be read.
    """
    check_unused(directory, where, inputs, output)
    alternative = f"and {proceed}" if proceed else f"or choose another {output.key}"

    def refuse(code: Code, what: str, fix: str = f"move it away, {alternative}", where: str = where) -> ConfigError:
        return ConfigError(Problem(code, what, where, output.key, fix))

    if reason := records.newer(records.ADAPTER, read_record(directory)):
        what = f"{reason}, so --overwrite does not replace it"
        raise refuse(Code.ADAPTER_NEWER_RECORD, what, where=str(directory / records.ADAPTER))
    contents = scan_recorded(directory)
    if not output.is_in(directory) and not all(map(is_incidental_file, (*contents.files, *contents.foreign))):
        raise refuse(Code.OUTPUT_OVERWRITE, f"holds no {output.noun}, so --overwrite does not replace it")
    if contents.foreign:
        names = shortened(contents.foreign)
        what = f"also holds {names}, not part of the {output.noun}, so --overwrite does not replace it"
        raise refuse(Code.OUTPUT_OVERWRITE, what, f"move or delete these files, {alternative}")
    for place, _, _ in os.walk(directory):
        if not os.access(place, os.W_OK | os.X_OK):
            raise refuse(Code.OUTPUT_UNUSABLE, f"cannot be replaced: {place} is not writable")


def check_unused(directory: Path, where: str, inputs: Inputs, output: OutputKind) -> None:
    """Check that a directory can be moved and removed without harm to anything else. Arguments as of the above.

    Raises:
        ConfigError: It is a mount point; it is, or holds, the working directory or what the command reads.
    """

    def refuse(code: Code, what: str, fix: str) -> ConfigError:
        return ConfigError(Problem(code, f"{what}, so it cannot be replaced", where, output.key, fix))

    if os.path.ismount(directory):
        fix = "name a directory inside it that does not exist yet"
        raise refuse(Code.OUTPUT_OVERWRITE, "is a mount point", fix)
    if contains(directory, Path.cwd()):
        fix = "choose another directory, or start loratune from elsewhere"
        raise refuse(Code.OUTPUT_OVERWRITE, "is, or holds, the working directory", fix)
    for name, path in inputs:
        if contains(directory, Path(path)) and not (name == CONFIG_INPUT and is_recorded(directory, Path(path))):
            what, fix = (
                f"is, or holds, what the command reads ({name}: {path})",
                "choose another directory, or move that",
            )
            raise refuse(Code.OUTPUT_OVERWRITE, what, fix)
