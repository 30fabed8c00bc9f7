"""What doctor.py and `--check True` of the trainings look at: machine, tokenizer, data, weights, first steps."""
