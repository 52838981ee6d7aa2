"""Training under Lightning with DeepSpeed ZeRO; `fit.fit` is the way in."""
