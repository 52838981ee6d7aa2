"""The counter itself, on what can be added up by hand."""

import torch
from torch import nn

from tests.live_bytes import LiveBytes

KB = torch.ones(256)  # 1024 bytes, from before


def test_what_is_alive_at_once_is_counted_and_what_was_there_before_is_not():
    with LiveBytes() as live:
        a = KB + 1
        b = a + KB
        assert live.now == 2048
        del a
        assert live.now == 1024
        b = b + 1  # the new one is there before the old one goes
        assert (live.now, live.peak) == (1024, 2048)
        KB.view(16, 16).add_(0)
        assert (live.now, live.peak) == (1024, 2048)


def test_a_view_keeps_its_whole_storage_and_counts_once():
    with LiveBytes() as live:
        rows = torch.zeros(8, 256)
        last = rows[-1]
        rows.add_(1)
        assert live.now == 8192
        del rows
        assert live.now == 8192
        last = last.clone()
        assert live.now == 1024 and last.sum() == 256


def test_what_autograd_saves_is_counted_until_backward_frees_it():
    layer = nn.Linear(256, 256, bias=False)
    with LiveBytes() as live:
        hidden = layer(KB[None]).exp()
        loss = hidden.exp().sum()
        del hidden
        kept = live.now
        assert kept >= 2 * 1024  # both results of exp
        loss.backward()
        assert live.now < kept + layer.weight.nbytes and live.peak > live.now
