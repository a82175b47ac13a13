"""Hub name or folder -> processor and model, in the dtype, quantization and place that is asked."""
