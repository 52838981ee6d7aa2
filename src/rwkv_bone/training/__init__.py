"""Training under Lightning with DeepSpeed ZeRO; `fit.fit` is the way in."""

from rwkv_bone.training.libraries import load_lightning

# Before any module of this package imports it.
load_lightning()
