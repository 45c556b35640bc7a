"""Where work is done, and what of torch's settings is changed for it."""

import pytest
import torch

from fl_bgmd.devices import repeatable


def test_what_is_to_repeat_leaves_torch_as_it_was() -> None:
    cudnn = torch.backends.cudnn
    before = torch.get_num_threads(), cudnn.deterministic
    with pytest.raises(RuntimeError, match="in the middle"):
        _fails_in_the_middle(before[0] + 1)
    assert (torch.get_num_threads(), cudnn.deterministic) == before


def _fails_in_the_middle(threads: int) -> None:
    with repeatable(threads):
        assert torch.get_num_threads() == threads
        assert torch.backends.cudnn.deterministic
        raise RuntimeError("in the middle")
