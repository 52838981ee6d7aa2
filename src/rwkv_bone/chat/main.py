"""Chat: python -m rwkv_bone.chat.main --load_model my-model.pth"""

from __future__ import annotations

import sys

from rwkv_bone.chat.flags import ChatConfig, parse_chat
from rwkv_bone.errors import exit_status

PROGRAM = "sh scripts/chat.sh"


def main(prog: str = PROGRAM) -> None:
    """A conversation, where standard input and output are a terminal; otherwise answers to prompts."""
    talks = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
    cfg = parse_chat(sys.argv[1:], prog, talks)
    if talks and not cfg.prompts:
        _converse(cfg)
    else:
        from rwkv_bone.chat.batch import answer_prompts

        answer_prompts(cfg)


def _converse(cfg: ChatConfig) -> None:
    from rwkv_bone.chat.lines import Lines
    from rwkv_bone.chat.load import load_voices
    from rwkv_bone.chat.screen import Style
    from rwkv_bone.chat.talk import Talk

    style = Style(cfg.color)
    Talk(cfg, load_voices(cfg), Lines(style, cfg.history), style).run()


if __name__ == "__main__":
    sys.exit(exit_status(main, shows=True))
