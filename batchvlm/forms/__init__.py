"""`task.output` -> the form that answers must have."""
