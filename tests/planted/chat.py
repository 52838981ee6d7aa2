"""Mistakes in a conversation: what is read, kept, saved, shown, and written for prompts."""

from tests.planted.bug import Bug

BUGS = (
    Bug(
        "src/rwkv_bone/chat/session.py",
        "voice.encode(closing[begun:])",
        "voice.encode(closing)",
        "tests/chat/test_session.py -k however_answers_end",
    ),
    Bug(
        "src/rwkv_bone/chat/session.py",
        "[*voice.encode(closing[begun:]), *voice.encode(text)]",
        "voice.encode(text)",
        "tests/chat/test_session.py -k however_answers_end",
    ),
    Bug(
        "src/rwkv_bone/chat/session.py",
        "        self.state = on_device(turn.before, self.voice.device)\n",
        "",
        "tests/chat/test_session.py -k undo",
    ),
    Bug("src/rwkv_bone/chat/session.py", "if forgotten >= 0:", "if False:", "tests/chat/test_session.py -k undo_gives"),
    Bug(
        "src/rwkv_bone/chat/load.py",
        ", self.wording.template.identity()):",
        "):",
        "tests/chat/test_session.py -k same_model_template",
    ),
    Bug(
        "src/rwkv_bone/chat/session.py",
        "if path.exists() and not (own and _is_ours(path)):",
        "if False:",
        "tests/chat/test_session.py -k never_written_over",
    ),
    Bug(
        "src/rwkv_bone/chat/session.py",
        "if voice != self.voice.fingerprint:",
        "if False:",
        "tests/chat/test_session.py -k same_model_template",
    ),
    Bug(
        "src/rwkv_bone/chat/session.py",
        '        if answer.ended == "unread":\n            return False\n',
        "",
        "tests/chat/test_session.py -k was_not_read",
    ),
    Bug(
        "src/rwkv_bone/chat/session.py",
        "            self.state = None\n        self._sampler",
        "            pass\n        self._sampler",
        "tests/chat/test_session.py -k without_turns",
    ),
    Bug(
        "src/rwkv_bone/inference/stopping.py",
        "if opened or answer.lstrip().startswith(thinking.BEGIN):",
        "if False:",
        "tests/chat/test_session.py -k however_answers_end",
    ),
    Bug(
        "src/rwkv_bone/chat/wording.py",
        "isinstance(self.template, WorldTemplate)",
        "True",
        "tests/chat/test_wording.py -k around_messages",
    ),
    Bug(
        "src/rwkv_bone/chat/screen.py",
        'return "".join(char if _is_harmless(char) else _number(char) for char in text)',
        "return text",
        "tests/chat/test_screen.py -k command",
    ),
    Bug(
        "src/rwkv_bone/chat/shown.py",
        "held = 0 if final else _beginning_of(END, self._text)",
        "held = 0",
        "tests/chat/test_shown.py -k told_apart",
    ),
    Bug(
        "src/rwkv_bone/chat/batch.py",
        "cfg.stops or wording.stops",
        "()",
        "tests/chat/test_prompts.py -k each_gets_alone",
    ),
    Bug(
        "src/rwkv_bone/chat/batch.py",
        "print(text, file=sys.stderr, flush=True)",
        "print(text, flush=True)",
        "tests/chat/test_prompts.py -k nothing_but_json",
    ),
    Bug(
        "src/rwkv_bone/chat/prompts.py",
        "template.prompt(talk)",
        "template.prompt(talk) + template.response(talk)",
        "tests/chat/test_prompts.py -k as_in_training",
    ),
    Bug(
        "src/rwkv_bone/chat/batch.py",
        '        tally["skipped"] += 1\n',
        "",
        "tests/chat/test_prompts.py -k skipped_and_counted",
    ),
    Bug(
        "src/rwkv_bone/chat/lines.py",
        "os.fchmod(descriptor, 0o600)",
        "os.fchmod(descriptor, 0o644)",
        "tests/chat/test_talk.py -k users_own",
    ),
    Bug(
        "src/rwkv_bone/chat/talk.py",
        "session.sampling, session.stops = sampling_of(self.cfg), self.cfg.stops",
        "pass",
        "tests/chat/test_talk.py -k commands_do",
    ),
    Bug(
        "src/rwkv_bone/chat/talk.py",
        "            except KeyboardInterrupt:\n                print()\n            finally:",
        "            finally:",
        "tests/chat/test_talk.py -k in_a_terminal",
    ),
    Bug(
        "src/rwkv_bone/chat/lines.py",
        "set enable-bracketed-paste on",
        "set enable-bracketed-paste off",
        "tests/chat/test_talk.py -k in_a_terminal",
    ),
    Bug(
        "src/rwkv_bone/chat/load.py",
        "\nimport torch\n",
        "\nimport lightning\nimport torch\n",
        "tests/chat/test_prompts.py -k lightning",
    ),
)
