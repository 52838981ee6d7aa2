"""What a run would take, said before it: memory, disk and time. Nothing is written."""

# Before a module here imports Lightning: as in the run, without the libraries that it brings along.
import rwkv_bone.training  # noqa: F401
