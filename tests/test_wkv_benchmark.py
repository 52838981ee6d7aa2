"""benchmarks/wkv.py: a wrong form gets no time, counts are those of the design, and peers are called in their terms."""

import importlib.util
import json
import shutil
import sys
import types

import pytest
import torch

from benchmarks import costs, peer_operators, timing
from rwkv_bone.ops import arguments, cuda
from rwkv_bone.ops.reference import wkv6_reference, wkv7_reference
from tests.conftest import REPOSITORY
from tests.ops.shim import ShimCalls

CPU = torch.device("cpu")
TINY = ["--shape", "2", "20", "2", "16", "--repeat", "2"]


@pytest.fixture
def wkv(monkeypatch):
    """The program as a module; `wkv.run(*words)` is its exit status."""
    spec = importlib.util.spec_from_file_location("wkv_benchmark", REPOSITORY / "benchmarks" / "wkv.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(timing, "MATRIX", {"cpu": 64, "cuda": 1024})
    monkeypatch.setattr(timing, "COPY_BYTES", {"cpu": 2**16, "cuda": 2**24})

    def run(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["wkv.py", *TINY, *words])
        return module.main()

    module.run = run
    return module


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("operator", ["wkv7", "wkv6", "wkv5"])
def test_a_row_holds_what_was_measured(wkv, tmp_path, device, operator):
    path = tmp_path / "rows.jsonl"
    words = ["--operator", operator, "--device", device, "--json", str(path), "--forms", "kernel", "torch"]
    assert wkv.run(*words, "--documents", "3") == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["form"], row["rows"]) for row in rows] == [
        (form, kind) for form in (device, "torch") for kind in ("packed", "padded")
    ]
    for row in rows:
        assert row["spread"][0] <= row["seconds"] <= row["spread"][1]
        assert 0 < row["forward_seconds"] and 0 < row["error"] < 5e-5
        tokens = row["shape"][0] * row["shape"][1] * row["shape"][2]
        floor = row["floor_bytes"][1] * tokens / (1e9 * row["copy_gb_per_s"])
        assert row["times_floor"][1] == pytest.approx(row["seconds"] / floor)
        assert (row["documents"] == 3) == (row["rows"] == "packed")
        assert (row["peak_mb"] is None) == (row["host_seconds"] is None) == (device == "cpu")


def test_a_form_whose_error_exceeds_its_limit_gets_no_time_and_the_others_do(wkv, tmp_path, monkeypatch, capsys):
    path = tmp_path / "rows.jsonl"
    monkeypatch.setitem(wkv.LIMITS_OF, "torch", {torch.float32: 1e-12})
    assert wkv.run("--forms", "kernel", "torch", "--json", str(path)) == 1
    assert [json.loads(line)["form"] for line in path.read_text().splitlines()] == ["cpu"]
    assert "wkv7 torch: relative error" in capsys.readouterr().out


def test_a_form_that_cannot_be_had_is_refused_by_name_and_left_out_of_a_group(wkv, capsys):
    with pytest.raises(SystemExit):
        wkv.run("--forms", "accurate")
    assert "--op" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        wkv.run("--forms", "fla")
    assert "fla needs --device cuda" in capsys.readouterr().err
    assert wkv.run("--forms", "all", "kernel") == 0
    printed = capsys.readouterr().out
    assert all(f"{name} is left out: " in printed for name in ("exact", "chunked64", "fla", "fla-bounded"))
    assert "wkv7 forward+backward, cpu" in printed


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++ to compile the CUDA source as C++")
@pytest.mark.parametrize(
    ("name", "packed", "w0"),
    [("exact", False, True), ("chunked32", True, True), ("chunked32", False, False), ("accurate", False, True)],
)
def test_the_forms_on_cuda_are_the_kernels_they_are_called_after_and_keep_to_their_limits(
    wkv, monkeypatch, request, name, packed, w0
):
    """On the host shim, whose tensors are the processor's."""
    calls = ShimCalls(request.config.cache.mkdir("cuda_shim"))
    monkeypatch.setattr(cuda, "call", calls)
    for module in (wkv, arguments):
        monkeypatch.setattr(module, "select_op", lambda op, *_: (op, ""))
    form = wkv.form_of(name, "wkv7", CPU, torch.bfloat16, 64)
    assert 1e-3 < wkv.error("wkv7", form, torch.bfloat16, 64, CPU, packed, w0) <= form.limit(torch.bfloat16)
    assert {unit.label for unit, _ in calls.taken} == {wkv.LABELS.get(name, name)}


def test_the_standard_problems_are_the_five_shapes_and_packed_tokens(wkv, monkeypatch):
    monkeypatch.setattr(wkv, "timed_case", lambda _, __, *sizes: sizes[:-1])
    monkeypatch.setattr(wkv, "packed_timed_case", lambda _, __, lengths, *sizes: (sum(lengths), *sizes[:-1]))
    args = types.SimpleNamespace(shapes=["standard"], w0=False)
    cases = [
        (kind, make()) for found in wkv.problems("wkv7", args, torch.bfloat16, CPU) for kind, make in found.items()
    ]
    shapes = [(8, 4096, 40, 64), (1, 4096, 40, 64), (1, 16384, 40, 64), (4, 2048, 32, 64), (16, 512, 12, 64)]
    assert cases == [*(("", shape) for shape in shapes), ("packed", (32768, 40, 64))]


