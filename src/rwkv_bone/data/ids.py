"""Token ids against the model that is to read them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from rwkv_bone.errors import UserError


def check_ids(ids: Sequence[int] | np.ndarray, vocab_size: int, where: str, name: Callable[[int], object]) -> None:
    """UserError, beginning with `where`, if one of the ids of a row is beyond the model's embedding.

    vocab_size: rows of the embedding. name: the text of a token, for the message. On a GPU such an id would end the
    process in a device assert.
    """
    array = np.asarray(ids)
    beyond = array[(array < 0) | (array >= vocab_size)]
    if len(beyond):
        token = int(beyond[0])
        raise UserError(
            f"{where}: token {token} is outside the model's vocabulary of {vocab_size} ({name(token)!r} has no row in "
            "its embedding): use the tokenizer that the model was trained with, or first give the model rows for the "
            "added tokens"
        )
