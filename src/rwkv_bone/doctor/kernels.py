"""The WKV operators of every generation, built and compared with their definition: kernels.py cpu|auto.

A process of its own: prints one JSON object a line, {level, what, text, remedy}.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
import torch.nn.functional as F

from rwkv_bone.ops import nvrtc, select_op
from rwkv_bone.ops.build import BuildError
from rwkv_bone.ops.launches import INPUTS
from rwkv_bone.ops.trial import LIMITS, OPERATORS, alone
from rwkv_bone.ops.wkv import run

GENERATIONS = {"wkv7": "RWKV-7", "wkv6": "RWKV-6", "wkv5": "RWKV-5"}
H, N, TOKENS = 2, 64, 33
INSTALL_COMPILER = "install a C++ compiler (Debian, Ubuntu: apt install g++)"


def tell(level: str, what: str, text: str, remedy: str = "") -> None:
    print(json.dumps({"level": level, "what": what, "text": text, "remedy": remedy}), flush=True)


def error_of(operator: str, device: torch.device) -> float:
    """The largest relative error, in norm, of outputs, last state and gradients, against the recurrence in float64."""
    draw = torch.Generator().manual_seed(0)
    one = OPERATORS[operator]

    def random(name: str) -> torch.Tensor:
        x = torch.randn((H, N) if name in one.per_head else (1, TOKENS, H, N), generator=draw)
        return F.normalize(x, dim=-1) * (-1 if name == "a" else 0.5) if name in "ab" else x

    exact = {name: random(name).to(device).double().requires_grad_() for name in INPUTS[operator]}
    state = torch.randn(1, H, N, N, generator=draw).to(device).double().requires_grad_()
    given = {name: x.detach().float().requires_grad_() for name, x in exact.items()}
    start = state.detach().float().requires_grad_()

    def all_of(result: Any, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
        y, last = result
        return [y, last, *torch.autograd.grad(y.square().sum() + last.square().sum(), leaves)]

    with alone():
        expected = all_of(one.reference(**exact, state=state), [*exact.values(), state])
        result = run(one, given, state=start, cu_seqlens=None, output_state=True, op="auto")
        found = all_of(result, [*given.values(), start])
    errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)]
    return max(error if error == error else float("inf") for error in errors)


def check(device: torch.device, name: str) -> None:
    for operator, generation in GENERATIONS.items():
        begin = time.perf_counter()
        form, sentence = select_op("auto", device, operator, N, torch.bfloat16)
        select_op("auto", device, operator, N, torch.float32)
        error = error_of(operator, device)
        took = time.perf_counter() - begin
        text = f"{generation} on {name}: {sentence.partition(': ')[2]}; error {error:.0e} of float64 ({took:.1f} s)"
        if not error < LIMITS[torch.float32]:
            remedy = "--op torch trains without compiled kernels; please report this"
            tell("problem", "kernels", f"{text}: the numbers are wrong", remedy)
        elif form == "torch":
            remedy = INSTALL_COMPILER if device.type == "cpu" else "the text above says what is in the way"
            tell("warning", "kernels", text, remedy)
        else:
            tell("fine", "kernels", text)


def main(accelerator: str) -> None:
    cards = 0 if accelerator == "cpu" or not torch.cuda.is_available() else torch.cuda.device_count()
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU alone"
    tell("fine", "torch", f"{torch.__version__} for {built}, sees {cards} GPU{'s' * (cards != 1)}")
    if cards:
        try:
            found = nvrtc.find()
            tell("fine", "NVRTC", f"{found.version[0]}.{found.version[1]}, which compiles the GPU's kernels")
        except BuildError as problem:
            tell("warning", "NVRTC", str(problem), "pip install nvidia-cuda-nvrtc")
    for number in range(cards):
        properties = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        tell("fine", "GPU", f"{number}: {properties.name}, {total / 2**30:.1f} GB, {free / 2**30:.1f} GB free")
        check(torch.device("cuda", number), f"GPU {number}")
    check(torch.device("cpu"), "the CPU")


if __name__ == "__main__":
    main(sys.argv[1])
