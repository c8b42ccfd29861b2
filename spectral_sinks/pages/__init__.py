"""Pages for a browser: the report of a model and the explorer of a text, each one file without a network."""
