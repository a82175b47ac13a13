"""Read each row's images into JSON by a schema: `batchvlm run` on conf/extract.yaml.

python jobs/extract.py data=parquet data.path=IN model=hub model.path=NAME output.dir=OUT
accelerate launch jobs/extract.py ...          one process a GPU
"""

import sys

from batchvlm.cli import run_app

if __name__ == "__main__":
    sys.exit(run_app("extract"))
