"""The command line: parse, call the public API, print. Everything heavy is imported inside the commands.

`application` defines the shared options, `boundary` turns errors into lines and exit codes, and `terminal` shows
events. Besides the API, only the config, errors, events, console and system modules are imported.
"""

from loratune.cli import chat as chat
from loratune.cli import config as config
from loratune.cli import evaluate as evaluate
from loratune.cli import exports as exports
from loratune.cli import generate as generate
from loratune.cli import quickstart as quickstart
from loratune.cli import training as training
from loratune.cli.application import app as app
