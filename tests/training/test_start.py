"""What a start imports, and what it leaves to be imported by who needs it."""

import re
import subprocess
import sys
from importlib.metadata import version

import torch

from rwkv_bone.ops import arguments, regions
from rwkv_bone.training.libraries import TESTED
from tests.conftest import REPOSITORY, clean_environment, python_path

# Seconds and hundreds of megabytes that no step needs. matplotlib draws the curve when the run is over.
UNUSED = {"torch._dynamo", "torch._inductor", "sympy", "torchmetrics", "matplotlib", "transformers", "torchvision"}
UNUSED |= {"peft", "pandas", "pyarrow", "networkx", "PIL", "setuptools", "distutils", "triton", "bitsandbytes"}

PROGRAM = """
import sys
given = set(sys.modules)  # what a .pth file of the environment imports
from rwkv_bone.training.signals import StopOnSignal
start = StopOnSignal.on_train_batch_start

def third(self, trainer, module, batch, index):
    if index == 2:
        print("MODULES", *sorted(set(sys.modules) - given))
        import lightning.fabric.wrappers as wrappers, torch, torch._dynamo, torchmetrics
        assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)) == 2
        assert torchmetrics.MeanMetric()(torch.ones(2)) == 1 and "torchmetrics.metric" in sys.modules
        assert torch._dynamo.OptimizedModule is not wrappers.OptimizedModule
        print("THE REAL ONES")
    start(self, trainer, module, batch, index)

StopOnSignal.on_train_batch_start = third
from rwkv_bone.config.flags import parse_train
from rwkv_bone.training.fit import fit
fit(parse_train(sys.argv[1:]))
"""


def test_a_run_has_not_imported_what_its_steps_do_not_use(job):
    flags = {"op": "auto", "peft": "lora", "lora_dropout": 0.1, "quant": "nf4"}
    argv = job.argv(flags | {"proj_dir": job.folder / "imports"})
    environment = clean_environment() | {"PYTHONPATH": python_path()}
    command = [sys.executable, "-c", PROGRAM, *argv]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "THE REAL ONES" in done.stdout
    (line,) = re.findall("^MODULES (.*)$", done.stdout, re.M)
    loaded = set(line.split())
    assert {"lightning.pytorch", "deepspeed", "torch"} <= loaded
    assert loaded & UNUSED == set()


def test_libraries_are_lightened_in_the_versions_that_are_required():
    required = dict(re.findall(r"^(lightning|deepspeed)==(\S+)$", (REPOSITORY / "requirements.txt").read_text(), re.M))
    assert required == TESTED
    assert {name: version(name) for name in TESTED} == TESTED


def test_what_marks_a_constant_for_torch_compile_is_what_pytorch_marks():
    def function():
        pass

    torch.compiler.assume_constant_result(function)
    assert vars(function) == vars(arguments.choose_form) == vars(regions.problem)
