"""Screen and tokenize documents, and write them as token bins."""
