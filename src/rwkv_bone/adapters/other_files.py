"""What a file is that was given as an adapter and is none: said in a sentence, with what to do instead."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from rwkv_bone.adapters.registry import split_key
from rwkv_bone.errors import UserError

WHOLE = {"emb.weight", "head.weight"}  # every model has them, and no adapter both


def refuse_other_files(path: Path, keys: Collection[str], metadata: Mapping | None) -> None:
    """UserError for a file to continue a run from, the state of an optimiser, and a whole model.

    keys, metadata: those of the file.
    """
    if metadata and "trained" in metadata and any(key.endswith(".exp_avg") for key in keys):
        trained = path.with_name(str(metadata["trained"]))
        kind = "model" if metadata.get("kind") == "none" else "adapter"
        raise UserError(
            f"{path} is what --resume continues a run from, with the optimiser's state: the {kind} that was saved with "
            f"it is {trained}"
        )
    if WHOLE <= set(keys) and not any(split_key(key) for key in keys):
        full = metadata is not None and metadata.get("kind") == "none"
        how = ", in which every weight was trained (--peft none)" if full else ""
        raise UserError(
            f"{path} is a whole model{how}, not an adapter: nothing needs to be merged, it is used as it is (give "
            "it as --load_model, or convert it with scripts/convert.sh --base_model)"
        )
