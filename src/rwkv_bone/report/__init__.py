"""The page that shows a run, `report.html`, made from the files in its results folder alone.

`run.py` reads the files, `charts.py` makes curves of them, `sections.py` the text and tables, `page.py` the file;
`compare.py` does the same for several runs. The standard library and numpy are enough.
"""
