"""Is this machine fit for training: `python -m rwkv_bone.doctor`, begun in `examine.py`.

`machine.py` and `packages.py` look at what is there, with the standard library alone: they must be able to say what is
missing. `kernels.py` and the programs that `trials.py` runs are processes of their own, which may fail in any way.
"""
