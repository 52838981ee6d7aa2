"""A card that PyTorch cannot use: found before anything else, told with versions and what to type, never passed over.

The machine is a fake `nvidia-smi` on PATH with the words of real drivers, and no file of a real driver is looked at.
"""

import os
import shlex
import sys
import warnings

import pytest
import torch

from rwkv_bone import devices, load_model
from rwkv_bone.devices import Card, Machine, Torch
from rwkv_bone.errors import UserError
from rwkv_bone.hf.finetune import finetune, launches
from rwkv_bone.hf.flags import HfConfig
from rwkv_bone.training.strategy import silence_libraries
from tests.nvidia import DRIVERS, NOT_LOADED, RTX_3090, write_failing_smi, write_program, write_smi

PYTHON = shlex.quote(sys.executable)
CPU_BUILD = Torch("2.13.0+cpu")
CUDA_13 = Torch("2.13.0", "13.0")
CUDA_12 = Torch("2.10.0", "12.8")
ON_CPU = "train on the CPU on purpose: --accelerator cpu"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A folder at the front of PATH for an nvidia-smi, on a machine that says nothing else about a driver."""
    # Not this machine's own nvidia-smi; what runs in these tests is a shell's own commands.
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(devices, "DRIVER_FILE", tmp_path / "version")
    monkeypatch.setattr(devices, "DRIVER_DEVICE", tmp_path / "nvidiactl")
    for name in ("CUDA_VISIBLE_DEVICES", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def no_cuda(monkeypatch):
    """PyTorch sees no CUDA device, on a machine with one too."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def complaint(about: Machine, build: Torch, **kwargs) -> str:
    return devices.complaint("", about, build, ON_CPU, **kwargs)


@pytest.mark.parametrize("driver", DRIVERS)
def test_driver_cuda_and_cards_are_read_from_every_generation_of_nvidia_smi(driver, machine):
    cuda, knows_capability, _ = DRIVERS[driver]
    write_smi(machine, driver, [RTX_3090, RTX_3090, ("Tesla T4", "7.5")])
    found = devices.look()
    assert (found.driver, found.cuda, found.trouble) == (driver, cuda, "")
    names = "2 x NVIDIA GeForce RTX 3090 (sm_86), Tesla T4 (sm_75)"
    assert found.names() == (names if knows_capability else "2 x NVIDIA GeForce RTX 3090, Tesla T4")


@pytest.mark.parametrize(
    "words, status",
    [
        (NOT_LOADED, 9),
        ("No devices were found", 6),
        ("No devices were found", 0),
        ("Failed to initialize NVML: Driver/library version mismatch", 18),
    ],
)
def test_an_nvidia_smi_that_lists_nothing_is_quoted(words, status, machine):
    write_failing_smi(machine, words, status)
    assert devices.look() == Machine(trouble=words)
    assert f"nvidia-smi: {words}" in complaint(devices.look(), CUDA_13)


def test_an_nvidia_smi_that_hangs_or_cannot_be_run_is_told(machine, monkeypatch):
    monkeypatch.setattr(devices, "SMI_SECONDS", 0.05)
    write_program(machine / "nvidia-smi", "while :; do :; done")
    assert devices.look().trouble == "gives no answer in 0.05 seconds"
    (machine / "nvidia-smi").write_bytes(b"\x7fELF of another machine")
    assert "cannot be run" in devices.look().trouble


@pytest.mark.parametrize(
    "text, version, cuda",
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.256.02  Thu May  2 14:37:44 UTC", "470.256.02", "11"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.03  Release Build", "580.159.03", "13"),
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  525.53  Mon Oct 31 2022", "525.53", "11"),
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  390.157  Wed Oct 12 2022", "390.157", "10"),
    ],
)
def test_a_container_without_nvidia_smi_still_tells_its_driver(text, version, cuda, machine):
    (machine / "version").write_text(f"{text}\nGCC version:  gcc version 12.2.0\n")
    found = devices.look()
    assert (found.cards, found.driver, found.cuda) == ((), version, cuda)
    assert "start it with --gpus all" in complaint(found, CUDA_13)


def test_a_machine_without_a_driver_says_nothing(machine):
    assert devices.look() is None
    (machine / "nvidiactl").touch()
    assert devices.look() == Machine(trouble="is not on PATH")


