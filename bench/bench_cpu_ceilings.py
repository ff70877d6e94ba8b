"""What the machine can do at best, for the roofline: `sparsekit.bench.ceilings`.

Run with ``pytest bench/bench_cpu_ceilings.py``.
"""

from sparsekit.bench.ceilings import loads_case, stream_case
from sparsekit.bench.conftest import Compare


def test_stream(compare: Compare) -> None:
    compare(stream_case(), 15)


def test_loads(compare: Compare) -> None:
    compare(loads_case(), 15)
