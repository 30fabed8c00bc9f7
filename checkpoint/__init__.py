"""Every way in which a model lies on a disk."""