@pytest.mark.parametrize(
    "driver, capability, wanted",
    [
        ("580.65.06", "8.6", ["torch==2.13.0"]),
        ("610.43.02", "12.0", ["torch==2.13.0"]),
        ("525.60.13", "8.6", ["torch==2.10.0"]),
        ("570.133.07", "12.0", ["torch==2.10.0"]),
        ("580.65.06", "6.1", ["torch==2.13.0", "--index-url", "https://download.pytorch.org/whl/cu126"]),
        ("525.60.13", "7.0", ["torch==2.13.0", "--index-url", "https://download.pytorch.org/whl/cu126"]),
        ("470.256.02", "8.6", None),
    ],
)
def test_pip_is_asked_for_a_torch_that_driver_and_card_run(driver, capability, wanted, machine):
    write_smi(machine, driver, [("a card", capability)])
    assert devices.pip_words(devices.look()) == wanted


def test_an_old_card_for_the_screen_does_not_decide_which_torch_is_installed(machine):
    write_smi(machine, "580.65.06", [("NVIDIA GeForce GT 1030", "6.1"), RTX_3090])
    assert devices.pip_words(devices.look()) == ["torch==2.13.0"]


INSTALL = "-m pip install --force-reinstall"
UPDATE = "- update the driver to 580.65.06 or newer"


@pytest.mark.parametrize(
    "driver, build, facts, advice",
    [
        (
            "525.60.13",
            CUDA_13,
            [
                "driver  525.60.13, for CUDA up to 12.0",
                "2.13.0, built for CUDA 13.0, which needs driver 580.65.06 or newer",
            ],
            [UPDATE, f"- install a PyTorch for this driver: {{python}} {INSTALL} torch==2.10.0"],
        ),
        (
            "470.256.02",
            CUDA_12,
            ["driver  470.256.02, for CUDA up to 11.4", "built for CUDA 12.8, which needs driver 525.60.13 or newer"],
            ["- update the driver to 525.60.13 or newer"],
        ),
        ("470.256.02", CUDA_13, ["which needs driver 580.65.06 or newer"], [UPDATE]),
        (
            "580.65.06",
            CPU_BUILD,
            ["torch   2.13.0+cpu, built for the CPU alone"],
            [f"- install a PyTorch for the card: {{python}} {INSTALL} torch==2.13.0"],
        ),
        ("525.60.13", CPU_BUILD, [], [f"- install a PyTorch for the card: {{python}} {INSTALL} torch==2.10.0"]),
        (
            "470.256.02",
            CPU_BUILD,
            [],
            [f"{UPDATE}; then install a PyTorch for the card: {{python}} {INSTALL} torch==2.13.0"],
        ),
        (
            "580.65.06",
            Torch("2.13.0+rocm7.1", None, "7.1"),
            ["built for ROCm 7.1"],
            [f"- install a PyTorch for the card: {{python}} {INSTALL} torch==2.13.0"],
        ),
        (
            "580.65.06",
            CUDA_13,
            [],
            ["- restart the machine, or the container with --gpus all: this driver is new enough for this torch"],
        ),
    ],
)
def test_the_complaint_names_the_versions_and_what_to_type(driver, build, facts, advice, machine):
    write_smi(machine, driver)
    lines = complaint(devices.look(), build).splitlines()
    advice = [line.format(python=PYTHON) for line in advice]
    assert [line.strip() for line in lines[lines.index("  What to do:") + 1 :]] == [*advice, f"- {ON_CPU}"]
    assert "NVIDIA GeForce RTX 3090" in lines[1]
    assert all(fact in "\n".join(lines) for fact in facts)


def test_torchs_own_words_and_a_hidden_card_are_told(machine):
    write_smi(machine, "580.65.06")
    text = complaint(devices.look(), CUDA_13, words="Error 802: system not yet initialized", visible="3")
    assert "PyTorch: Error 802: system not yet initialized" in text
    assert "CUDA_VISIBLE_DEVICES=3" in text and "- unset CUDA_VISIBLE_DEVICES" in text
    assert "restart" not in text


def test_only_the_first_sentence_of_torchs_words_is_kept(monkeypatch):
    def init():
        raise RuntimeError(
            "The NVIDIA driver on your system is too old (found version 11.4). Please update your GPU driver by "
            "downloading and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx"
        )

    monkeypatch.setattr(torch.cuda, "init", init)
    assert devices.words_of_torch() == "The NVIDIA driver on your system is too old (found version 11.4)"


def test_an_index_of_other_builds_is_left_out_of_the_command(machine, monkeypatch):
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "https://example.org/simple https://download.pytorch.org/whl/cpu")
    command = devices.pip_command(["torch==2.13.0"])
    assert command == f"env -u PIP_EXTRA_INDEX_URL {PYTHON} {INSTALL} torch==2.13.0"
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "https://mirror.example.org/cpu-lab/simple")
    assert "env -u" not in devices.pip_command(["torch==2.13.0"])


