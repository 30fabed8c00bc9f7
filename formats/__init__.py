"""Files of other programs to checkpoints and back; `registry.py` has the list. Only convert.py calls these."""
