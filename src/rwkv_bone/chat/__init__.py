"""A conversation with a model, in a terminal (`talk.py`), and answers to many prompts (`batch.py`)."""