@pytest.mark.parametrize("accelerator", ["auto", "gpu"])
def test_a_run_never_falls_back_to_the_cpu_in_silence(accelerator, machine, no_cuda):
    write_smi(machine, "525.60.13")
    with pytest.raises(UserError, match="PyTorch sees no CUDA device") as caught:
        devices.select_device(accelerator)
    text = str(caught.value)
    assert text.startswith("--accelerator gpu: ") is (accelerator == "gpu")
    for part in ("RTX 3090", "525.60.13", torch.__version__, ON_CPU):
        assert part in text


def test_a_broken_driver_is_no_reason_to_train_on_the_cpu_either(machine, no_cuda):
    write_failing_smi(machine)
    with pytest.raises(UserError, match="couldn't communicate with the NVIDIA driver"):
        devices.select_device("auto")


def test_the_cpu_is_taken_where_it_is_asked_for_and_where_there_is_no_driver(machine, no_cuda):
    assert devices.select_device("auto") == "cpu"
    write_smi(machine, "525.60.13")
    assert devices.select_device("cpu") == "cpu"


@pytest.mark.parametrize("visible", ["", "-1", "-1,0"])
def test_hiding_every_card_is_asking_for_the_cpu_and_is_said(visible, machine, no_cuda, monkeypatch):
    write_smi(machine, "580.65.06")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert devices.select_device("auto") == "cpu"
    line = f"CPU with {os.cpu_count()} cores (CUDA_VISIBLE_DEVICES hides the cards), 2 processes"
    assert devices.describe_devices("cpu", 2) == line
    with pytest.raises(UserError, match="--accelerator gpu: .*"):
        devices.select_device("gpu")


def test_naming_a_card_that_is_not_there_is_an_error(machine, no_cuda, monkeypatch):
    write_smi(machine, "580.65.06")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES=7"):
        devices.select_device("auto")


def test_the_cpu_line_is_as_ever_on_a_machine_without_cards(machine, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices.describe_devices("cpu", 1) == f"CPU with {os.cpu_count()} cores, 1 process"


BUILT_FOR = {
    "13.0": ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"],
    "12.6": ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90a"],
}


@pytest.fixture
def seen_card(machine, monkeypatch):
    """Makes PyTorch see a card of this capability, with the code that builds for this CUDA have."""

    def make(capability: tuple[int, int], cuda: str) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=0: "NVIDIA Card")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=0: capability)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: BUILT_FOR[cuda])
        monkeypatch.setattr(torch.version, "cuda", cuda)

    return make


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0), (12, 1)])
def test_a_card_that_torch_has_code_for_is_taken_without_asking_the_driver(capability, seen_card, machine):
    write_failing_smi(machine)
    seen_card(capability, "13.0")
    assert devices.select_device("auto") == devices.select_device("gpu") == "cuda"


@pytest.mark.parametrize(
    "capability, cuda, words",
    [
        ((6, 1), "13.0", "torch==2.13.0 --index-url https://download.pytorch.org/whl/cu126"),
        ((12, 0), "12.6", "torch==2.13.0\n"),
    ],
)
def test_a_card_that_torch_has_no_code_for_is_told_before_the_first_kernel(capability, cuda, words, seen_card):
    seen_card(capability, cuda)
    with pytest.raises(UserError) as caught:
        devices.select_device("auto")
    text = str(caught.value)
    assert f"install a PyTorch for this card: {PYTHON} {INSTALL} {words}" in text
    assert f"NVIDIA Card (sm_{capability[0]}{capability[1]})" in text and ", ".join(BUILT_FOR[cuda]) in text


def test_the_device_line_names_card_driver_and_cuda(seen_card, machine):
    seen_card((9, 0), "13.0")
    assert devices.describe_devices("cuda", 2) == "2 x NVIDIA Card (sm_90, CUDA 13.0)"
    (machine / "version").write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.03  Release\n")
    assert devices.describe_devices("cuda", 2) == "2 x NVIDIA Card (sm_90, driver 580.159.03, CUDA 13.0)"


def test_a_second_kind_of_card_is_counted_apart():
    cards = (Card("A", (8, 0)), Card("B"), Card("A", (8, 0)))
    assert Machine(cards).names() == "2 x A (sm_80), B"


