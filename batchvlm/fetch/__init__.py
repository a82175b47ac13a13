"""Images behind addresses: fetched ahead of the workers, where the configuration allows it.

addresses.py  which addresses may be asked at all
client.py     one address -> bytes: limits, redirects, retries
ahead.py      records -> records with what their addresses gave, many at once
"""
