"""Stand-ins for a machine with an NVIDIA card: an `nvidia-smi` for PATH, and an importable PyTorch built for CUDA."""

from pathlib import Path

# Driver -> (the CUDA it runs, whether it can be asked for compute_cap, the words around it in its banner).
DRIVERS = {
    "470.256.02": ("11.4", False, "Driver Version: {driver}   CUDA Version: {cuda}"),
    "525.60.13": ("12.0", True, "Driver Version: {driver}    CUDA Version: {cuda}"),
    "570.133.07": ("12.8", True, "Driver Version: {driver}     CUDA Version: {cuda}"),
    "580.65.06": ("13.0", True, "Driver Version: {driver}      CUDA Version: {cuda}"),
    "610.43.02": ("13.3", True, "KMD Version: {driver}     CUDA UMD Version: {cuda}"),
}
RTX_3090 = ("NVIDIA GeForce RTX 3090", "8.6")
NOT_LOADED = (
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest NVIDIA "
    "driver is installed and running."
)


def write_program(path: Path, body: str) -> None:
    path.unlink(missing_ok=True)  # what is there may be a link to a program of this machine
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def write_smi(folder: Path, driver: str, cards: list[tuple[str, str]] = (RTX_3090,)) -> None:
    """An nvidia-smi as this driver's, with these (name, compute capability)."""
    cuda, knows_capability, words = DRIVERS[driver]
    full = "\n".join(f"{driver}, {name}, {capability}" for name, capability in cards)
    short = "\n".join(f"{driver}, {name}" for name, _ in cards)
    if not knows_capability:
        full = 'Field "compute_cap" is not a valid field to query.'
    banner = f"| NVIDIA-SMI {driver}    {words.format(driver=driver, cuda=cuda)}     |"
    write_program(
        folder / "nvidia-smi",
        f"""case $1 in
    *compute_cap*) echo '{full}'; exit {0 if knows_capability else 2} ;;
    --query-gpu=driver_version,name) echo '{short}' ;;
    '') echo 'Thu Nov 26 14:00:00 2026'; echo '{banner}' ;;
    *) exit 2 ;;
esac""",
    )


def write_failing_smi(folder: Path, words: str = NOT_LOADED, status: int = 9) -> None:
    write_program(folder / "nvidia-smi", f'echo "{words}"\necho\nexit {status}')


def write_torch(folder: Path, version: str, cuda: str, sees: bool, says: str = "") -> None:
    """A package `torch` of which devices.py can ask what it asks; it sees one RTX 3090, or none and says why."""
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "version.py").write_text(f"__version__ = {version!r}\ncuda = {cuda!r}\nhip = None\n")
    (folder / "torch" / "__init__.py").write_text(
        f"""from torch.version import __version__
class cuda:
    is_available = staticmethod(lambda: {sees})
    get_device_name = staticmethod(lambda device=0: {RTX_3090[0]!r})
    get_device_capability = staticmethod(lambda device=0: (8, 6))
    get_arch_list = staticmethod(lambda: ["sm_75", "sm_80", "sm_86", "sm_90"])
    @staticmethod
    def init():
        raise RuntimeError({says!r})
"""
    )
