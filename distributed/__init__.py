"""Where a step runs: one process or many, behind one interface."""
