"""The same of image encoders: outlier tokens, sinks, and registers. Object discovery beside them."""
