"""The table of mistakes that users make, with the errors they get. `test_user_errors.py` runs it."""
