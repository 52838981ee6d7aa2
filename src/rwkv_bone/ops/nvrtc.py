"""NVIDIA's run-time compiler: CUDA C++ as text -> machine code for one card, without nvcc and without a C++ compiler.

Every CUDA build of torch brings it along (libnvrtc). It is called through ctypes, as its C interface is documented in
NVIDIA's NVRTC manual.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from rwkv_bone.ops.build import BuildError

OPTIONS = ("-std=c++17", "-default-device")
MAJORS = (13, 12)  # of CUDA, for which there are builds of torch


class Nvrtc:
    """One libnvrtc. `version` is (major, minor); `architectures` are those it knows, ascending, 90 for sm_90."""

    def __init__(self, path: Path | str):
        self.path = path
        if isinstance(path, Path):
            # Otherwise NVRTC looks for it on the loader's own paths, which a pip package is not on.
            for builtins in sorted(path.parent.glob("libnvrtc-builtins.so*")):
                ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)
        self._library = ctypes.CDLL(str(path))
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor, count = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        self._check("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = (major.value, minor.value)
        self._check("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        known = (ctypes.c_int * count.value)()
        self._check("nvrtcGetSupportedArchs", known)
        self.architectures = tuple(known)

    def _check(self, function: str, *arguments: object) -> None:
        if code := getattr(self._library, function)(*arguments):
            reason = self._library.nvrtcGetErrorString(code).decode()
            raise BuildError(f"{function} of {self.path} failed: {reason}")

    def target(self, capability: tuple[int, int]) -> str:
        """What to compile for a card: "sm_90" is its machine code, "compute_90" code that the driver translates.

        Machine code also runs on cards of the same generation that are newer. Raises BuildError for a card that is
        older than all that this NVRTC knows.
        """
        card = 10 * capability[0] + capability[1]
        known = [architecture for architecture in self.architectures if architecture <= card]
        if not known:
            raise BuildError(
                f"the card's architecture sm_{card} is too old for NVRTC {self.version[0]}.{self.version[1]}, which "
                f"knows sm_{self.architectures[0]} and newer: install torch for an older CUDA, or use --op torch"
            )
        return f"{'sm' if known[-1] // 10 == capability[0] else 'compute'}_{known[-1]}"

    def compile(self, source: str, headers: Mapping[str, str], target: str) -> bytes:
        """Machine code (a cubin) for a target "sm_XY", PTX for "compute_XY"; BuildError with the compiler's words.

        headers: the text of each file that `source` may include, by its name.
        """
        program = ctypes.c_void_p()
        texts = (ctypes.c_char_p * len(headers))(*(text.encode() for text in headers.values()))
        names = (ctypes.c_char_p * len(headers))(*(name.encode() for name in headers))
        self._check(
            "nvrtcCreateProgram", ctypes.byref(program), source.encode(), b"kernels.cu", len(headers), texts, names
        )
        try:
            words = [f"--gpu-architecture={target}".encode(), *(option.encode() for option in OPTIONS)]
            failed = self._library.nvrtcCompileProgram(program, len(words), (ctypes.c_char_p * len(words))(*words))
            if failed:
                last = "\n".join(self._output("ProgramLog", program).decode().strip("\0\n ").splitlines()[-12:])
                raise BuildError(f"NVRTC could not compile a kernel for {target}; its last lines:\n{last}")
            return self._output("CUBIN" if target.startswith("sm_") else "PTX", program)
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _output(self, what: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._check(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._check(f"nvrtcGet{what}", program, buffer)
        return buffer.raw


@functools.cache
def find() -> Nvrtc:
    """The libnvrtc of this torch's CUDA. Raises BuildError if there is none that loads."""
    majors = (int(torch.version.cuda.split(".")[0]),) if torch.version.cuda else MAJORS
    problems = []
    for major in majors:
        for path in places(major):
            try:
                return Nvrtc(path)
            except (OSError, AttributeError) as problem:
                problems.append(f"{path} ({problem})")
    package = "nvidia-cuda-nvrtc" if majors[0] > 12 else "nvidia-cuda-nvrtc-cu12"
    found = f"; found, but not usable: {problems[0]}" if len(problems) > 1 else ""
    raise BuildError(
        f"NVRTC, which compiles the CUDA kernels, was not found (libnvrtc.so.{majors[0]}){found}: "
        f"`pip install {package}` brings it"
    )


def places(major: int) -> Iterator[Path | str]:
    """Where libnvrtc of this CUDA may be: pip packages, torch's own folder, conda, a toolkit, the loader's paths."""
    name = f"libnvrtc.so.{major}"
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(root) for root in (spec and spec.submodule_search_locations or ())]
    folders = [root / folder / "lib" for root in roots for folder in (f"cu{major}", "cuda_nvrtc")]
    folders += [Path(torch.__file__).parent / "lib", Path(sys.prefix) / "lib"]
    folders += [Path(home) / "lib64" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    yield from (folder / name for folder in folders if (folder / name).is_file())
    yield name
