"""Mistakes in what a run says, keeps and measures."""

from tests.planted.bug import Bug

CONSOLE, ERRORS = "src/rwkv_bone/console.py", "src/rwkv_bone/errors.py"
TRAINING, CONVERSION = "src/rwkv_bone/training", "src/rwkv_bone/conversion"
INFERENCE = "src/rwkv_bone/inference"
CLUSTER, HANGING = "src/rwkv_bone/cluster", "src/rwkv_bone/cluster/hanging.py"
WATCH, MEETING, CARDS = "tests/training/test_watch.py", "tests/test_meeting.py", "tests/training/test_launchers.py"
TABLE = "tests/training/test_signals_table.py -m slow"
SIGNALS, CALLBACKS, HF = "src/rwkv_bone/signals.py", "src/rwkv_bone/hf/callbacks.py", "tests/hf/test_finetune.py"
SAYS, LOG = "tests/test_console.py", "tests/training/test_log.py"
RUNS, RESUME = "tests/training/test_output.py", "tests/training/test_resume.py"
MERGE, TO_DISK = "tests/conversion/test_merge.py", "tests/conversion/test_merge_to_disk.py"

SAVES = "tests/training/test_data_lines.py -k never_reaches"

BUGS = (
    # Measurements.
    Bug(
        f"{TRAINING}/evaluation.py",
        'same = written["data"] == data',
        "same = True",
        "tests/training/test_heldout.py -k same_data",
    ),
    Bug(
        f"{INFERENCE}/evaluate.py",
        "max_new=longest + 1",
        "max_new=longest",
        "tests/inference/test_evaluate.py -k longest",
    ),
    Bug(
        f"{INFERENCE}/evaluate.py",
        "tokens += batch.window_tokens",
        "tokens += batch.tokens",
        "tests/inference/test_evaluate.py -k mean_over",
    ),
    # Merging.
    Bug(f"{CONVERSION}/verify.py", "FORMULA_TOLERANCE = 1e-5", "FORMULA_TOLERANCE = 3e-4", f"{MERGE} -k fifth_digit"),
    Bug(f"{CONVERSION}/verify.py", "AMPLIFICATION = 1e-4, 60", "AMPLIFICATION = 3e-3, 60", f"{MERGE} -k few_times"),
    Bug(f"{CONVERSION}/verify.py", "AMPLIFICATION = 1e-4, 60", "AMPLIFICATION = 1e-4, 1800", f"{MERGE} -k few_times"),
    Bug(f"{CONVERSION}/verify.py", "param_part(key) != STATE for", "True for", f"{MERGE} -k without_any_rounding"),
    Bug(
        "src/rwkv_bone/adapters/other_files.py", "if WHOLE <= set(keys) and", "if False and", f"{MERGE} -k whole_model"
    ),
    Bug(
        "src/rwkv_bone/adapters/other_files.py",
        'if metadata and "trained" in metadata and',
        "if False and",
        f"{MERGE} -k continues_from",
    ),
    Bug(
        f"{CONVERSION}/verify.py",
        "== self._expected[key] and checksum == self.checksums[key]",
        "== self._expected[key]",
        f"{MERGE} -k reads_back_differently",
    ),
    Bug(f"{CONVERSION}/verify.py", "forward_wrapped(base, x[1]", "forward_wrapped(base, x[0]", f"{MERGE} -k one_pass"),
    Bug(
        f"{CONVERSION}/verify.py",
        "return torch.stack((*without, adapted))",
        "return torch.stack((adapted, adapted))",
        f"{MERGE} -k one_pass",
    ),
    Bug(f"{CONVERSION}/folder.py", "if overwrite and path.exists()", "if path.exists()", f"{TO_DISK} -k last_sync"),
    Bug(f"{CONVERSION}/verify.py", "if tensor is not self.base", "if False and self.base", f"{MERGE} -k overflows"),
    Bug(f"{CONVERSION}/ahead.py", "> AHEAD:", "> 9:", f"{TO_DISK} -k computed_ahead"),
    Bug("src/rwkv_bone/adapters/bone.py", '["bone"][:, outputs]', '["bone"]', f"{TO_DISK} -k in_pieces"),
    Bug(f"{CONVERSION}/output.py", "if needed > free:", "if False:", f"{TO_DISK} -k without_room"),
    Bug(
        f"{CONVERSION}/output.py",
        "            self.check_name(overwrite)  # which",
        "            # which",
        f"{TO_DISK} -k two_merges",
    ),
    Bug(f"{CONVERSION}/stopping.py", "signal.signal(each, signal.SIG_IGN)", "pass", f"{TO_DISK} -k a_signal"),
    # Output.
    Bug(CONSOLE, 'errors="backslashreplace"', 'errors="strict"', f"{SAYS} -k encoding_lacks"),
    Bug(
        CONSOLE,
        "            except OSError as error:\n                self.fail(error)",
        "            except BrokenPipeError as error:\n                self.fail(error)",
        f"{SAYS} -k full_disk",
    ),
    Bug(CONSOLE, "os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)", "pass", f"{SAYS} -k closed_at_the_start"),
    Bug(
        CONSOLE,
        "while (written := super().write(data)) is None:",
        "while (written := super().write(data)) is None and False:",
        f"{SAYS} -k non_blocking",
    ),
    Bug(CONSOLE, "known = not shown or columns(stream) > 0", "known = True", f"{SAYS} -k any_width"),
    Bug(CONSOLE, "dynamic_ncols=known", "dynamic_ncols=False", f"{SAYS} -k narrower"),
    Bug(CONSOLE, "number == 1", "number <= 1", f"{SAYS} -k noun"),
    Bug(ERRORS, "return 128 + SIGPIPE", "return 0", f"{SAYS} -k only_shows"),
    Bug(
        "src/rwkv_bone/commands.py",
        "preview import main\n\n        main(prog)\n\n    return exit_status(body, shows=True)",
        "preview import main\n\n        main(prog)\n\n    return exit_status(body)",
        "tests/test_console.py -k preview",
    ),
    # Runs.
    Bug(SIGNALS, "signal.SIGTERM, signal.SIGHUP)", "signal.SIGTERM)", f"{RESUME} -k several_signals"),
    Bug(SIGNALS, "return number == signal.SIGHUP or together", "return together", f"{WATCH} -k two_signals"),
    Bug(SIGNALS, "together = number != signal.SIGINT and", "together =", f"{WATCH} -k ctrl_c_twice"),
    Bug(SIGNALS, "now - self._when[number] < TOGETHER", "False", f"{WATCH} -k both_send"),
    Bug(SIGNALS, "os.register_at_fork(after_in_child=self._forget)", "pass", f"{WATCH} -k forked_process"),
    Bug(SIGNALS, "    kill(descendants())\n", "", f"{WATCH} -k what_it_has_started"),
    Bug(HANGING, "if seen.silent > self.timeout:", "if False:", f"{WATCH} -k silent_rank"),
    Bug(HANGING, "if self.spins else all(idle)", "", f"{WATCH} -k works_or_writes"),
    Bug(HANGING, "if self.seen.keys() <= {0} or", "if", f"{WATCH} -k first_alone"),
    Bug(HANGING, "1 if prepared else PATIENCE", "1", f"{WATCH} -k loading_has_no_limit"),
    Bug(HANGING, "own = seconds * seen.life.share", "own = seconds", f"{WATCH} -k hardly_comes"),
    Bug(f"{CLUSTER}/process.py", "self._owed.get(thread, 0.0) + waited", "waited", f"{WATCH} -k told_at_its_end"),
    Bug(f"{CLUSTER}/process.py", "min(all_of_it, seconds)", "0.0", f"{WATCH} -k crowded_processor"),
    Bug(f"{CLUSTER}/links.py", 'if hello.get("token") == token:', "if True:", f"{MEETING} -k lost_as_soon"),
    Bug(
        f"{CLUSTER}/links.py",
        "if time.monotonic() > end:\n            raise UserError(f",
        "if False:\n            raise UserError(f",
        f"{MEETING} -k lost_as_soon",
    ),
    Bug(f"{CLUSTER}/join.py", "        found = Launched()\n", "", f"{MEETING} -k run_on_one"),
    Bug(
        "src/rwkv_bone/commands.py",
        ", Watch(world, config.run.rank_timeout) as watch:\n            with uncollected():\n"
        "                from rwkv_bone.training.fit import fit\n\n            fit(config, watch)\n",
        ":\n            with uncollected():\n"
        "                from rwkv_bone.training.fit import fit\n\n"
        "            with Watch(world, config.run.rank_timeout) as watch:\n                fit(config, watch)\n",
        f"{TABLE} -k importing",
    ),
    Bug(
        f"{TRAINING}/saving.py",
        'elif module.asked["save"]:',
        'elif module.asks["save"]:',
        f"{TABLE} -k 'by and minute'",
    ),
    Bug(f"{TRAINING}/launchers.py", "there == 1 and world.devices > 1 and world.launched", "False", f"{CARDS} -k srun"),
    Bug(f"{TRAINING}/launchers.py", " and world.launched:", ":", f"{CARDS} -k too_few"),
    Bug(HANGING, "(item[1].life.waits, item[1].life.done)", "item[0]", f"{WATCH} -k did_least"),
    Bug(SIGNALS, "if signal.getsignal(number) != signal.SIG_IGN:", "if True:", f"{RESUME} -k started_to_ignore"),
    Bug(CALLBACKS, "if self._received:\n            control", "if False:\n            control", f"{HF} -k signal"),
    Bug(CALLBACKS, "self._listener.end()", "pass", f"{HF} -k signal"),
    Bug("src/rwkv_bone/hf/launch.py", "os.killpg(pid, number)", "pass", f"{HF} -m slow -k two_processes"),
    Bug("src/rwkv_bone/hf/launch.py", "or result.is_failed()", "", f"{HF} -m slow -k ends_the_others"),
    Bug(CALLBACKS, "args.save_steps > state.max_steps", "False", f"{HF} -k never_reaches"),
    Bug(f"{TRAINING}/disk.py", "run.save_steps >= total_steps", "run.save_steps > total_steps", f"{SAVES}"),
    Bug(f"{TRAINING}/disk.py", "run.epoch_save > run.epoch_count", "False", f"{SAVES}"),
    Bug("src/rwkv_bone/config/names.py", "str(path).encode()", "pass", "tests/checkpoints/test_odd_files.py -k utf8"),
    Bug(
        f"{TRAINING}/trainer.py",
        "if isinstance(stop.__context__, KeyboardInterrupt):",
        "if False:",
        f"{RESUME} -k leaves_at_once",
    ),
    Bug(
        f"{TRAINING}/log.py",
        "            self._incomplete = True\n            yield",
        "            yield",
        f"{LOG} -k said_once_and_written_whole",
    ),
    Bug(f"{TRAINING}/log.py", '1 <= record["step"] <= steps', '1 <= record["step"]', f"{LOG} -k damaged_log"),
    Bug(
        f"{TRAINING}/project.py",
        "(folder, *folder.absolute().parents)",
        "(folder, folder.mkdir(parents=True) or folder)",
        f"{RUNS} -k leaves_no_folder",
    ),
    Bug(
        f"{TRAINING}/prepare.py",
        "if not (continued or empty):  # a",
        "if not empty:  # a",
        f"{RESUME} -k without_its_file",
    ),
    Bug(f"{TRAINING}/progress.py", "self._bar.disable, self._bar = True, None", "pass", f"{LOG} -k goes_away"),
    Bug(f"{TRAINING}/saving.py", ', "threads": torch.get_num_threads()}', "}", f"{RESUME} -k threads"),
    Bug(f"{TRAINING}/report.py", "drawn.unlink(missing_ok=True)", "pass", f"{RUNS} -k cannot_be_drawn"),
    Bug(
        f"{TRAINING}/fit.py",
        "        console.keep_lost_output(folder / project.OUTPUT)\n",
        "",
        f"{RUNS} -k reader_has_gone",
    ),
)
