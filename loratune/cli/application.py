"""The Typer application, and the options that several commands share."""

import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from loratune.cli.boundary import checked_output
from loratune.cli.options import use_options
from loratune.codes import Code
from loratune.console import EscapedStream, as_json, escape_output, print_json, print_lines, print_problems, raw_output
from loratune.errors import ConfigError, Problem
from loratune.system import output_file, signals
from loratune.system.files import path_problem
from loratune.system.output_file import Output

STDOUT = "-"
"""The value of --output that stands for stdout, and of --input that stands for stdin."""
MAX_COUNT = 2**31 - 1
"""The largest number of tokens or rows that an option accepts."""

_COMMANDS = (
    "quickstart", "init", "train", "sweep", "params", "schema", "explain", "evaluate", "report", "generate", "classify",
    "chat", "merge", "export", "push", "env",
)  # fmt: skip


_UsageError: Any = typer.BadParameter.__base__


class _Commands(TyperGroup):
    """The command group; all output, including usage errors, is escaped for the terminal."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The names in the order of the help, which is the order in which the commands are used."""
        return sorted(super().list_commands(ctx), key=_COMMANDS.index)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The named command, whose options errors name from now on."""
        name, command, rest = super().resolve_command(ctx, args)
        use_options(command.params if command is not None else ())
        return name, command, rest

    def invoke(self, ctx: Any) -> Any:
        """Run the command. An unknown option that is the name of a config key is answered with `--set`."""
        try:
            return super().invoke(ctx)
        except _UsageError as error:
            from loratune.config import keys

            words = str(getattr(error, "option_name", "")).lstrip("-").replace("-", "_")
            if words and hasattr(error, "possibilities") and (near := keys.named_elsewhere(words)):
                error.possibilities = [f"--set {near}=VALUE"]
            raise

    def main(self, *arguments: Any, **keywords: Any) -> Any:
        """Run a command with its output escaped. With `--json`, usage errors are JSON as all others are."""
        as_json.set(signals.asks_for_json([*keywords.get("args", sys.argv[1:])]))
        with escape_output():
            try:
                code = super().main(*arguments, **keywords | {"standalone_mode": not as_json.get()})
            except _UsageError as error:
                options = [getattr(error, "option_name", ""), *getattr(getattr(error, "param", None), "opts", ())]
                key = next((name for name in options if name.startswith("-")), "")
                fix = "--help lists what the command accepts"
                print_problems([Problem(Code.USAGE_BAD_VALUE, error.format_message(), key=key, fix=fix)], code := 2)
            sys.exit(code)


app = typer.Typer(
    cls=_Commands,
    help="LoRA fine-tuning of causal language models: a YAML config in, a verified adapter directory out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", envvar="LORATUNE_VERBOSE", help="Show all choices with reasons, and all counts."),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks, including those of non-fatal errors.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Force = Annotated[bool, typer.Option("--force", help="Skip verification: allow another base and edited files.")]
AdapterPath = Annotated[Path, typer.Option("--adapter", metavar="DIR", help="The adapter directory.")]
Adapters = Annotated[
    list[str],
    typer.Option(
        "--adapter", metavar="[NAME=]DIR", help="An adapter directory; repeat with names for several adapters."
    ),
]
ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="The YAML file of the run.")]
Assignments = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. training.learning_rate=1e-4.")
]
DataAssignments = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Override a data setting of training, e.g. data.max_length=512."),
]
AdapterScale = Annotated[
    float,
    typer.Option(
        "--adapter-scale",
        metavar="S",
        help="Multiply the adapter's update by S, from 0 (the base) to 2; 1: as trained.",
    ),
]
System = Annotated[
    str | None,
    typer.Option(
        "--system", metavar="TEXT", help="The system message; by default that of the training rows, if all had one."
    ),
]
NoSystem = Annotated[bool, typer.Option("--no-system", help="Add no system message.")]
MaxNewTokens = Annotated[int, typer.Option(metavar="N", min=1, max=MAX_COUNT, help="Longest completion, in tokens.")]
Temperature = Annotated[float, typer.Option(metavar="T", min=0, help="0: greedy decoding; 0.001 to 1000: sampling.")]


def _version(requested: bool) -> None:
    if requested:
        from loratune.system import release

        print(f"loratune {release.describe()}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def program() -> str:
    """The command that runs this program: its path, if the shell cannot find it by name."""
    path = sys.argv[0]
    return path if Path(path).name == "loratune" and shutil.which("loratune") is None else "loratune"


def check_paths(**parameters: str | Path | None) -> None:
    """Raises ConfigError: the value of a parameter of a command is not a valid path."""
    for name, path in parameters.items():
        if path is not None and (reason := path_problem(str(path)) or ("" if str(path) else "is empty")):
            raise ConfigError(Problem(Code.USAGE_BAD_VALUE, f"the path {reason}", key=name, fix="check the path"))


def system_message(given: str | None, *, none: bool) -> str | None:
    """The system message of prompts, as for `Adapters.answers`. Raises ConfigError: both options are given."""
    if none and given is not None:
        raise ConfigError(Problem(Code.USAGE_CONFLICT, "give --system or --no-system, not both"))
    return "" if none else given


def needs(parameters: Mapping[str, object], needed: str) -> list[Problem]:
    """A problem for each given parameter that needs an option. needed: the missing option, or `a CONFIG`."""
    what = f"only works with {needed}"
    return [Problem(Code.USAGE_CONFLICT, what, key=name) for name, value in parameters.items() if value]


def show(lines: Iterable[str], values: Any) -> None:
    """Print a result after all other work is done, as lines or as JSON. Raises as `checked_output`."""
    with checked_output():
        if as_json.get():
            print_json(values)
        else:
            print_lines(lines)


def rows_output(output: Path | None, *, overwrite: bool, inputs: Iterable[Path]) -> Output | None:
    """The file that rows are written to; None for stdout, or without the option. Raises as `output_file.output`."""
    if output is None or str(output) == STDOUT:
        return None
    if output.suffix.lower() in (".gz", ".parquet"):
        what, fix = f"files of the type `{output.suffix}` are not written", "choose a name that ends in .jsonl or .csv"
        raise ConfigError(Problem(Code.OUTPUT_UNUSABLE, what, str(output), "--output", fix))
    begins = "" if output.suffix.lower() == ".csv" else "{"
    return output_file.output(output, "--output", overwrite=overwrite, inputs=tuple(inputs), begins=begins)


def write_rows(rows: Iterable[dict[str, Any]], file: Output | None) -> None:
    """Write rows as CSV if the file name ends in .csv, else as JSON lines. file: None for stdout."""
    from loratune.cli import display

    if file is None:
        display.write_rows(rows, raw_output())
        return
    with file.opened() as writable:
        is_csv = file.named.lower().endswith(".csv")
        stream: Any = EscapedStream(writable) if writable.isatty() and not is_csv else writable
        display.write_rows(rows, stream, as_csv=is_csv)
