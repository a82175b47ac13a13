"""`python -m batchvlm` is the `batchvlm` command."""

from batchvlm.cli import program

if __name__ == "__main__":
    program()