def test_on_a_gpu_rows_take_turns_and_short_calls_are_queued(wkv, monkeypatch):
    """A GPU that does not exist: its clock goes on by 2 ms with every call of a, 30 ms with every call of b."""
    clock, order = [0.0], []

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self):
            self.at = clock[0]

        def elapsed_time(self, end):
            return end.at - self.at

    fake = {"Event": Event, "synchronize": lambda *_: None, "reset_peak_memory_stats": lambda: None}
    fake |= {"_sleep": lambda cycles: None, "memory_allocated": lambda: 100, "max_memory_allocated": lambda: 350}
    for name, value in fake.items():
        monkeypatch.setattr(torch.cuda, name, value)

    def call(name: str, milliseconds: float):
        def work():
            order.append(name)
            clock[0] += milliseconds

        return work

    pairs = {name: (call(f"{name}1", ms), call(f"{name}2", 2 * ms)) for name, ms in {"a": 2.0, "b": 30.0}.items()}
    found = wkv.measure(pairs, types.SimpleNamespace(type="cuda"), 2)
    assert found["a"][0].forward == pytest.approx([2e-3] * 2) and found["a"][0].both == pytest.approx([4e-3] * 2)
    assert found["b"][0].both == pytest.approx([60e-3] * 2) and found["b"][1] == 250
    once = ["a1"] * 5 + ["a2"] * 2 + ["b1", "b2"]  # 10 ms of each
    assert order[-2 * len(once) :] == 2 * once


def test_the_bytes_and_operations_are_those_of_the_design():
    def totals(form: str, decay: int) -> tuple[int, int, int]:
        forward, backward = costs.cost("wkv7", form, 64, 2, decay)
        return forward.bytes, backward.bytes, round((forward + backward).operations / 1e3)

    assert totals("chunked32", 2) == (2960, 3856, 233)
    assert sum(totals("chunked64", 2)[:2]) == 5904 and totals("chunked64", 2)[2] == 307
    assert sum(totals("chunked32", 4)[:2]) == 6816 + 512
    assert totals("floor", 2) == (896, 1664, 0)
    by_kernel = {kernel.name: kernel for kernel in sum(costs.KERNELS["wkv7", "chunked"], [])}
    problem = costs.Problem(64, 2, 2, 32)

    def moved(name: str) -> tuple[float, float]:
        kernel = by_kernel[name]
        reads, writes = (kernel._replace(**{side: {}}) for side in ("writes", "reads"))
        return costs.kernel_cost(reads, problem).bytes, costs.kernel_cost(writes, problem).bytes

    assert moved("prepare") == (768, 776) and moved("scan") == (520, 256) and moved("outputs") == (512, 128)
    assert moved("prepare_backward") == (512, 392) and moved("scan_backward") == (520, 256)
    assert moved("gradients") == (1408, 768)
    assert costs.cost("wkv6", "unknown32", 64, 2, 4) is None


def test_a_decay_in_two_parts_is_the_same_problem_with_fewer_bytes(wkv, tmp_path):
    path = tmp_path / "rows.jsonl"
    words = ("--dtype", "bfloat16", "--forms", "kernel", "torch", "--documents", "3")
    assert wkv.run(*words, "--w0", "--json", str(path)) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 4 and all(row["error"] < 3e-3 for row in rows)
    assert {row["decay_dtype"] for row in rows} == {"bfloat16"}
    assert {tuple(row["floor_bytes"]) for row in rows} == {(14 * 16, 40 * 16)}
    with pytest.raises(SystemExit):
        wkv.run("--w0", "--operator", "wkv6")


def log_decay_reference(operator: str):
    """What flash-linear-attention's function of that name does, in its conventions, by our float64 reference."""

    def function(*, initial_state, scale, output_final_state, cu_seqlens, w, **inputs):
        assert scale == 1.0 and output_final_state and cu_seqlens is None
        if operator == "wkv7":
            share = -w.double() / 0.6065306597126334
            raw = share.log() - (-share).log1p()
        else:
            raw = (-w.double()).log()
        named = {name: x.double() for name, x in inputs.items()} | {"w": raw, "state": initial_state.double().mT}
        y, last = (wkv7_reference if operator == "wkv7" else wkv6_reference)(**named)
        return y.to(inputs["r"].dtype), last.mT.float()

    return function


@pytest.mark.parametrize("operator", ["wkv7", "wkv6"])
def test_a_peer_gets_log_decays_and_turned_states_and_is_compared_in_ours(wkv, monkeypatch, operator):
    name = f"rwkv{operator[-1]}"
    module = types.ModuleType(f"fla.ops.{name}")
    setattr(module, f"chunk_{name}", log_decay_reference(operator))
    monkeypatch.setitem(sys.modules, f"fla.ops.{name}", module)
    other = peer_operators.peer("fla", operator)
    form = wkv.Form("fla", other.run, prepare=other.prepare, restore=other.restore)
    assert wkv.error(operator, form, torch.float32, 16, CPU, packed=False) < 2e-5
    unturned = form._replace(prepare=lambda case: case | {"w": other.prepare(case)["w"]})
    assert wkv.error(operator, unturned, torch.float32, 16, CPU, packed=False) > 0.1


def test_a_peer_that_is_not_there_is_said_in_words(monkeypatch):
    for name in ("fla", "fla.ops", "fla.ops.rwkv7"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(peer_operators.Missing, match="fla is not installed"):
        peer_operators.peer("fla", "wkv7")
    with pytest.raises(peer_operators.Missing, match="fla has no wkv5"):
        peer_operators.peer("fla", "wkv5")
