"""What the frameworks' privacy features do with our payloads; docs/limits.md rests on it.

Each is called the way its framework calls it, around a message as our adapters make them.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsekit.codec import encode
from tests.engines.test_engines import skip_without

pytestmark = pytest.mark.engines
PAYLOAD = encode({"w": torch.linspace(-1.0, 1.0, 50)})


@pytest.fixture
def flower() -> Iterator[None]:
    skip_without("flower")
    from flwr.supercore.task_identity import TaskIdentity

    # Messages are made inside a task only; there is no public way to be in one.
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_task_id", "_run_id", "_node_id"):
            patch.setattr(TaskIdentity, name, 1)
        yield


def message(**settings: float) -> Any:
    from flwr.app import ConfigRecord, Message, MessageType

    from sparsekit.fed.engines.flower_app import _record

    content = _record(PAYLOAD)
    if settings:
        content["settings"] = ConfigRecord(dict(settings))
    return Message(content, dst_node_id=1, message_type=MessageType.TRAIN)


def reply(request: Any, context: Any = None) -> Any:
    from flwr.app import Message, MetricRecord

    from sparsekit.fed.engines.flower_app import _record

    del context
    content = _record(PAYLOAD)
    content["metrics"] = MetricRecord({"num-examples": 3})
    return Message(content, reply_to=request)


@pytest.mark.usefixtures("flower")
def test_flowers_differential_privacy_mods_refuse_bytes() -> None:
    from flwr.clientapp.mod import LocalDpMod, fixedclipping_mod

    with pytest.raises(TypeError, match="numpy conversion: 'sparsekit'"):
        LocalDpMod(1.0, 1.0, 1.0, 1e-5)(message(), None, reply)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="numpy conversion: 'sparsekit'"):
        fixedclipping_mod(message(clipping_norm=1.0), None, reply)  # type: ignore[arg-type]


@pytest.mark.usefixtures("flower")
@pytest.mark.parametrize("name", ["FedTrimmedAvg", "FedMedian", "Krum", "MultiKrum", "Bulyan"])
def test_flowers_robust_averages_refuse_bytes(name: str) -> None:
    from flwr.serverapp import strategy

    one = getattr(strategy, name)()
    with pytest.raises(TypeError, match="numpy conversion: 'sparsekit'"):
        one.aggregate_train(1, [reply(message()) for _ in range(6)])


@pytest.mark.usefixtures("flower")
def test_flowers_secure_aggregation_refuses_bytes() -> None:
    from flwr.app import Context, RecordDict
    from flwr.client.mod import secaggplus_mod

    nothing = RecordDict()
    context = Context(run_id=1, node_id=1, node_config={}, state=nothing, run_config={})
    with pytest.raises(KeyError, match="secaggplus_configs"):
        secaggplus_mod(message(), context, reply)


def filters() -> list[Callable[[], Any]]:
    from nvflare.app_common.filters.exclude_vars import ExcludeVars
    from nvflare.app_common.filters.percentile_privacy import PercentilePrivacy
    from nvflare.app_common.filters.svt_privacy import SVTPrivacy

    # Their defaults are None where their types are not optional.
    plain: list[Any] = [PercentilePrivacy, SVTPrivacy]
    return [*plain, lambda: ExcludeVars(exclude_vars=["w"])]


def test_flares_privacy_filters_leave_or_refuse_bytes() -> None:
    skip_without("flare")
    from nvflare.apis.dxo import DXO, DataKind
    from nvflare.apis.fl_context import FLContext
    from nvflare.apis.shareable import Shareable

    for make in filters():
        plain = Shareable({"payload": PAYLOAD})
        # No word of it: what looks like protection is none.
        assert make().process(plain, FLContext()) is plain
        assert plain["payload"] == PAYLOAD
    for make in filters()[:2]:
        wrapped = DXO(DataKind.WEIGHT_DIFF, {"payload": PAYLOAD}).to_shareable()
        with pytest.raises((TypeError, ValueError)):
            make().process(wrapped, FLContext())


def test_flares_homomorphic_encryption_is_not_in_our_extra() -> None:
    skip_without("flare")
    if find_spec("tenseal") is not None:
        pytest.skip("tenseal is installed, which the extra does not ask for")
    with pytest.raises(ModuleNotFoundError, match="tenseal"):
        __import__("nvflare.app_opt.he.model_encryptor")


def test_flares_filters_see_no_call(tmp_path: Path) -> None:
    skip_without("flare")
    seen = tmp_path / "seen"
    script = Path(__file__).with_name("collab_with_filters.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "work")],
        env=os.environ | {"SEEN": str(seen), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    lines = [json.loads(line) for line in seen.read_text().splitlines()]
    shown = {what[1]: [w[2] for w in lines if w[1] == what[1]] for what in lines}
    assert "b'answer to a payload'" in shown["site-1"], done.stdout + done.stderr
    for place in ("client_input", "client_output", "server_input", "server_output"):
        # They are in place, and called when Collab starts; the call itself passes none.
        assert shown[place]
        assert not [text for text in shown[place] if "payload" in text]
