"""Extract the animals in each image as JSON: `batchvlm run` with conf/animals.yaml.

python jobs/animals.py data=parquet data.path=IN model=hub model.path=NAME output.dir=OUT

The answer is in `parsed.location`, `parsed.activity`, `parsed.animals_seen` (1 to 5) and
`parsed.animals`. Decoding enforces these fields.
"""

from batchvlm.cli import leave, run_app

if __name__ == "__main__":
    leave(run_app("animals"))
