"""Caption a dataset: `batchvlm run` with conf/caption.yaml.

python jobs/caption.py data=parquet data.path=IN model=hub model.path=NAME output.dir=OUT
accelerate launch jobs/caption.py ...          one process a GPU
"""

from batchvlm.cli import leave, run_app

if __name__ == "__main__":
    leave(run_app("caption"))
