"""Wrappers from function to function: derivatives, batches, donation."""
