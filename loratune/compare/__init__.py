"""Evaluation of adapters: rows → losses and answers → metrics with intervals → `Comparison` → verdict.

- `engine`: computes all losses of rows. `answers`: losses, greedy answers and rewards of each row.
- `metrics`: names, `RowLosses`, paired differences between two models, scores of answers.
- `objectives`: the losses and metrics of preferences; `preferences` computes them, in training too.
- `losses`: `LossComparison`, base and adapter on the same rows; `collapse`: whether predictions depend on the prompt.
- `comparison`: `Comparison`, with `.metrics`, `.verdict`, `.require("exact_match>=0.9", "loss<base")`, `.to_dict()`.
- `requirements`: parses and checks requirements; `text`: formats a comparison as text.
- `tasks`, `harness`: tasks of the lm-evaluation-harness, which only `harness` imports.
"""
