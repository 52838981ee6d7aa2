"""Kills, failing disks, power cuts and flipped bits: nothing that a user has saved is ever lost by them.

shim.c, shim.py   the file operations of a process, counted below one folder: killed, failed once, or recorded
disk.py           what a disk may hold after a power cut, by such a record
server.py         programs of ours as processes that begin in milliseconds
runs.py           a small run, its faults, and the comparison with a run that had none
flips.py          single flipped bits, for every reader of our files
__main__.py       the long loop: `sh scripts/test_faults.sh`
"""
