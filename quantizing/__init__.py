"""What quantize.py does: its settings, a model quantized block by block, and the table of all methods (the ladder)."""
