"""Damaged files for every reader: `python -m tests.fuzz --count 10000`. See `readers.py` and `mutations.py`."""
