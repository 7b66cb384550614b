"""The command line: parse, call one command, print. Everything heavy is imported inside the commands."""

from loratune.cli import adapters as adapters
from loratune.cli import exporting as exporting
from loratune.cli import training as training
from loratune.cli.application import app as app
