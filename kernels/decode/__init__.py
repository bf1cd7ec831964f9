"""Decode steps of one token: stages, how they wait for each other, and who runs them."""
