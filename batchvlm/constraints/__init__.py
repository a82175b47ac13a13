"""Constrained decoding: compute from a row's form the tokens that it may generate next.

    form -> plan (another process) -> grammar -> matcher (one a row) -> mask (one a step)

`plan.py` finds the strictest grammar for a form. `rewrite.py` and the modules it imports rewrite a
JSON schema with the keywords that grammars support. `constraints.py` is the interface for engines.
"""
