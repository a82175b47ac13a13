"""Results -> parts: each shard's rows, in input order, on disk completely or not at all."""
