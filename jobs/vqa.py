"""Answer each row's question about its images: `batchvlm run` with conf/vqa.yaml.

python jobs/vqa.py data=parquet data.path=IN model=hub model.path=NAME output.dir=OUT
accelerate launch jobs/vqa.py ...          one process a GPU
"""

from batchvlm.cli import leave, run_app

if __name__ == "__main__":
    leave(run_app("vqa"))
