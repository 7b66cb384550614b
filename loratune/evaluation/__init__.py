"""The trials of a study, compared on the same held-out rows."""
