"""A model at work: loaded (`load.py`), writing text (`generate.py`), measured (`evaluate.py`)."""
