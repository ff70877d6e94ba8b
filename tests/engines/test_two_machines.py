"""docs/two-machines.md, command by command, on machines that are network namespaces."""

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from sparsekit.fed.config import load_config_file, make_config
from sparsekit.fed.runner import start_run
from tests.engines.machines import Machine, Network, blocks_of

pytestmark = pytest.mark.engines
PAGE = Path(__file__).parents[2] / "docs" / "two-machines.md"
SITES = ("site-a", "site-b")


def write_files(network: Network, cohort: Path, heading: str) -> None:
    """Write every file of the page to its machine."""
    (site_file,) = [b.text for b in blocks_of(PAGE, "All machines") if b.place == "site.toml"]
    for name in SITES:
        folder = network[name].folder
        (folder / "scans").mkdir()
        shutil.copy(cohort.parent / f"{name[-1]}.csv", folder / "scans" / "people.csv")
        (folder / "site.toml").write_text(site_file, encoding="utf-8")
    for block in blocks_of(PAGE, heading):
        if block.language != "bash":
            # The page names the setting in its text; it belongs to the last table.
            table = re.search(r"^\[(flare|flower)\]$", block.text, re.MULTILINE)
            more = 'interface = "eth0"\n' if table else ""
            path = network["server"].folder / block.place
            path.parent.mkdir(exist_ok=True)
            path.write_text(block.text + more, encoding="utf-8")


def play(network: Network, heading: str, *, until: str, after: str = "") -> None:
    """Run the page's commands in order, beyond the one with `after` up to the one with `until`."""
    blocks = [block for block in blocks_of(PAGE, heading) if block.language == "bash"]
    if after:
        blocks = blocks[1 + [after in block.text for block in blocks].index(True) :]
    for block in blocks:
        places = list(network.machines) if block.place == "everywhere" else [block.place]
        for place in places:
            machine = network[place]
            if block.text.startswith("export"):
                machine.prelude += block.text
            else:
                assert machine.run(block.text) == 0, machine.read()[-3000:]
        if "flower-superlink" in block.text:
            wait_for(network["server"], "superlink.log", "Uvicorn running")
        if "startup/start.sh" in block.text and block.place in SITES:
            wait_for(network[block.place], "console.log", "Successfully registered client")
        deliver(network)
        if until in block.text:
            return
    raise AssertionError(f"no command with {until}")


def deliver(network: Network) -> None:
    """Bring what people carry between the machines."""
    server = network["server"].folder
    for name in SITES:
        site = network[name].folder
        kit = server / "kits" / "brainage" / "prod_00" / name
        if kit.is_dir() and not (site / name).exists():
            shutil.copytree(kit, site / name, symlinks=True)
        if (server / "ca.crt").exists():
            shutil.copy(server / "ca.crt", site / "ca.crt")
        if (site / "node.pub").exists():
            shutil.copy(site / "node.pub", server / f"{name}.pub")


def wait_for(machine: Machine, path: str, text: str, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        file = machine.folder / path
        if file.exists() and text in file.read_text(encoding="utf-8", errors="replace"):
            return
        time.sleep(0.2)
    raise AssertionError(f"{machine.name}: no {text!r} in {path} within {seconds} s")


def check_run(network: Network, settings: str, cohort: Path, tmp_path: Path) -> dict[str, Any]:
    """Compare a run's weights with those of one process, and look at its account."""
    server = network["server"].folder
    run = server / "runs" / "first"
    given = load_config_file(server / settings)
    kept = {k: v for k, v in given.items() if not isinstance(v, dict)}
    # One thread for each of two sites at a time, as on the two machines.
    alone = make_config(kept, {"cohort": str(cohort), "engine": "inprocess", "threads": 2})
    start_run(alone, tmp_path / "alone")
    assert (run / "model.spu").read_bytes() == (tmp_path / "alone" / "model.spu").read_bytes()
    result: dict[str, Any] = json.loads((run / "result.json").read_text())
    ours = json.loads((tmp_path / "alone" / "result.json").read_text())
    for direction in ("down", "up"):
        for level in ("payload", "control", "dense_equivalent"):
            assert result["bytes"][direction][level] == ours["bytes"][direction][level]
        assert result["bytes"][direction]["transport"] is None
    assert result["accuracy"]["test_mae"] == pytest.approx(ours["accuracy"]["test_mae"])
    assert result["accuracy"]["site_n"] == ours["accuracy"]["site_n"]
    exchanges = json.loads((run / "interface.json").read_text())
    assert len(exchanges) == 3
    for one in exchanges:
        # Nothing but the federation uses this link, which ends at the server.
        assert one["interface_sent_bytes"] > one["request_bytes"]
        assert one["interface_received_bytes"] > one["reply_bytes"]
    assert not list(run.glob("sites/*/predictions.csv"))
    for name in SITES:
        assert (network[name].folder / "results" / "predictions.csv").exists()
    return result


def test_flare_provisioned(network: Network, two_sites: Path, tmp_path: Path) -> None:
    write_files(network, two_sites, "NVIDIA FLARE")
    play(network, "NVIDIA FLARE", until="fed run")
    check_run(network, "flare.toml", two_sites, tmp_path)
    play(network, "NVIDIA FLARE", after="fed run", until="192.0.2.1/startup/stop_fl.sh")
    end = time.monotonic() + 60
    while any(machine.pids() for machine in network.machines.values()):
        assert time.monotonic() < end, "FLARE's services go on"
        time.sleep(0.5)


def test_flower_deployed(network: Network, two_sites: Path, tmp_path: Path) -> None:
    write_files(network, two_sites, "Flower")
    play(network, "Flower", until="fed run")
    check_run(network, "flower.toml", two_sites, tmp_path)
