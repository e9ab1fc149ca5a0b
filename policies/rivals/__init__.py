"""Residency policies of the literature, to compare with: one interface, each from its paper."""
