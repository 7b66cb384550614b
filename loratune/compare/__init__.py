"""Whether an adapter is better: rows → losses and answers → metrics with intervals → `Comparison` → verdict.

- `engine`: computes all losses of rows. `losses`: `RowLosses`, and how two models differ on the same rows.
- `answers`: what models do on rows, with greedy answers; `metrics`: the metrics of these, and all names.
- `objectives`, `preferences`: the loss and the metrics of preferences; `collapse`: whether prompts still matter.
- `comparison`: `Comparison`, with `.metrics`, `.verdict`, `.require("exact_match>=0.9", "loss<base")`, `.to_dict()`.
- `requirements`: what can be required; `text`: a comparison in words.
- `gain`: what training measures of a new adapter.
- `tasks`, `harness`: tasks of the lm-evaluation-harness, which only `harness` imports.
"""
