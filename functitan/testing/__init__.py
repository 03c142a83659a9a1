"""Helpers for tests of programs written with functitan: asserts, laws, hypothesis strategies."""
