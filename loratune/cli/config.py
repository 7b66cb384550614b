"""The commands `init`, `params`, `schema` and `explain`, which create and explain configs, and `env`."""

import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loratune.cli.application import STDOUT, Assignments, Debug, Json, app, check_paths, needs, program, show
from loratune.cli.boundary import boundary, checked_output
from loratune.cli.options import as_options
from loratune.codes import Code
from loratune.console import as_json, log, print_json, print_lines
from loratune.errors import ConfigError, Problem
from loratune.events import Event, FinishedEvent, listener
from loratune.text import Detail, block, one_line, shell_word

if TYPE_CHECKING:
    from loratune import InitialConfig

_YAML = (".yaml", ".yml")
_SCHEMAS = Path(__file__).with_name("schemas.json")
"""Command → the schema of what it prints; `scripts/write_reference.py` writes it."""
OptionalConfig = Annotated[Path | None, typer.Argument(metavar="CONFIG", help="The YAML file of a run.")]


@app.command()
def init(
    rows: Annotated[
        str, typer.Argument(metavar="DATA", help="The training rows: a file, a directory, a glob, or a hub id.")
    ],
    model: Annotated[str, typer.Option("--model", metavar="NAME_OR_DIR", help="The base model.")],
    output: Annotated[
        str, typer.Option("--output", metavar="FILE", help="The config to write, which must not exist; - is stdout.")
    ] = "config.yaml",
    overrides: Assignments = [],  # noqa: B006  typer copies it
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a config for rows and a model, with reasons. No weights are loaded or downloaded."""
    with boundary(debug):
        check_paths(rows=rows, model=model, output=output)

        import loratune

        terminal, to_file = listener(), output != STDOUT

        def listen(event: Event) -> None:
            terminal(event)
            if isinstance(event, FinishedEvent) and isinstance(event.result, loratune.InitialConfig):
                if not (to_file or as_json):
                    print(event.result.text, end="")
                _show_started(event.result, output)

        loratune.init(rows, model=model, output=output if to_file else None, overrides=overrides, on_event=listen)


def _show_started(started: "InitialConfig", output: str) -> None:
    """Print the findings of `init`, on stderr if the config goes to stdout, a pipe or a device."""
    from loratune.cli import display

    if as_json.get():
        show([], display.started_values(started, output if output != STDOUT else None))
        return
    lines = display.started(started)
    lines += [("!", line) for line in display.started_notes(started) if not isinstance(line, Detail)]
    with checked_output():
        if Path(output).is_file() and not output.startswith(("/dev/", "/proc/")):
            command = f"{program()} train {shell_word(output)}"
            lines += [("look", f"{command} --dry-run"), ("train", command)]
            print_lines(block(f"{display.mark('good')} {one_line(output)} is written", lines))
        else:
            log(*(f"{name}: {value}" for name, value in lines))


@app.command()
def params(
    config_file: OptionalConfig = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME_OR_DIR", help="A model, with the default LoRA settings.")
    ] = None,
    adapter: Annotated[Path | None, typer.Option(metavar="DIR", help="An adapter directory.")] = None,
    overrides: Assignments = [],  # noqa: B006  typer copies it
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Count trainable parameters, and estimate the memory of a run. No weights of the base are loaded or downloaded."""
    with boundary(debug):
        if sum(value is not None for value in (config_file, model, adapter)) != 1:
            raise ConfigError(Problem(Code.USAGE_CONFLICT, "give exactly one of CONFIG, --model and --adapter"))
        check_paths(adapter=adapter)
        if adapter and overrides:
            what = "does not work with --adapter, which has its settings"
            raise ConfigError(Problem(Code.USAGE_CONFLICT, what, key="--set", fix="leave it out"))

        import loratune
        from loratune import config

        if adapter:
            from loratune.api.params import adapter_stats

            stats = adapter_stats(adapter)

            from loratune.cli import display

            show(display.stats(str(adapter), stats), asdict(stats))
            return
        run = config.load(config_file, overrides) if config_file else config.for_model(str(model), overrides)
        found = loratune.count_parameters(run)

        from loratune.cli import display

        log(*found.notes)
        show(display.params(found), found.to_dict())


@app.command()
def schema(
    command: Annotated[
        str | None,
        typer.Option("--for", metavar="COMMAND", help="The schema of what COMMAND prints with --json, or of `error`."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Print the JSON schema of a config, or of what a command prints."""
    with boundary(debug):
        from loratune.config.keys import json_schema

        known = json.loads(_SCHEMAS.read_text(encoding="utf-8")) if command is not None else {}
        if command is not None and command not in known:
            what, fix = f"no command prints JSON under the name {command!r}", f"give one of {', '.join(known)}"
            raise ConfigError(Problem(Code.USAGE_BAD_VALUE, what, key="--for", fix=fix))
        with checked_output():
            print_json(json_schema() if command is None else known[command])


@app.command()
def explain(
    key: Annotated[
        str | None,
        typer.Argument(
            metavar="KEY",
            help="A key, a section, the start of a key, or an error's code; by default all keys. "
            "auto: what a run of CONFIG would choose itself.",
        ),
    ] = None,
    config_file: OptionalConfig = None,
    overrides: Assignments = [],  # noqa: B006  typer copies it
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Explain a key of the config. Prints its meaning, default and cost; with CONFIG, also its value and line."""
    with boundary(debug):
        import loratune

        if key and key.endswith(_YAML) and not (config_file and config_file.name.endswith(_YAML)):
            config_file, key = Path(key), str(config_file) if config_file else None
        if config_file is None and (problems := needs({"overrides": overrides}, "a CONFIG")):
            raise ConfigError(problems)
        found = loratune.explain(key, config_file, overrides)
        with checked_output():
            if as_json:
                values = found.to_dict()
                for setting in (one for key in values["keys"].values() for one in key["in_force"]):
                    setting["source"] = as_options(setting["source"])
                print_json(values)
                return
            width = max(60, shutil.get_terminal_size().columns) if sys.stdout.isatty() else sys.maxsize
            for number, (title, lines) in enumerate(found.blocks()):
                if number:
                    print()
                is_key = lines[0][0] in ("meaning", "value", "reported when")
                room = sys.maxsize if is_key else width - max(len(name) for name, _ in lines) - 4
                print_lines(block(title, [(name, _shortened(as_options(text), room)) for name, text in lines]))


@app.command()
def env(
    self_test: Annotated[
        bool,
        typer.Option("--self-test", help="Also train and load tiny models here, and compare them with stock PEFT."),
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Describe this machine, and what it lacks for training."""
    with boundary(debug):
        import loratune

        if self_test and "torch" not in sys.modules:
            # By default, threads of OpenMP spin for others that have no processor because other programs use it.
            os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        found = loratune.environment(self_test=self_test)

        from loratune.cli import display

        show(display.environment(found), found.to_dict())
        found.check_passed()


def _shortened(text: str, room: int) -> str:
    return text if len(text) <= room else f"{text[: room - 1]}…"
