"""Passes: small functions from a captured program to a captured program."""
