"""Pictures and pages made from tables alone."""
