"""Edits of a running model: filters at sites (through nnsight), attention edits, and registers."""
