"""What a person sees before a job: `batchvlm plan` and `batchvlm preview`."""
