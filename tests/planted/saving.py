"""Mistakes by which a kill, a power cut, a full disk or a damaged file would cost a run."""

from tests.planted.bug import Bug

ATOMIC, LOCKS = "src/rwkv_bone/checkpoints/atomic.py", "src/rwkv_bone/locks.py"
SAVING, STATE = "src/rwkv_bone/training/saving.py", "src/rwkv_bone/training/resume_file.py"
LOG, DISK = "src/rwkv_bone/training/log.py", "src/rwkv_bone/training/disk.py"
FILES, SAVES = "tests/checkpoints/test_atomic.py", "tests/training/test_saving.py"
NAMED = "            _name(temporary, path, overwrite)\n"

BUGS = (
    Bug(
        ATOMIC,
        "            os.fsync(descriptor)\n            if previous",
        "            if previous",
        f"{FILES} -k synced",
    ),
    Bug(ATOMIC, f"{NAMED}            sync_folder(path.parent)\n", NAMED, f"{FILES} -k synced"),
    Bug(ATOMIC, "os.replace(path, previous)", "path.unlink()", f"{FILES} -k synced"),
    Bug(
        ATOMIC,
        "            os.fsync(descriptor)\n            if previous",
        '            with open(temporary, "rb") as file:\n                os.fsync(file)\n            if previous',
        f"{FILES} -k opened_again",
    ),
    Bug(
        ATOMIC,
        "if not os.path.samestat(os.fstat(descriptor), os.stat(temporary)):",
        "if False:",
        f"{FILES} -k took_the",
    ),
    Bug(
        "src/rwkv_bone/checkpoints/stream.py",
        "record.file_size = record.compress_size = memoryview",
        "record.file_size = memoryview",
        "tests/checkpoints/test_checkpoints.py -k zipfile_writes",
    ),
    Bug(ATOMIC, "    if not overwrite:\n        try:", "    if False:\n        try:", f"{FILES} -k during_the_last"),
    Bug(ATOMIC, "return hold(descriptor) and", "return True and", f"{FILES} -k killed_writer"),
    Bug(ATOMIC, "    for left in leftovers(path):\n        _remove(left)\n", "", f"{FILES} -k killed_writer"),
    Bug(ATOMIC, "(made_here or ", "(True or ", f"{FILES} -k another_machine"),
    Bug(ATOMIC, "    if len(name) <= room:", "    if True:", f"{FILES} -k every_name"),
    Bug(ATOMIC, "-{mark}.", "-.", f"{FILES} -k long_name"),
    Bug(ATOMIC, "        sync_folder(folder.parent)\n", "", f"{FILES} -k folders_above"),
    Bug(
        ATOMIC, "        if error.errno not in NOT_SYNCED:\n            raise\n", "        pass\n", f"{FILES} -k put_up"
    ),
    Bug(
        "src/rwkv_bone/checkpoints/stream.py",
        'with open(path, "wb") as file, zipfile.ZipFile(file, "w"',
        'with zipfile.ZipFile(path, "w"',
        f"{FILES} -k tried_in_another",
    ),
    Bug(LOCKS, "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB", "tests/test_locks.py"),
    Bug(LOCKS, "self.start and now and now != self.start", "False", "tests/test_locks.py -k later_one"),
    # What is saved, and in which order.
    Bug(SAVING, "            self._log.sync()\n", "", f"{SAVES} -k on_the_disk"),
    Bug(SAVING, "earlier.path.name == project.RESUME_FILE", "True", f"{SAVES} -k takes_the_place"),
    Bug(SAVING, 'metadata["trained"], True\n', 'metadata["trained"], False\n', f"{SAVES} -k on_the_disk"),
    Bug(SAVING, "if bad := [", "if False and [", f"{SAVES} -k finite"),
    Bug(STATE, "                if bad:\n", "                if False:\n", f"{SAVES} -k finite"),
    Bug(SAVING, "max(60 * minutes, self._seconds / MOST_OF_THE_TIME)", "60 * minutes", f"{SAVES} -k fiftieth"),
    Bug(SAVING, "int(trainer.is_global_zero and self._is_due())", "int(self._is_due())", f"{SAVES} -k main_process"),
    Bug(
        SAVING,
        "with_state = self.config.save_state and step > self._state_step",
        "with_state = True",
        f"{SAVES} -k once",
    ),
    Bug(SAVING, "and Path(name).name == name", "", f"{SAVES} -k nothing_removed"),
    Bug(
        SAVING,
        "self._adapters[: -self.config.keep]",
        "self._adapters[: 1 - self.config.keep]",
        f"{SAVES} -k keep_leaves",
    ),
    Bug(
        SAVING,
        "            self._remove_older()  # what a kill has prevented\n",
        "            pass\n",
        f"{SAVES} -k kill_has_left",
    ),
    # What is read.
    Bug(STATE, "    check_values(checkpoints.read_state(path), path)\n", "", f"{SAVES} -k spoilt"),
    Bug(
        STATE,
        "except (UserError, OSError) as error:\n            problems",
        "except OSError as error:\n            problems",
        f"{SAVES} -k spoilt",
    ),
    Bug(LOG, "and math.isfinite(number)", "", f"{SAVES} -k no_run_can"),
    Bug(LOG, "record and 1 <= record", "record and 0 <= record", f"{SAVES} -k no_run_can"),
    Bug(LOG, "found.keys() - torn", "found.keys()", f"{SAVES} -k no_run_can"),
    # The memory of a run on a CPU.
    Bug(LOG, '"VmHWM:"', '"VmMissing:"', "tests/training/test_log.py -m slow -k peak_is_of_this"),
    Bug(
        "src/rwkv_bone/allocator.py",
        "self._usual * (1 + GROWTH)",
        "self._usual",
        "tests/test_allocator.py -k grown_by_a_tenth",
    ),
    Bug(
        "src/rwkv_bone/allocator.py",
        "self.give_back()\n            self._usual = 0",
        "self.give_back()",
        "tests/test_allocator.py -k grown_by_a_tenth",
    ),
    # What is said.
    Bug(DISK, "epoch % run.epoch_save == 0", "True", f"{SAVES} -k number_of_saves"),
    Bug(DISK, " - sum(end % run.save_steps == 0 for end in at if run.save_steps)", "", f"{SAVES} -k number_of_saves"),
)
