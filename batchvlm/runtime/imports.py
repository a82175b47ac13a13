"""What all worker processes need, imported once: by the process that they are forked from."""

from importlib import import_module

from batchvlm.model.loading import has_torchvision

# Hides one that does not import, before transformers looks for it.
has_torchvision()

for name in (
    "batchvlm.preprocess.preprocessor",
    "transformers.image_processing_utils",
    "transformers.processing_utils",
    "transformers.tokenization_utils_tokenizers",
):
    import_module(name)
