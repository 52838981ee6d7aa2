"""A model at work: loaded (`load.py`), answering (`stream.py`, `generate.py`), measured (`evaluate.py`)."""
