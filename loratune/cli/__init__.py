"""The command line: parse, call one command, print. Everything heavy is imported inside the commands."""

from loratune.cli import chat as chat
from loratune.cli import config as config
from loratune.cli import evaluate as evaluate
from loratune.cli import export as export
from loratune.cli import generate as generate
from loratune.cli import init as init
from loratune.cli import merge as merge
from loratune.cli import push as push
from loratune.cli import report as report
from loratune.cli import sweep as sweep
from loratune.cli import training as training
from loratune.cli.application import app as app
