"""Adapters put into, switched, merged and taken out of a tree of modules."""
