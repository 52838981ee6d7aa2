"""Fine-tune a Hugging Face model: `train_hf.py --help` lists every flag; `scripts/run_bone_hf.sh` is an example."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from rwkv_bone import cards, signals
from rwkv_bone.config.acts import HF
from rwkv_bone.config.flags import parse_section
from rwkv_bone.errors import exit_status
from rwkv_bone.hf.flags import EXAMPLES, IGNORED_FLAGS, HfConfig


def main() -> None:
    description = "Fine-tune a Hugging Face causal language model with Bone or Bat."
    config = cards.settle(
        parse_section("train_hf.py", description, HfConfig, sys.argv[1:], IGNORED_FLAGS, EXAMPLES, HF)
    )
    # Imported late: --help and mistakes in the flags are answered at once.
    from rwkv_bone.hf.finetune import finetune, launches
    from rwkv_bone.hf.launch import end_with_launcher, launch

    if launches(config):
        launch(sys.argv, config.devices)
    else:
        signals.hear()
        end_with_launcher()
        finetune(config)


if __name__ == "__main__":
    sys.exit(exit_status(main))
