"""Wrappers from function to function: derivatives, batches, later remat, precision, float8, async TP and compilation."""
