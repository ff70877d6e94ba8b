"""Rounds over a slow link, dense against sparse: time against bytes.

    python tools/measure_bandwidth.py RESULTS.json [--width 1.0] [--cohort PATH]

Makes a network namespace of its own, whose loopback carries 20 Mbit/s in all, and in it runs the
`processes` engine as it is. Sites that send back what they get show the engine and the link alone;
with a cohort, whole runs follow, training included. Needs the right to make namespaces (root).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ECHO_SITE = Path(__file__).with_name("echo_site.py")
INSIDE = "SPARSEKIT_SLOW_NETWORK"
MBIT = 20
SPARSITY = 0.95
SITES = ("a", "b")


def main() -> int:
    """Measure, in a namespace that this makes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--cohort", type=Path)
    options = parser.parse_args()
    if INSIDE not in os.environ:
        words = ["unshare", "--net", sys.executable, __file__, *sys.argv[1:]]
        return subprocess.run(words, env=os.environ | {INSIDE: "1"}, check=False).returncode
    slow_down()
    with tempfile.TemporaryDirectory() as folder:
        results = {
            "mbit": MBIT,
            "sites": len(SITES),
            "sparsity": SPARSITY,
            "width": options.width,
            "echo": echoes(options.width, Path(folder)),
        }
        if options.cohort is not None:
            results |= whole_runs(options.cohort.absolute(), options.width, Path(folder))
        else:
            from sparsekit.fed.result import describe_machine

            results["machine"] = describe_machine()
    options.results.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    return 0


def slow_down() -> None:
    """Let this namespace's loopback carry 20 Mbit/s, in packets of Ethernet's size."""
    for words in (
        "ip link set lo mtu 1500 up",
        f"tc qdisc add dev lo root tbf rate {MBIT}mbit burst 16kb latency 200ms",
    ):
        subprocess.run(words.split(), check=True)


def payloads(width: float) -> dict[str, bytes]:
    """Return a network's weights as the codec sends them, all and with most pruned."""
    import torch

    from sparsekit import encode, prune
    from sparsekit.models import BrainAgeCNN

    torch.manual_seed(0)
    model = BrainAgeCNN(width=width)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks = prune.magnitude_masks(model, SPARSITY)
    pruned = {n: torch.where(masks[n], w, 0.0) if n in masks else w for n, w in weights.items()}
    return {"dense": encode(weights), "sparse": encode(pruned, masks=masks)}


def echoes(width: float, folder: Path) -> dict[str, Any]:
    """Time exchanges of the engine with sites that do nothing else."""
    from sparsekit.fed import messages
    from sparsekit.fed.engines.base import Reply
    from sparsekit.fed.engines.processes import ProcessesEngine, SiteProcess
    from sparsekit.fed.engines.site_process import SECRET

    class EchoEngine(ProcessesEngine):
        def _spawn(self, site: SiteProcess) -> None:
            port = str(self._listener.getsockname()[1])
            self._children[site.name] = subprocess.Popen(
                [sys.executable, str(ECHO_SITE), port, site.name],
                env=os.environ | {SECRET: self._secret},
            )

    engine = EchoEngine(
        [SiteProcess(name, 1, folder) for name in SITES],
        run=folder, cache=folder, threads=len(SITES), deadline=600.0,
    )  # fmt: skip
    found: dict[str, Any] = {}
    try:
        engine.hello()
        for kind, payload in payloads(width).items():
            request = messages.pack({}, payload)
            # Many small rounds in a row: what the link lets through at once counts once.
            times = []
            for _ in range(2 if kind == "dense" else 12):
                start = time.perf_counter()
                replies = engine.exchange(dict.fromkeys(SITES, request), lambda _: None)
                times.append(time.perf_counter() - start)
                assert all(isinstance(r, Reply) and r.data == request for r in replies.values())
            found[kind] = {
                "payload_bytes": 2 * len(SITES) * len(payload),
                "seconds": statistics.fmean(times),
                "seconds_of_rounds": times,
            }
    finally:
        engine.close()
    for row in engine.closed:
        assert row["in_order"], row
        assert row["sent"] == row["kernel_sent"], row
        assert row["received"] == row["kernel_received"], row
    return found


def whole_runs(cohort: Path, width: float, folder: Path) -> dict[str, Any]:
    """Run federations as users do and take their last round."""
    from sparsekit.fed.config import make_config
    from sparsekit.fed.runner import start_run

    settings = {
        "cohort": str(cohort), "engine": "processes", "width": width, "rounds": 4, "epochs": 1,
        "resolution": 4, "max_steps": 2, "sparsity": SPARSITY, "threads": 2, "batch": 2,
    }  # fmt: skip
    found: dict[str, Any] = {}
    for kind, strategy in (("dense", "fedavg"), ("sparse", "fedsparsify-global")):
        config = make_config(settings, {"strategy": strategy})
        result = start_run(config, folder / kind, cache=folder / "cache")
        last, before = result["history"][-1], result["history"][-2]
        found[kind] = {
            "payload_bytes": last["payload_down"] + last["payload_up"],
            "seconds": last["seconds"] - before["seconds"],
            "sites": result["data"]["sites"],
        }
    return {"runs": found, "machine": result["machine"]}


if __name__ == "__main__":
    sys.exit(main())
