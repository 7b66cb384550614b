"""`loratune sweep`: trains the same run with other settings, compares the trials, and publishes the best adapter.

`grid` says what is tried, `study` keeps the trials in an Optuna `storage`, `trials` trains and scores one of them, and
`running` is the sweep itself. How trials compare is in `report.study`.
"""
