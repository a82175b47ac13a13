"""Fetch remote images ahead of the workers, if the configuration allows it.

addresses.py  decides which addresses may be requested
client.py     fetches one address: limits, redirects, retries
gate.py       limits connections and bytes in memory
ahead.py      fetches the images of records, many at once
"""
