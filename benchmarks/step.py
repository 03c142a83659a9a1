"""One eager train step: functitan beside nn.Module, `fully_shard` and `parallelize_module`, in time and peak memory.

    python benchmarks/step.py [one fsdp tp]

The options, and the same with captured and compiled programs: `benchmarks/peers.py`.
"""

from __future__ import annotations

from peers import main

if __name__ == "__main__":
    main(eager=True)
