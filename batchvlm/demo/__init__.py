"""The demo: images of simple shapes, a small trained model that answers questions, and samples.

`batchvlm run` without arguments captions the bundled samples with the bundled model. Both come from
this package: `world` draws scenes, `questions` generates questions about them, `train` trains the
model, `evaluate` measures it and `samples` writes the table. Importing the package loads nothing.
"""

from pathlib import Path
from typing import Final

_HERE: Final = Path(__file__).parent

MODEL_DIR: Final = _HERE / "model"
"""The trained model, its tokenizer and its processor, saved by transformers."""

SAMPLES_PATH: Final = _HERE / "samples.parquet"
"""Images with questions and correct answers; some rows are broken on purpose."""

SCHEMA_PATH: Final = _HERE / "objects.schema.json"
"""The JSON schema of the answers to "List the objects as JSON."."""
