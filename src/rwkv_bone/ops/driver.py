"""NVIDIA's driver, by ctypes: load compiled kernels onto a card and launch them on PyTorch's streams.

The functions are those of libcuda.so.1, as NVIDIA's CUDA Driver API manual documents them. Kernels run in the primary
context of a device, which is PyTorch's, too.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from rwkv_bone.ops.launches import STAND_IN_BITS, Launch

LIBRARY = "libcuda.so.1"
# Codes of cuModuleLoadData for code that this driver or this card does not take: INVALID_IMAGE, NO_BINARY_FOR_GPU,
# INVALID_PTX, UNSUPPORTED_PTX_VERSION, JIT_COMPILER_NOT_FOUND.
NOT_LOADABLE = (200, 209, 218, 222, 221)
NOT_FOUND = 500
STATIC_SHARED = 48 * 1024  # bytes of shared memory that a kernel may have without asking
MAX_SHARED_OPTIN = 97  # CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
ARGUMENT_BYTES = 512  # of a kernel's struct, at most
MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class DriverError(RuntimeError):
    """There is no driver, or it refused something. The text says what and why."""


class Kernel(NamedTuple):
    """A kernel on a device."""

    function: ctypes.c_void_p
    shared: int  # bytes of dynamic shared memory that a block of it needs


class Call:
    """Planned launches on a device: all but the pointers and the stream. Threads may share it."""

    def __init__(self, driver: Driver, kernels: Mapping[str, Kernel], launches: Sequence[Launch], device: int):
        self._put, self._device = driver.put, device
        # Launches that follow each other and take the same struct, of which all words but the pointers are known.
        self._groups = []
        for arguments, group in itertools.groupby(launches, key=lambda launch: launch.arguments):
            form = struct.Struct(f"={len(arguments) // 8}Q")
            if form.size > ARGUMENT_BYTES:
                raise ValueError(f"{len(arguments)} bytes of arguments, at most {ARGUMENT_BYTES}")
            # A stand-in becomes (what is added to it, the pointer's number), another word (itself, -1).
            words = [(word % 2**STAND_IN_BITS, word // 2**STAND_IN_BITS - 1) for word in form.unpack(arguments)]
            prepared = [
                (kernels[name].function.value, blocks, threads, kernels[name].shared, name)
                for name, blocks, threads, _ in group
            ]
            self._groups.append((form.pack_into, words, prepared))

    def __call__(self, pointers: Sequence[int | None], stream: int) -> None:
        """Puts them on a stream, one after another, and waits for nothing. Raises DriverError."""
        buffer, address = _own.arguments
        known = [*pointers, 0]
        for pack_into, words, launches in self._groups:
            pack_into(buffer, 8, *[added + known[number] for added, number in words])
            self._put(launches, self._device, stream, address)


class _Arguments(threading.local):
    """A thread's own place for a struct, and before it the list that the driver takes: that struct's address."""

    def __init__(self):
        buffer = (ctypes.c_uint64 * (1 + ARGUMENT_BYTES // 8))()
        address = ctypes.addressof(buffer)
        buffer[0] = address + 8
        self.arguments = buffer, address


_own = _Arguments()


class Driver:
    """One loaded libcuda. Raises DriverError wherever a call fails."""

    def __init__(self, path: str = LIBRARY):
        try:
            self._library = ctypes.CDLL(path)
        except OSError as problem:
            raise DriverError(
                f"the NVIDIA driver's {LIBRARY} cannot be loaded ({problem}): install the driver, or make its folder "
                "known to the loader (LD_LIBRARY_PATH)"
            ) from problem
        # Numbers go to the driver without an object for each.
        sizes, pointers = [ctypes.c_uint] * 7, [ctypes.c_void_p] * 3
        self._library.cuLaunchKernel.argtypes = [ctypes.c_void_p, *sizes, *pointers]
        self._contexts: dict[int, ctypes.c_void_p] = {}
        self._call("cuInit", ctypes.c_uint(0))

    def version(self) -> tuple[int, int]:
        """The newest CUDA that this driver can run."""
        number = ctypes.c_int()
        self._call("cuDriverGetVersion", ctypes.byref(number))
        return number.value // 1000, number.value % 1000 // 10

    def load(self, image: bytes, names: Sequence[str], device: int) -> dict[str, Kernel]:
        """The kernels of these names out of a cubin or PTX, on a device."""
        module, kernels = ctypes.c_void_p(), {}
        with self._current(device):
            code = self._library.cuModuleLoadData(ctypes.byref(module), ctypes.c_char_p(image))
            if code in NOT_LOADABLE:
                major, minor = self.version()
                raise DriverError(
                    f"the driver (for CUDA {major}.{minor}) cannot load the compiled kernels ({self._reason(code)}): "
                    "update the driver, or install torch for a CUDA that is no newer than the driver's"
                )
            self._check("cuModuleLoadData", code)
            for name in names:
                function = ctypes.c_void_p()
                self._call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
                kernels[name] = Kernel(function, self._shared(module, name))
                self._allow(name, kernels[name], device)
        return kernels

    def _shared(self, module: ctypes.c_void_p, name: str) -> int:
        """The dynamic shared memory of a kernel: what the source says in a global next to it, or none."""
        address, size, found = ctypes.c_uint64(), ctypes.c_size_t(), ctypes.c_uint32()
        code = self._library.cuModuleGetGlobal_v2(
            ctypes.byref(address), ctypes.byref(size), module, f"{name}_shared".encode()
        )
        if code == NOT_FOUND:
            return 0
        self._check("cuModuleGetGlobal", code)
        self._call("cuMemcpyDtoH_v2", ctypes.byref(found), address, ctypes.c_size_t(ctypes.sizeof(found)))
        return found.value

    def _allow(self, name: str, kernel: Kernel, device: int) -> None:
        """Lets a kernel have the shared memory that it needs, if that is more than any kernel may have."""
        if kernel.shared <= STATIC_SHARED:
            return
        handle, most = ctypes.c_int(), ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(handle), ctypes.c_int(device))
        self._call("cuDeviceGetAttribute", ctypes.byref(most), ctypes.c_int(MAX_SHARED_OPTIN), handle)
        if kernel.shared > most.value:
            raise DriverError(
                f"{name} needs {kernel.shared} bytes of shared memory per block, and this card has {most.value}"
            )
        self._call("cuFuncSetAttribute", kernel.function, ctypes.c_int(MAX_DYNAMIC_SHARED), ctypes.c_int(kernel.shared))

    def prepare(self, kernels: Mapping[str, Kernel], launches: Sequence[Launch], device: int) -> Call:
        """The launches, ready to be put on streams again and again: what does not change is worked out here."""
        return Call(self, kernels, launches, device)

    def launch(self, kernels: Mapping[str, Kernel], launches: Sequence[Launch], device: int, stream: int) -> None:
        """Puts the launches on a stream, one after another, and waits for nothing."""
        self.prepare(kernels, launches, device)((), stream)

    def put(self, launches: Sequence[tuple[object, ...]], device: int, stream: int, arguments: int) -> None:
        """Launches that take the struct at the address `arguments`, each as `Call` has it."""
        launch = self._library.cuLaunchKernel
        entered = self._enter(device)
        try:
            for function, blocks, threads, shared, name in launches:
                # The driver copies the struct before it returns.
                code = launch(function, blocks, 1, 1, threads, 1, 1, shared, stream, arguments, None)
                if code:
                    self._check(f"launching {name} with {blocks} blocks of {threads} threads", code)
        finally:
            if entered:
                self._leave()

    @contextmanager
    def _current(self, device: int) -> Iterator[None]:
        """The device's primary context, current in this thread."""
        entered = self._enter(device)
        try:
            yield
        finally:
            if entered:
                self._leave()

    def _enter(self, device: int) -> bool:
        """Makes that context current where it is not: autograd's threads may have none, or another one."""
        context = self._contexts.get(device)
        if context is None:
            handle, context = ctypes.c_int(), ctypes.c_void_p()
            self._call("cuDeviceGet", ctypes.byref(handle), ctypes.c_int(device))
            self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)
            self._contexts[device] = context
        before = ctypes.c_void_p()
        self._call("cuCtxGetCurrent", ctypes.byref(before))
        if before.value == context.value:
            return False
        self._call("cuCtxPushCurrent_v2", context)
        return True

    def _leave(self) -> None:
        self._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def _call(self, function: str, *arguments: object) -> None:
        self._check(function, getattr(self._library, function)(*arguments))

    def _check(self, what: str, code: int) -> None:
        if code:
            raise DriverError(f"{what} failed: {self._reason(code)}")

    def _reason(self, code: int) -> str:
        text = ctypes.c_char_p()
        self._library.cuGetErrorString(ctypes.c_int(code), ctypes.byref(text))
        return f"{text.value.decode() if text.value else 'unknown error'}, code {code}"


@functools.cache
def find() -> Driver:
    """The machine's driver. Raises DriverError if there is none."""
    return Driver()
