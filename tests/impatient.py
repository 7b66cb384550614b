"""`python -m loratune`, whose processes give each other up after 8 s without a sign of life in place of 30 s."""

from loratune.__main__ import main
from loratune.training import distributed

distributed.PATIENCE = 8.0
main()
