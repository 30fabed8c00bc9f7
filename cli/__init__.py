"""Arguments, progress and the record of a run, shared by all scripts."""
