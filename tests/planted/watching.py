"""Mistakes in what is told of a run while it goes on and at its end, and in what is sent to other programs."""

from tests.planted.bug import Bug

TRAINING, TESTS = "src/rwkv_bone/training", "tests/training"
DIAGNOSIS, WARN = f"{TESTS}/test_diagnosis.py", f"{TESTS}/test_warn.py"
LOGGERS, PROGRESS, SUMMARY = f"{TESTS}/test_loggers.py", f"{TESTS}/test_progress.py", f"{TESTS}/test_summary.py"

BUGS = (
    # Warnings: too few, too many, for the wrong reason.
    Bug(f"{TRAINING}/diagnosis.py", "(counts - 1) / 2)[place]", "counts + 1)[place]", DIAGNOSIS),
    Bug(f"{TRAINING}/diagnosis.py", "SURE = 4.5", "SURE = 1.0", DIAGNOSIS),
    Bug(f"{TRAINING}/diagnosis.py", "max(0.2 * (begin - means[lowest]), 0.05 * begin)", "0", DIAGNOSIS),
    Bug(f"{TRAINING}/diagnosis.py", "now <= (grad_clip or 1.0) or ", "", DIAGNOSIS),
    Bug(f"{TRAINING}/diagnosis.py", "math.inf if record", "0.0 if record", DIAGNOSIS),
    Bug(f"{TRAINING}/diagnosis.py", "(300 if from_scratch else 3 * WINDOW)", "3 * WINDOW", DIAGNOSIS),
    Bug(f"{TRAINING}/diagnosis.py", "abs(difference) + margin >=", "abs(difference) >=", DIAGNOSIS),
    Bug(f"{TRAINING}/diagnosis.py", "if held_out and abs", "if False and abs", DIAGNOSIS),
    Bug(f"{TRAINING}/diagnosis.py", 'if record["step"] > process_began', "", DIAGNOSIS),
    Bug(f"{TRAINING}/diagnosis.py", "if total >= seconds and count", "if count", DIAGNOSIS),
    Bug(f"{TRAINING}/diagnosis.py", "older < old < now and", "old < now and", DIAGNOSIS),
    Bug(f"{TRAINING}/diagnosis.py", "0.02 * (losses[0][1] - lowest)", "0.0", DIAGNOSIS),
    Bug(f"{TRAINING}/diagnosis.py", "if step and since and before and", "if False and", DIAGNOSIS),
    Bug(f"{TRAINING}/warn.py", 'if any(line["kind"] == advice.kind for line in self.given):', "if False:", WARN),
    Bug(f"{TRAINING}/warn.py", "self._lines.add([*now, ", "self._lines.add([", WARN),
    Bug(f"{TRAINING}/warn.py", "if not trainer.is_global_zero or", "if", WARN),
    Bug(f"{TRAINING}/measurements.py", "if self.records or self.path.exists():", "if self.records:", WARN),
    Bug("src/rwkv_bone/config/rates.py", '(1 if peft == "state" else width)', "128", WARN),
    # Other programs.
    Bug(f"{TRAINING}/loggers.py", "purge = place.first_step + 1 if place.first_step else 0", "purge = None", LOGGERS),
    Bug(f"{TRAINING}/loggers.py", 'if numbers and record["step"] > last(sender.sent):', "if numbers:", LOGGERS),
    Bug(f"{TRAINING}/loggers.py", "again=first_step > 0 and not there", "again=False", LOGGERS),
    Bug(f"{TRAINING}/loggers.py", "known = numbers_of(self._last) if", "known = {} if", LOGGERS),
    Bug(f"{TRAINING}/loggers.py", "if trainer.is_global_zero else []", "", LOGGERS),
    Bug(
        f"{TRAINING}/loggers.py", "self._thread.join(max(until - time.monotonic(), 0))", "self._thread.join()", LOGGERS
    ),
    Bug(f"{TRAINING}/loggers.py", "            self._failed = True\n", "", LOGGERS),
    Bug(f"{TRAINING}/loggers.py", "if self._calls.qsize() > MOST:", "if False:", LOGGERS),
    Bug(f"{TRAINING}/loggers.py", "wandb.login(prompt=False)", "wandb.login()", LOGGERS),
    Bug(
        f"{TRAINING}/loggers.py",
        'RUN_IDS).read_text(encoding="utf-8")) if first_step else {}',
        "RUN_IDS)) if first_step else {}",
        LOGGERS,
    ),
    # The terminal and the table.
    Bug(f"{TRAINING}/progress.py", "break  # a less", "continue  # a less", PROGRESS),
    Bug(f"{TRAINING}/progress.py", "(columns(self.stream) or UNKNOWN_WIDTH) - 1", "200", PROGRESS),
    Bug(f"{TRAINING}/progress.py", "for step, loss in losses if step]", "for step, loss in losses]", PROGRESS),
    Bug(f"{TRAINING}/progress.py", "'v' if now < before else '^'", "'^' if now < before else 'v'", PROGRESS),
    Bug(f"{TRAINING}/summary.py", "for step, one in points if step]", "for step, one in points]", SUMMARY),
    Bug(f"{TRAINING}/summary.py", 'if records and records[-1]["step"] > last', "if False", SUMMARY),
    Bug(f"{TRAINING}/summary.py", "clock(seconds + measuring)", "clock(seconds)", SUMMARY),
    Bug(f"{TRAINING}/summary.py", 'record.get("peak_reserved_mb") or ', "", SUMMARY),
)
