"""From files to files: an adapter folded into its base (`merge.py`), or put into another format (`convert.py`)."""
