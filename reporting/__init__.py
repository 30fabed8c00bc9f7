"""What a run did, from the files in its directory: its record, warnings, curves, and one page of HTML."""
