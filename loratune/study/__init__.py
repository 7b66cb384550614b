"""A sweep: `grid` has the values that are tried, `trials` trains a trial, `sweep` keeps the study and runs the loop."""
