"""Forms -> which tokens a row may say next.

    form -> plan (another process) -> grammar -> matcher (one a row) -> mask (one a step)

`plan.py` finds the strictest grammar of a form; `rewrite.py` and what it stands on say a JSON
schema in the words that a grammar knows. `constraints.py` is what engines use.
"""
