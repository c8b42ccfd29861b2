"""Many cells: what to run and the tables that come of it."""
