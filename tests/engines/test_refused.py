"""Who is not let in: unregistered nodes, and certificates of another authority."""

import re
import time
from pathlib import Path

import pytest

from tests.engines.machines import Machine, Network
from tests.engines.test_two_machines import SITES, play, wait_for, write_files

pytestmark = pytest.mark.engines
NODE = (
    "timeout 60 flower-supernode --superlink 192.0.2.1:8000 --max-retries 1 "
    "--node-config 'site-file=\"site.toml\"' "
)


def registrations(machine: Machine) -> int:
    return machine.read().count("Successfully registered client")


def test_flower_refuses_strangers(network: Network, two_sites: Path) -> None:
    write_files(network, two_sites, "Flower")
    play(network, "Flower", until="supernode register")
    server, stranger = network["server"], network["stranger"]
    for name in ("ca.crt", "ca.key"):
        (stranger.folder / f"true-{name}").write_bytes((server.folder / name).read_bytes())
    prepared = stranger.run(
        'ssh-keygen -q -t ecdsa -b 384 -N "" -f node\n'
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:secp384r1 -nodes -days 9 "
        '-subj "/CN=another authority" -keyout other.key -out other.crt\n'
    )
    assert prepared == 0, stranger.read()
    log = server.folder / "superlink.log"
    refused = {
        "unregistered": NODE + "--root-certificates true-ca.crt --auth-supernode-private-key node",
        "without a key": NODE + "--root-certificates true-ca.crt",
        "another authority": NODE + "--root-certificates other.crt "
        "--auth-supernode-private-key node",
        "without TLS": NODE + "--insecure --auth-supernode-private-key node",
    }
    for what, command in refused.items():
        code = stranger.run(command)
        # 124 would mean that it was still there after a minute.
        assert code not in (0, 124), f"{what}: {stranger.read()}"
        assert "Activated node_id" not in log.read_text(), what
    # The same commands with a registered key are let in.
    site = network["site-a"]
    assert (
        site.run(
            NODE.replace("timeout 60 ", "") + "--root-certificates ca.crt "
            "--auth-supernode-private-key node > supernode.log 2>&1 &"
        )
        == 0
    )
    wait_for(server, "superlink.log", "Activated node_id")


def test_flare_refuses_another_authority(network: Network, two_sites: Path) -> None:
    write_files(network, two_sites, "NVIDIA FLARE")
    play(network, "NVIDIA FLARE", until="192.0.2.1/startup/start.sh")
    server, stranger = network["server"], network["stranger"]
    # A kit for the same server and site, made with the same command by somebody else.
    project = (server.folder / "project.yml").read_text(encoding="utf-8")
    (stranger.folder / "project.yml").write_text(project, encoding="utf-8")
    assert stranger.run("nvflare provision -p project.yml -w kits --force") == 0
    assert stranger.run("kits/brainage/prod_00/site-b/startup/start.sh") == 0
    wait_for(stranger, "console.log", "CERTIFICATE_VERIFY_FAILED", 90)
    site = network["site-a"]
    assert site.run('SPARSEKIT_SITE="$PWD/site.toml" site-a/startup/start.sh') == 0
    wait_for(site, "console.log", "Successfully registered client", 90)
    time.sleep(3)
    assert registrations(stranger) == 0
    assert re.findall(r"Client: New client (\S+?)@", server.read()) == [SITES[0]]
