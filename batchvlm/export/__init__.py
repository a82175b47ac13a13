"""Output folder -> the same answers in the shape that another tool reads."""
