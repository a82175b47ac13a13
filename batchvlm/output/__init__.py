"""Results -> parts: each shard's rows, in input order, on disk completely or not at all.

folder       where everything lies, and every call that touches the disk
fingerprint  what the answers depend on, as a digest and as differences
run_file     the run's identity and plan, written once
schema       the columns, and results as Arrow tables
segments     finished rows of unfinished shards
writer       one shard: results in any order -> segments -> part
"""
