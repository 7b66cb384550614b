"""The study of a sweep: `grid` has the values that are tried, `study` keeps the trials in a `storage`, `trials` runs
them.

`commands.sweep` trains and compares the trials. `report.study` shows how they compare.
"""
