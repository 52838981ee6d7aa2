"""Files and folders of every format, as rows, texts or token ids."""
