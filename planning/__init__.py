"""Plan a run before it starts: parameters, memory, time, cost and loss by the formulas of docs/planning.md."""
