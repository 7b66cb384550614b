"""The study of a sweep: `grid` says what is tried, `study` keeps the trials in a `storage`, `trials` is one of them.

`commands.sweep` trains and compares them. How trials compare is in `report.study`.
"""
