"""Which tokens are attention sinks and whether they are dark. How to move them."""
