"""What animals each image shows, as JSON: `batchvlm run` on conf/animals.yaml.

python jobs/animals.py data=parquet data.path=IN model=hub model.path=NAME output.dir=OUT

`parsed.location`, `parsed.activity`, `parsed.animals_seen` (1 to 5) and `parsed.animals` hold the
answer, whatever the model would have liked to say.
"""

import sys

from batchvlm.cli import run_app

if __name__ == "__main__":
    sys.exit(run_app("animals"))
