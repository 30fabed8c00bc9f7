"""What stands around every script: arguments, progress, the record of a run."""
