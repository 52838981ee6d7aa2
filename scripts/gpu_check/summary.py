"""Rows as tables: summary.py ROWS SUMMARY. The exit status is that of the whole check (see gpu_check.sh)."""

import json
import sys
from pathlib import Path

BAD = ("fail", "timeout")
UNFINISHED = ("not run", "cut")


def table(columns: list[str], rows: list[list[str]]) -> list[str]:
    if not rows:
        return []
    lines = [" | ".join(columns), " | ".join("---" for _ in columns), *(" | ".join(row) for row in rows)]
    return [f"| {line} |" for line in lines] + [""]


def number(value, form: str) -> str:
    return "" if value is None else format(value, form)


def pair(values, form: str) -> str:
    return " → ".join(number(value, form) for value in values)


def checks(rows: list[dict]) -> list[list[str]]:
    return [
        [r["part"], r["name"], r["status"], number(r.get("seconds"), ".1f"), r.get("why", r.get("last", ""))[:160]]
        for r in rows
    ]


def wkv(rows: list[dict]) -> list[list[str]]:
    def form(r: dict) -> str:
        return f"{r['operator']} {r['form']}" + (f" ({r['kernels']})" if r.get("kernels") else "")

    def share(r: dict, what: str, best: str) -> str:
        reached = (r.get(what) or [None])[-1]
        return "" if reached is None else f"{reached:,.0f} ({reached / r[best]:.0%})"

    def scaled(r: dict, what: str) -> float | None:
        return None if r.get(what) is None else 1e3 * r[what]

    return [
        [form(r), r["rows"], "x".join(map(str, r["shape"])), r["dtype"], number(scaled(r, "forward_seconds"), ".2f"),
         f"{1e3 * r['seconds']:.2f}", f"{r['error']:.1e}", number((r.get("times_floor") or [None])[-1], ".1f"),
         share(r, "gb_per_s", "copy_gb_per_s"), share(r, "tflops", "matmul_tflops"),
         number(scaled(r, "host_seconds"), ".2f"), number(r.get("peak_mb"), ",.0f")]
        for r in rows
    ]  # fmt: skip


# What WKV-7 should take, forward + backward in bf16, as a training run calls it: [B, T, H, N], card, milliseconds.
BARS = (
    ([8, 4096, 40, 64], "H100", 3.6),
    ([8, 4096, 40, 64], "H200", 2.8),
    ([1, 4096, 40, 64], "H100", 0.7),
    ([1, 4096, 40, 64], "H200", 0.7),
)


def bars(rows: list[dict]) -> list[list[str]]:
    """One that is missed is said, and is no failure."""
    taken = [
        r for r in rows if (r["operator"], r["form"], r["dtype"], r["rows"]) == ("wkv7", "cuda", "bfloat16", "equal")
    ]
    found = []
    for shape, card, limit in BARS:
        times = [1e3 * r["seconds"] for r in taken if r["shape"] == shape and card in r["hardware"]]
        state = "not run" if not times else "met" if min(times) <= limit else "missed"
        measured = f"{min(times):.2f}" if times else ""
        found.append(["x".join(map(str, shape)), card, f"{limit}", measured, state])
    return found


def steps(rows: list[dict]) -> list[list[str]]:
    return [
        [
            f"{r['size']} {r['bsz']}x{r['ctx']}" + (f", {r['documents']} documents" if r["documents"] else ""),
            f"{r['kind']} r{r['r']}" + recomputed(r["grad_cp"]) + ", compiled" * r["compile"],
            r["kernel"] + "; regions in PyTorch" * (r.get("regions") == "torch"),
            f"{r['tokens_per_s']:,.0f}",
            f"{r['seconds']:.4f}",
            f"{r['share_of_matmul']:.1%}",
            f"{r['share_of_copy']:.1%}",
            number(r["peak_allocated_mb"], ",.0f"),
            number(r["peak_reserved_mb"], ",.0f"),
            number(r["kernel_launches"], "d"),
            number(r["host_syncs"], "d"),
        ]
        for r in rows
    ]


def recomputed(grad_cp: bool | str) -> str:
    return f", grad_cp {grad_cp}" if isinstance(grad_cp, str) else ", grad_cp" * grad_cp


def regions(rows: list[dict]) -> list[list[str]]:
    def row(r: dict) -> list[str]:
        times = [number(r["ns"].get(form), ".4f") for form in ("eager", "inductor", "kernels")]
        return [r["region"], "x".join(map(str, r["shape"])), r["dtype"], *times, f"{r['error']:.1e}"]

    return [row(r) for r in rows]


def runs(rows: list[dict]) -> list[list[str]]:
    return [
        [
            r["name"],
            str(r["steps"]),
            pair(r["heldout"], ".4f"),
            pair(r["exact_match"], ".0%"),
            f"{1e3 * r['step_seconds']:.1f}",
            f"{r['tokens_per_s']:,.0f}",
            f"{r['peak_memory_mb']:,.0f}",
        ]
        for r in rows
    ]


def markdown(rows: list[dict]) -> str:
    def of(what: str) -> list[dict]:
        return [row for row in rows if row["what"] == what]

    lines = ["# Check of this machine", ""]
    for r in of("environment"):
        gpus = ", ".join(f"{g['name']} ({g['memory_gb']} GB)" for g in r["gpus"]) or "no GPU"
        packages = ", ".join(f"{name} {version}" for name, version in r["packages"].items())
        lines += [f"{gpus}; {r['nvidia_smi'] or r['system']}; Python {r['python']}; {packages}; {r['commit']}", ""]
    lines += [f"- {r['seconds']:.2f} s: {r['sentence']}" for r in of("build")] + [""] * bool(of("build"))
    lines += table(["part", "check", "status", "seconds", "last line"], checks(of("check")))
    columns = (
        "operator,rows,shape,type,forward ms,ms,error,times floor,GB/s (of a copy),TFLOP/s (of a product),host ms,MB"
    )
    lines += table(columns.split(","), wkv(of("wkv")))
    lines += table(["bar", "card", "at most ms", "ms", "state"], bars(of("wkv")))
    columns = "region,shape,type,ns a number in PyTorch,by torch.compile,by kernels,error"
    lines += table(columns.split(","), regions(of("region")))
    columns = "step,how,kernel,tokens/s,seconds,of matmul,of copy,allocated MB,reserved MB,launches,host syncs"
    lines += table(columns.split(","), steps(of("step")))
    columns = "run,steps,held-out loss,exact,ms a step,tokens/s,peak MB"
    lines += table(columns.split(","), runs(of("run")))
    return "\n".join(lines)


def main(rows_path: str, summary_path: str) -> int:
    rows = [json.loads(line) for line in Path(rows_path).read_text(encoding="utf-8").splitlines()]
    Path(summary_path).write_text(markdown(rows), encoding="utf-8")
    status = {row["name"]: row["status"] for row in rows if row["what"] == "check"}
    bad = [name for name, how in status.items() if how in BAD]
    unfinished = [name for name, how in status.items() if how in UNFINISHED]
    print(f"passed    {sum(how == 'pass' for how in status.values())} of {len(status)} checks")
    if unfinished:
        print(f"not run   {', '.join(unfinished)}")
    if bad:
        print(f"failed    {', '.join(bad)}")
    return 1 if bad else 3 if unfinished or not status else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
