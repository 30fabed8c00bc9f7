"""Prompts of ids in, ids out."""
