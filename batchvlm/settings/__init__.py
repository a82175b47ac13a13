"""The command line -> a checked `JobConfig`, with one-line errors."""
