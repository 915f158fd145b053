"""quantkit: quantize large language models and run the quantized layers. Importing it imports nothing heavy."""

__version__ = "0.1.0"
