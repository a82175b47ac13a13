"""Commands to run before a job: `batchvlm plan` and `batchvlm preview`."""
