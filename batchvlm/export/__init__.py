"""Export the answers of an output folder in formats of other tools."""
