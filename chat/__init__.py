"""Read conversations of any form, apply chat templates, encode training samples."""
