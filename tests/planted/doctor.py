"""Mistakes in what says whether a machine is fit for training."""

from tests.planted.bug import Bug

FINDING, PACKAGES, MACHINE, KERNELS, TRIALS, EXAMINE = (
    f"src/rwkv_bone/doctor/{name}.py" for name in ("finding", "packages", "machine", "kernels", "trials", "examine")
)
TESTS = "tests/doctor/test_doctor.py"

BUGS = (
    Bug(
        FINDING,
        "for level, title in TITLES.items():",
        "for level, title in reversed(TITLES.items()):",
        f"{TESTS} -k first",
    ),
    Bug(FINDING, "finding.public or finding.text", "finding.text", f"{TESTS} -k first"),
    Bug(FINDING, "        text = text.replace(place, name)", "        pass", f"{TESTS} -k gives"),
    Bug(FINDING, '    text = PATH.sub(".../", text)', "", f"{TESTS} -k gives"),
    Bug(FINDING, '(host, host.partition(".")[0])', "(host,)", f"{TESTS} -k gives"),
    Bug(FINDING, '        yield user, "<user>"', "        yield from ()", f"{TESTS} -k gives"),
    Bug(PACKAGES, "    while parts and not parts[-1]:", "    while False:", f"{TESTS} -k bounds"),
    Bug(PACKAGES, '"<": have.__lt__', '"<": have.__le__', f"{TESTS} -k bounds"),
    Bug(PACKAGES, "named[1] if named else extra", "extra", f"{TESTS} -k itself"),
    Bug(MACHINE, "devices.too_old(machine, torch) or", "", f"{TESTS} -k driver"),
    Bug(MACHINE, 'accelerator == "cpu" or devices.cards_are_hidden()', 'accelerator == "cpu"', f"{TESTS} -k hidden"),
    Bug(MACHINE, "min(limits, default=None)", "max(limits, default=None)", f"{TESTS} -k cores"),
    Bug(MACHINE, "        folder = folder.parent", "        break", f"{TESTS} -k cores"),
    Bug(MACHINE, "if not os.access(there, os.W_OK):", "if False:", f"{TESTS} -k disks"),
    Bug(
        KERNELS,
        "return max(error if error == error else",
        "return min(error if error == error else",
        f"{TESTS} -k definition",
    ),
    Bug(TRIALS, "    if status:\n        yield", "    if False:\n        yield", f"{TESTS} -k imported"),
    Bug(TRIALS, 'return last_words(errors, status) if status else ""', 'return ""', f"{TESTS} -k fails"),
    Bug(EXAMINE, "finding.level == PROBLEM for finding in found", "True for finding in found", f"{TESTS} -k none_are"),
)
