"""Filters at sites of a running model, through nnsight."""
