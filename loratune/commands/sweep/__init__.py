"""`loratune sweep`: the same run with other settings, again and again, until the best of them is an adapter.

What is tried stands in `grid`, how long it may take in `budget`, who tries what in `study`, how it is trained in
`bench`, and all of it together in `running`. What trials came to, and how they compare, is `evaluation.study_results`.
"""
