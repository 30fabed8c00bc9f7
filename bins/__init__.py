"""Documents screened, tokenized and written as token bins."""
