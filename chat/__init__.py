"""Conversations: forms of records, templates, encoded samples."""
