"""The exceptions of loratune, and the exit code of each.

LoratuneError           1   unexpected
├── ConfigError         2   usage or config
├── ModelError          3   model or tokenizer
├── DataError           4   data
├── AdapterError        5   adapter directory
├── NumericError        6   NaN, inf, an adapter without effect
├── ResumeError         7   a checkpoint does not fit the run
├── ResourceError       8   memory or disk
├── LockedError         9   another run uses the directory
├── LostError          10   another process of the run has ended
├── RequirementError   11   an adapter is not as good as required
├── Interrupted       130   Ctrl-C
└── Terminated        143   SIGTERM

An error lists every problem, so that the user can fix all of them at once. Only `cli.boundary` turns an error into
lines on stderr and an exit code.
"""

import errno
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata

from loratune import outputs
from loratune.codes import Code
from loratune.text import one_line, without_userinfo


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, printed as one line: `<where>: <key>: <what> [<code>]; <fix>`.

    Attributes:
        code: What kind of problem it is.
        what: What is wrong, in plain words.
        where: A file, `file:line`, or `file:line:column`.
        key: A dotted config key, or a parameter of the public API; `NAME: ITEM` is one item of its value.
        fix: What to do about it. It comes last, so that a command in it can be copied.

    Texts name a parameter as code with its value, such as `overwrite=True` or `base_gguf=FILE`, or with `...` for any
    value. The command line translates both into its options, see `cli.options`.
    """

    code: Code
    what: str
    where: str = ""
    key: str = ""
    fix: str = ""

    def __str__(self) -> str:
        return self._text(f" [{self.code}]" if "." in self.code else "")

    @property
    def text(self) -> str:
        """Place, key, what is wrong and what to do, without the code."""
        return self._text("")

    def _text(self, code: str) -> str:
        where, key, what, fix = map(_shortened, (self.where, self.key, self.what, self.fix))
        head = ": ".join(part for part in (where, key, what) if part)
        return one_line(f"{head}{code}; {fix}" if fix else f"{head}{code}")

    def to_dict(self) -> outputs.Reported:
        """Plain values for `--json`, with long values shortened."""
        place, key, what, fix = map(_shortened, (self.where, self.key, self.what, self.fix))
        return {"code": self.code, "place": place, "key": key, "what": what, "fix": fix}


_VALUE = re.compile(r"""`[^`]*`|(?<!\w)'[^']*'|(?<!\w)"[^"]*"|\S+""")
"""A value in a message: quoted text, or a word."""
_MOST, _MOST_OF_PATHS, _MOST_OF_ALL = 200, 1000, 2000
"""Maximum characters of a value, of a value that may be a path, and of a part of a message; longer ones lose their
middle."""


def _shortened(text: str) -> str:
    """A part of a message, without passwords in URLs, and with the middle of long values left out."""
    text = without_userinfo(text)
    if len(text) <= _MOST:
        return text
    values = _VALUE.sub(lambda match: _ends(match[0], _MOST_OF_PATHS if "/" in match[0] else _MOST), text)
    return _ends(values, _MOST_OF_ALL)


def _ends(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most // 2]}[...]{text[-most // 5 :]}"


def install(extra: str) -> str:
    """The command that installs what an extra names, wherever loratune itself was installed from."""
    needed = [f"'{package}'" for package in _packages(extra)]
    return f"pip install {' '.join(needed)}" if needed else f"pip install '.[{extra}]' in the checkout"


def _packages(extra: str) -> list[str]:
    found = list[str]()
    for text in metadata.requires("loratune") or ():
        package, _, marker = (part.strip() for part in text.partition(";"))
        if re.search(rf"extra == ['\"]{re.escape(extra)}['\"]", marker):
            inner = re.fullmatch(r"loratune\[(.+)\]", package)
            found += [package] if inner is None else [one for name in inner[1].split(",") for one in _packages(name)]
    return found


def missing_package(code: Code, package: str, purpose: str, extra: str, where: str = "", key: str = "") -> Problem:
    """The problem that a package of an extra is not installed. purpose: what the package does."""
    return Problem(code, f"the package {package}, which {purpose}, is not installed", where, key, install(extra))


class LoratuneError(Exception):
    """An error that the user can act on; `problems` is never empty."""

    exit_code = 1

    def __init__(self, problems: Problem | Sequence[Problem]):
        self.problems = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[type["LoratuneError"], tuple[tuple[Problem, ...]]]:
        """Support pickling: an error is rebuilt from its problems."""
        return type(self), (self.problems,)


def is_disk_full(error: BaseException) -> bool:
    """Whether the disk is full, a quota is used up, or a file size limit is reached, also as reported by safetensors
    and torch."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return any(
        words in str(error) for words in ("No space left", "File too large", "inline_container", "iostream error")
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out. Recognizes the message of torch, which has an exception class for its own allocator on
    GPUs only, of libraries that allocate on a GPU themselves (Triton, NCCL, cuBLAS), of the dynamic linker loading a
    library, and of Python when there is no memory for a thread's stack."""
    has_class = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if has_class or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    if isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_GPU_MEMORY):
        return True
    return any(words in str(error) for words in _OUT_OF_MEMORY)


_OUT_OF_GPU_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "Cannot allocate memory",
    "failed to map segment",
    "can't start new thread",
    "std::bad_alloc",
)


def is_rust_panic(error: BaseException) -> bool:
    """Whether a Rust library panicked; the class of such an error derives from `BaseException`, and cannot be
    imported."""
    return type(error).__name__ == "PanicException"


def template_error_reason(error: BaseException) -> str:
    """Why a chat template cannot be compiled or rendered.

    error: Jinja's TemplateError; Python's SyntaxError or RecursionError for a template nested too deeply, ValueError
        for a number of too many digits; or whatever an operation of the template raises.
    """
    if isinstance(error, SyntaxError | RecursionError):
        return "it is nested too deeply" + (f": {error.msg}" if isinstance(error, SyntaxError) else "")
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    return str(getattr(error, "message", error))


class ConfigError(LoratuneError):
    """A wrong command line or configuration."""

    exit_code = 2


class ModelError(LoratuneError):
    """A base model or tokenizer that cannot be loaded or adapted."""

    exit_code = 3


class DataError(LoratuneError):
    """Data that is missing, unreadable, or has no supervised tokens."""

    exit_code = 4


class AdapterError(LoratuneError):
    """An adapter directory that is damaged or does not fit its base."""

    exit_code = 5


class NumericError(LoratuneError):
    """A loss, gradient or weight that is not finite, or an adapter without effect."""

    exit_code = 6


class ResumeError(LoratuneError):
    """A checkpoint that is missing, damaged, or belongs to another run."""

    exit_code = 7


class ResourceError(LoratuneError):
    """Not enough memory or disk."""

    exit_code = 8


class LockedError(LoratuneError):
    """Another run is working on the same directory."""

    exit_code = 9


class LostError(LoratuneError):
    """Another process of the run has ended, or cannot be reached."""

    exit_code = 10


class RequirementError(LoratuneError):
    """An adapter that failed a requirement of the user."""

    exit_code = 11


class Interrupted(LoratuneError):
    """The user stopped the run."""

    exit_code = 130


class Terminated(LoratuneError):
    """The run was ended by SIGTERM or a similar signal."""

    exit_code = 143
