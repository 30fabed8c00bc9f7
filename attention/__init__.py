"""Scaled dot-product attention: masks, back-ends, key-value caches."""
