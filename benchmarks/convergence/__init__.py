"""The claim of the Bone paper, tried: LoRA, rsLoRA, PiSSA, Bone, Bat and full fine-tuning, side by side.

`python -m benchmarks.convergence` runs what is missing (`__main__`): `series` says which runs, by `grid` where a search
goes on; `alone` gives each a process of its own, in which `training` makes it; `tasks` knows the data.
"""
