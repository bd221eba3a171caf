"""Verifiers: from a problem and a response to a reward of 0 or 1."""
