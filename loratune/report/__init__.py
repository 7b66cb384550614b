"""The page of `loratune report`: one HTML file on an adapter and its run, or on a sweep."""
