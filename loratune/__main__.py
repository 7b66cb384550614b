"""`python -m loratune`, so that `accelerate launch -m` and `torchrun -m` can start it."""

from loratune.cli import main

main()
