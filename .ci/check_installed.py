"""Run a user's own loop against the installed wheel: `python check_installed.py own_loop.py`, outside the checkout.

Fails unless functitan comes from this environment, the loop has at most 10 lines, and its loss falls.
"""

import runpy
import sys
from pathlib import Path

import functitan as ft

script = Path(sys.argv[1])
assert Path(ft.__file__).is_relative_to(sys.prefix), f"functitan is {ft.__file__}, not in {sys.prefix}"
lines = [line for line in script.read_text().splitlines() if line.strip()]
assert len(lines) <= 10, f"{script} has {len(lines)} lines"
ran = runpy.run_path(str(script))
first = ran["loss"](ft.tree.map(lambda x: 0 * x, ran["params"]))
print(f"{len(lines)} lines, loss {first:.3g} of zeros -> {ran['value']:.3g}, with {ft.__file__}")
assert ran["value"] < 1e-2 * first
