"""Extract JSON that fits a schema from each row's images: `batchvlm run` with conf/extract.yaml.

python jobs/extract.py data=parquet data.path=IN model=hub model.path=NAME output.dir=OUT
accelerate launch jobs/extract.py ...          one process a GPU
"""

from batchvlm.cli import leave, run_app

if __name__ == "__main__":
    leave(run_app("extract"))