def test_a_model_asked_for_on_a_card_gets_the_same_sentence_before_its_file_is_read(machine, no_cuda):
    write_smi(machine, "525.60.13")
    with pytest.raises(UserError, match="device='cuda:0': PyTorch sees no CUDA device") as caught:
        load_model("nowhere.pth", device="cuda:0")
    assert "525.60.13" in str(caught.value) and "use device='cpu'" in str(caught.value)


def test_fine_tuning_hugging_face_models_does_not_fall_back_either(machine, no_cuda):
    write_smi(machine, "525.60.13")
    config = HfConfig(model_name_or_path="nowhere", data_path="nowhere.jsonl", devices=2)
    for start in (lambda: finetune(config), lambda: launches(config)):
        with pytest.raises(UserError, match="525.60.13") as caught:
            start()
        assert "put CUDA_VISIBLE_DEVICES= before the command" in str(caught.value)


def test_what_torch_says_about_a_card_is_not_silenced():
    with warnings.catch_warnings(record=True) as seen:
        silence_libraries()
        for module in ("torch.cuda", "torch.optim.lr_scheduler", "deepspeed.runtime"):
            warnings.warn_explicit(f"from {module}", UserWarning, "file.py", 1, module=module)
    assert [str(warning.message) for warning in seen] == ["from torch.cuda"]


def test_the_installed_torch_is_told_without_importing_it():
    found = devices.installed_torch()
    assert (found.version, found.cuda, found.hip) == (torch.__version__, torch.version.cuda, torch.version.hip)


@pytest.mark.gpu
def test_a_real_card_is_taken_and_described():
    assert devices.select_device("auto") == "cuda"
    assert devices.pip_words(devices.look())
    line = devices.describe_devices("cuda", 1)
    assert torch.cuda.get_device_name() in line and f"CUDA {torch.version.cuda}" in line


def system(root, available=None, groups="", **files):
    """A made-up /proc and /sys: MemAvailable in kB, /proc/self/cgroup, and files below /sys/fs/cgroup (`__` is /)."""
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    if available is not None:
        (root / "proc/meminfo").write_text(f"MemTotal:  99 kB\nMemAvailable:    {available} kB\n")
    (root / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/").replace("memory_", "memory.")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


def test_free_memory_is_what_the_system_still_gives(tmp_path):
    assert devices.free_memory(system(tmp_path, 1000)) == 1000 * 1024


def test_free_memory_is_at_most_what_the_control_groups_of_either_version_leave(tmp_path):
    stat = "anon 5\ninactive_file 300\nactive_file 200\ninactive_anon 7"
    two = {"a__b__memory_max": "max", "a__b__memory_current": "5", "a__memory_max": 9000, "a__memory_current": 7000}
    root = system(tmp_path / "2", 1000, "0::/a/b\n", **two, a__memory_stat=stat)
    assert devices.free_memory(root) == 9000 - 7000 + 500  # files in memory would be given up
    one = {"memory__c__memory_limit_in_bytes": 4000, "memory__c__memory_usage_in_bytes": 3000}
    stat = "inactive_file 50\ntotal_inactive_file 300\ntotal_active_file 200"
    root = system(tmp_path / "1", 1000, "4:cpu,memory:/c\n0::/\n", **one, memory__c__memory_stat=stat)
    assert devices.free_memory(root) == 4000 - 3000 + 500


def test_in_a_container_the_topmost_group_counts_and_a_full_one_leaves_nothing(tmp_path):
    root = system(tmp_path, 1000, "0::/outside/of/it\n", memory_max=500, memory_current=700)
    assert devices.free_memory(root) == 0


def test_free_memory_is_unknown_where_nothing_tells(tmp_path):
    assert devices.free_memory(tmp_path) is None


def test_free_memory_of_this_machine_is_no_more_than_it_has():
    assert 0 < devices.free_memory() < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_memory_in_all_is_that_of_the_machine_with_swap_or_what_its_groups_allow(tmp_path):
    root = system(tmp_path, None, "0::/a/b\n", a__memory_max=5000 * 1024, a__b__memory_max="max")
    assert devices.total_memory(root) is None
    (root / "proc/meminfo").write_text("MemTotal:  9000 kB\nMemAvailable: 10 kB\nSwapTotal:   300 kB\n")
    assert devices.total_memory(root) == (5000 + 300) * 1024
    (root / "sys/fs/cgroup/a/memory.swap.max").write_text("0\n")
    assert devices.total_memory(root) == 5000 * 1024
    (root / "proc/self/cgroup").write_text("0::/c\n")
    assert devices.total_memory(root) == 9300 * 1024
