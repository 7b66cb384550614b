"""The command `chat`: a conversation in a terminal or through pipes."""

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from loratune.cli.application import (
    Adapters,
    AdapterScale,
    DataAssignments,
    Debug,
    Force,
    MaxNewTokens,
    NoSystem,
    System,
    Temperature,
    app,
    system_message,
)
from loratune.cli.boundary import boundary
from loratune.cli.options import as_options, problem_as_options
from loratune.codes import Code
from loratune.console import log, raw_output
from loratune.errors import ConfigError, DataError, LoratuneError, Problem
from loratune.system import output_file, signals
from loratune.system.files import path_problem
from loratune.text import plural

if TYPE_CHECKING:
    from loratune.adapter.chat import Chat, Reply

_HELP = (
    "/base           answer the last turn without the adapter",
    "/adapter NAME   switch to another adapter; without NAME, list them",
    "/system TEXT    set the system message; without TEXT, remove it",
    "/save FILE      write the conversation to FILE as training rows; to replace a file: /save --overwrite FILE",
    "/reset          remove all turns",
    "/help           show this",
    "/quit, /exit    end the chat, as Ctrl-D does",
    "//...           a turn that begins with /",
    "Ctrl-C stops an answer; the partial answer is kept",
)


@app.command()
def chat(
    adapters: Adapters,
    system: System = None,
    no_system: NoSystem = False,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    scale: AdapterScale = 1.0,
    overrides: DataAssignments = [],  # noqa: B006  typer copies it
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Chat with an adapter; /help lists the commands. From a pipe, each line is a turn."""
    with boundary(debug, memory_fix="free memory, lower --max-new-tokens, or begin anew with /reset"):
        given = system_message(system, none=no_system)

        import loratune

        named = loratune.Adapters(adapters, scale=scale, force=force, overrides=overrides)
        talk = named.chat(system=given, max_new_tokens=max_new_tokens, temperature=temperature)
        log(*map(as_options, talk.notes()))
        _Session(talk, tuple(named.opened.inputs()), terminal=sys.stdin.isatty() and sys.stdout.isatty()).run()


class _Session:
    """Reads lines and prints answers. In a terminal, an error in a line is only reported; elsewhere it ends the
    command."""

    def __init__(self, talk: "Chat", inputs: tuple[Path, ...], *, terminal: bool):
        self._talk, self._inputs, self._terminal = talk, inputs, terminal
        self._commands: dict[str, Callable[[str], None]] = {
            "/base": lambda _: self._answer(talk.ask_base),
            "/adapter": self._use,
            "/system": talk.set_system,
            "/save": self._save,
            "/reset": lambda _: talk.reset(),
            "/help": lambda _: log(*_HELP),
        }

    def run(self) -> None:
        """Process lines until the input ends."""
        if self._terminal:
            talk = self._talk
            several = f", which is {talk.name} of {', '.join(talk.names)}" if talk.names[1:] else ""
            log(f"{talk.adapter.where}{several}; /help lists what can be typed, /quit ends")
        for line in self._typed() if self._terminal else sys.stdin:
            if not line.strip():
                continue
            if line.strip() in ("/quit", "/exit"):
                return
            try:
                self._take(line.rstrip("\r\n"))
            except LoratuneError as error:
                if not self._terminal or any(one.code is Code.OUTPUT_FAILED for one in error.problems):
                    raise
                log(*(f"error: {problem_as_options(problem)}" for problem in error.problems))

    def _typed(self) -> Iterator[str]:
        """The typed lines. Editing and history use readline from the standard library, if available."""
        with suppress(ImportError):
            import readline  # noqa: F401  `input` uses it once it is imported
        while True:
            name = self._talk.name if self._talk.names else ""
            try:
                with signals.raise_on_signals():
                    line = input(f"{name}> ")
            except EOFError:
                print()
                return
            except signals.Termination:
                raise
            except KeyboardInterrupt:  # Ctrl-C at the prompt: the line is dropped, as in a shell
                print()
                continue
            yield line

    def _take(self, line: str) -> None:
        if any("\ud800" <= character <= "\udfff" for character in line):  # how Python represents undecodable bytes
            raise DataError(Problem(Code.USAGE_BAD_VALUE, "not UTF-8", "the line", fix="give it as text"))
        if not line.startswith("/") or line.startswith("//"):
            text = line[1:] if line.startswith("/") else line
            self._answer(lambda **how: self._talk.ask(text, **how))
            return
        name, _, argument = line.partition(" ")
        if name not in self._commands:
            fix = "/help lists the commands; a turn that begins with / is written with //"
            raise ConfigError(Problem(Code.USAGE_BAD_VALUE, f"there is no command {name}", fix=fix))
        self._commands[name](argument.strip())

    def _answer(self, ask: "Callable[..., Reply]") -> None:
        """Print an answer, in a terminal as a stream. ask: a method of `Chat`; accepts `on_text` and `stopped`."""
        if not self._terminal:
            reply = ask()
            print(reply.text, file=raw_output(), flush=True)
        else:
            with signals.defer_signals(_report_stop) as stop:
                try:
                    reply = ask(
                        on_text=lambda text: print(text, end="", flush=True), stopped=lambda: stop.requested is not None
                    )
                finally:  # a closed terminal sends a signal, and printing to it fails
                    if stop.requested is signals.Termination:
                        raise signals.Termination
        if reply.cut:
            kept = "the beginning of the answer is kept" if reply.text else "there is no answer yet"
            log(f"cut off: {as_options(reply.cut)}{f'; {kept}' if reply.cut == 'stopped' else ''}")

    def _use(self, name: str) -> None:
        if name:
            self._talk.use(name)
        else:
            log(f"{self._talk.name} answers, of {', '.join(self._talk.names) or 'one adapter without a name'}")

    def _save(self, argument: str) -> None:
        rows = self._talk.rows()
        name = argument.removeprefix("--overwrite ").strip()
        if reason := path_problem(name) or ("" if name else "is empty"):
            raise ConfigError(Problem(Code.USAGE_BAD_VALUE, f"the path {reason}", key="/save", fix="write /save FILE"))
        file = output_file.output(Path(name).expanduser(), "/save", overwrite=name != argument, inputs=self._inputs)

        from loratune.cli import display

        with file.opened() as writable:
            display.write_rows(rows, writable)
        log(f"{name}: {plural(len(rows), 'row')} written")


def _report_stop(_: str) -> None:
    signals.write_line("stopping; once more ends the chat")
