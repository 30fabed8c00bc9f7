"""Every way in which a model lies on a disk; `directory.py` is the front door."""
