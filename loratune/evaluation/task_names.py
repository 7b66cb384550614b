"""`--tasks`: which tasks are run, and whether the lm-evaluation-harness is installed, of which nothing is imported."""

from importlib.util import find_spec

from loratune.codes import Code
from loratune.errors import ConfigError, Problem, missing_package

OPTION = "--tasks"


def is_path(spec: str) -> bool:
    """Whether a task is named by a path. No task of the harness has a name with a slash, or that ends so."""
    return "/" in spec or spec.endswith((".yaml", ".yml")) or spec in (".", "..")


def parse(text: str) -> list[str]:
    """The tasks of a list with commas, each once.

    Raises:
        ConfigError: The list is empty; the package lm-eval, which runs them, is not installed.
    """
    specs = list(dict.fromkeys(spec for part in text.split(",") if (spec := part.strip())))
    if not specs:
        what, fix = "names no task", "name tasks such as arc_easy,hellaswag, or YAML files of tasks"
        raise ConfigError(Problem(Code.EVALUATE_UNKNOWN_TASK, what, key=OPTION, fix=fix))
    if find_spec("lm_eval") is None:
        raise ConfigError(missing_package(Code.MODEL_MISSING_PACKAGE, "lm-eval", "runs tasks", "eval", key=OPTION))
    return specs
