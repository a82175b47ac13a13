"""What all worker processes need, imported once: by the process that they are forked from."""

from batchvlm.loading import has_torchvision

# Hides one that does not import, before transformers looks for it.
has_torchvision()

from transformers import (  # noqa: E402, F401
    image_processing_utils,
    processing_utils,
    tokenization_utils_tokenizers,
)

import batchvlm.preprocess  # noqa: E402, F401
