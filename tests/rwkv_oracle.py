"""Logits of the `rwkv` pip package, an independent implementation, in a process of its own.

The package decides at import which generation it runs, so it cannot share a process with another generation.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

TIME_LIMIT = 180  # seconds


def logits(checkpoint: Path, ids: list[int], version: int = 7, dtype: str = "fp32") -> np.ndarray:
    """Logits [T, V] of one sequence, computed on the CPU in `dtype` (fp32 or bf16) by the `rwkv` package.

    An initial state in the checkpoint is used: the package does that by itself for generations 5 and 6 (and transposes
    what it reads); for 7 it is put, as it is stored, into the state that the package starts from.
    """
    switches = {"RWKV_JIT_ON": "1", "RWKV_CUDA_ON": "0", "RWKV_V7_ON": "1" if version == 7 else "0"}
    command = [sys.executable, __file__, str(checkpoint), json.dumps(ids), dtype]
    done = subprocess.run(command, env={**os.environ, **switches}, capture_output=True, text=True, timeout=TIME_LIMIT)
    assert done.returncode == 0, done.stderr
    return np.array(json.loads(done.stdout.splitlines()[-1]), dtype=np.float32)


if __name__ == "__main__":
    from rwkv.model import RWKV

    path, tokens = sys.argv[1], json.loads(sys.argv[2])
    model = RWKV(model=path.removesuffix(".pth"), strategy=f"cpu {sys.argv[3]}")
    state = None
    if os.environ["RWKV_V7_ON"] == "1" and "blocks.0.att.time_state" in model.z:
        state = model.generate_zero_state()
        for layer in range(model.args.n_layer):
            state[3 * layer + 1][:] = model.z[f"blocks.{layer}.att.time_state"].float()
    output, _ = model.forward(tokens, state, full_output=True)
    print(json.dumps(output.float().reshape(len(tokens), -1).tolist()))
