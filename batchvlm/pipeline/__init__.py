"""Joins all stages: a job, from its settings to its finished shards."""
