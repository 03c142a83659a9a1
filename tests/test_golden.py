"""What programs send, their captured graphs and their bits are those written in `golden/`, byte for byte.

A commit that means to change them writes the files anew (`python tests/golden/dump.py`) and says why.
"""

from __future__ import annotations

import pytest
import torch
from golden.dump import PROGRAMS, processor, read, told


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_is_what_it_was(name):
    expected, found = read(name), told(name)
    same = expected.pop("processor") == processor()
    assert list(found) == list(expected)
    for head, text in found.items():
        if head.startswith("values") and not same:  # another processor's matmuls round otherwise
            of, was = (torch.tensor(float.fromhex(part.split()[1])) for part in (text, expected[head]))
            torch.testing.assert_close(of, was, rtol=1e-3, atol=0.0)  # of float8; the others are far closer
        else:
            assert text == expected[head], head
