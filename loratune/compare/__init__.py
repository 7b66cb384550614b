"""Whether an adapter is better: rows → losses and answers → metrics with intervals → `Comparison` → verdict.

- `engine`: computes all losses of rows. `answers`: what models do on rows, with greedy answers.
- `metrics`: names, `RowLosses`, how two models differ on the same rows, scores of answers.
- `objectives`: the losses and the metrics of preferences; `preferences` computes them, in training too.
- `collapse`: whether prompts still matter; `gain`: what training measures of a new adapter.
- `comparison`: `Comparison`, with `.metrics`, `.verdict`, `.require("exact_match>=0.9", "loss<base")`, `.to_dict()`.
- `requirements`: what can be required; `text`: a comparison in words.
- `tasks`, `harness`: tasks of the lm-evaluation-harness, which only `harness` imports.
"""
