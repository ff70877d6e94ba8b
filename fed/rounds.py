"""One round of the server loop: send, receive, check every reply, account for it, aggregate."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from sparsekit.codec.core import STEPS
from sparsekit.codec.wire import Buffer
from sparsekit.errors import BaseMismatchError, CodecError, RunError, TemplateError
from sparsekit.fed import messages
from sparsekit.fed.algorithm import (
    LargeUpdateError,
    NonFiniteUpdateError,
    Order,
    ServerState,
    aggregate,
    check_norm,
    plan_round,
    read_update,
    whole_order,
)
from sparsekit.fed.config import RunConfig
from sparsekit.fed.engines.base import STALE, Answered, Engine, Failure, Reply
from sparsekit.fed.ledger import OUTCOME_OK, LedgerRow, message_row
from sparsekit.fed.merging import Merger
from sparsekit.fed.plan import TASK_TRAIN, Hello, Report, TrainPlan, from_control

# Even float32 numbers that have run away give less.
_MOST_REPORTED = 1e100


@dataclass(frozen=True)
class RoundOutcome:
    """What one exchange brought.

    Attributes
    ----------
    state : ServerState
        After aggregation; unchanged by an exchange that only evaluates.
    rows : list of LedgerRow
        Two per site.
    answers : dict of Report
        What came with the accepted replies, by site; their weights are in the state.
    failures : dict of Failure
        The others, each with its named outcome.
    order : Order
        What was sent.
    """

    state: ServerState
    rows: list[LedgerRow]
    answers: dict[str, Report]
    failures: dict[str, Failure]
    order: Order


def play_round(
    state: ServerState,
    config: RunConfig,
    engine: Engine,
    hellos: Mapping[str, Hello],
    answered: Answered,
    holding: Collection[str] = (),
) -> RoundOutcome:
    """Play the next round, or after the last one hand out and evaluate the final model.

    The sites of `hellos` are asked. Those in `holding` have the model of the round before: to them
    goes what has changed. One that has lost it gets the whole model at once.

    Raises
    ------
    RunError
        If fewer sites than the quorum gave a usable reply.
    """
    order = plan_round(state, config)
    plan = order.plan
    dense_bytes = 4 * sum(tensor.numel() for tensor in state.weights.values())
    replies, rows = _exchange(order, engine, sorted(hellos), answered, holding, dense_bytes)
    answers: dict[str, Report] = {}
    failures: dict[str, Failure] = {}
    updates = Merger()
    for site in sorted(hellos):
        # Once decoded and added it is not needed: of large models few are held at a time.
        reply = replies.pop(site)
        lost = reply if isinstance(reply, Failure) else None
        data: Buffer = b"" if isinstance(reply, Failure) else reply.data
        if isinstance(reply, Failure):
            verdict: Report | Failure = reply
        else:
            verdict = _judge(data, order, hellos[site], config, updates)
        if isinstance(verdict, Failure):
            failures[site] = verdict
        else:
            answers[site] = verdict
        report = verdict if isinstance(verdict, Report) else None
        rows.append(
            message_row(
                round_number=plan.round,
                client=site,
                direction="up",
                outcome=verdict.outcome if isinstance(verdict, Failure) else OUTCOME_OK,
                # A reply to the final hand-out carries no model, sparse or dense.
                dense_equivalent_bytes=dense_bytes if data and plan.task == TASK_TRAIN else 0,
                message_bytes=len(data),
                payload_bytes=_payload_bytes(data),
                travels=engine.travels,
                frame_bytes=engine.frame_bytes,
                carried_bytes=lost.received_bytes if lost else None,
                seconds=reply.seconds,
                flops_counted=report.flops_counted if report else 0,
                flops_executed=report.flops_executed if report else 0,
            )
        )
    _require_quorum(plan, config, answers, failures, rows)
    if plan.task == TASK_TRAIN:
        rounded = order.sent.weights if config.values in STEPS else None
        state = replace(
            aggregate(state, updates, config, rounded), sent=dict(order.sent.weights)
        )  # fmt: skip
    return RoundOutcome(state=state, rows=rows, answers=answers, failures=failures, order=order)


def _exchange(
    order: Order,
    engine: Engine,
    sites: Sequence[str],
    answered: Answered,
    holding: Collection[str],
    dense_bytes: int,
) -> tuple[dict[str, Reply | Failure], list[LedgerRow]]:
    """Send every site what it can decode; return the replies and the account of what went out."""
    # One message for all that get the same.
    new = [site for site in sites if site not in holding]
    whole = whole_order(order) if new else None
    sent = {site: order if whole is None or site in holding else whole for site in sites}
    replies = engine.exchange({site: sent[site].message for site in sites}, answered)
    rows = [_down(sent[s], engine, s, replies[s], dense_bytes) for s in sites]
    again = []
    for site in sites:
        reply = replies[site]
        lost = isinstance(reply, Failure) and reply.outcome == STALE
        if lost and sent[site].based:
            again.append(site)
            rows.append(
                message_row(
                    round_number=order.plan.round,
                    client=site,
                    direction="up",
                    outcome=STALE,
                    dense_equivalent_bytes=0,
                    message_bytes=0,
                    payload_bytes=0,
                    travels=engine.travels,
                    frame_bytes=engine.frame_bytes,
                    carried_bytes=reply.received_bytes if isinstance(reply, Failure) else None,
                    seconds=reply.seconds,
                )
            )
    if again:
        whole = whole or whole_order(order)
        second = engine.exchange(dict.fromkeys(again, whole.message), lambda _: None)
        rows += [_down(whole, engine, s, second[s], dense_bytes) for s in again]
        replies |= second
    return replies, rows


def _down(
    order: Order, engine: Engine, site: str, reply: Reply | Failure, dense_bytes: int
) -> LedgerRow:
    lost = reply if isinstance(reply, Failure) else None
    unsent = lost is not None and lost.sent_bytes == 0
    return message_row(
        round_number=order.plan.round,
        client=site,
        direction="down",
        outcome=lost.outcome if lost and unsent else OUTCOME_OK,
        dense_equivalent_bytes=0 if unsent else dense_bytes,
        message_bytes=len(order.message),
        payload_bytes=len(order.payload),
        travels=engine.travels,
        frame_bytes=engine.frame_bytes,
        carried_bytes=lost.sent_bytes if lost else None,
    )


def _payload_bytes(data: Buffer) -> int:
    """Return the payload's share of a reply, 0 for bytes that are no message."""
    try:
        return len(messages.unpack(data).payload)
    except CodecError:
        return 0


def _judge(
    data: Buffer, order: Order, hello: Hello, config: RunConfig, updates: Merger
) -> Report | Failure:
    """Check a reply from end to end and add its update; what is wrong costs only its site."""
    plan = order.plan
    try:
        message = messages.unpack(data)
        report = from_control(Report, message.control)
        if report.round != plan.round or report.site != hello.site:
            return Failure(
                "wrong-round",
                f"expected round {plan.round} from {hello.site}, "
                f"got round {report.round} from {report.site}",
            )
        if not _is_plausible(report, hello):
            return Failure("corrupt", "its report has counts or sums that cannot be")
        if plan.task != TASK_TRAIN:
            return report
        update = read_update(message.payload, plan=plan, sent=order.sent, n_train=hello.n_train)
        if config.max_update_norm is not None:
            check_norm(update, order.sent, config.max_update_norm)
        updates.add(update)
        return report
    except BaseMismatchError as error:
        return Failure(STALE, str(error))
    except TemplateError as error:
        return Failure("shape", str(error))
    except NonFiniteUpdateError as error:
        return Failure("nan", str(error))
    except LargeUpdateError as error:
        return Failure("norm", str(error))
    except CodecError as error:
        return Failure("corrupt", str(error))


def _is_plausible(report: Report, hello: Hello) -> bool:
    """Whether sums over all sites will be finite, and counts are those of the site."""
    numbers = [n for n in (report.test_abs_error_sum, report.train_loss) if n is not None]
    fine = all(0 <= number <= _MOST_REPORTED for number in numbers)
    return fine and report.test_n <= hello.n_test


class QuorumError(RunError):
    """Too few sites replied; ``rows`` is the round's account up to there."""

    def __init__(self, text: str, rows: list[LedgerRow]) -> None:
        super().__init__(text)
        self.rows = rows


def _require_quorum(
    plan: TrainPlan,
    config: RunConfig,
    answers: Mapping[str, Report],
    failures: Mapping[str, Failure],
    rows: list[LedgerRow],
) -> None:
    total = len(answers) + len(failures)
    needed = max(1, math.ceil(config.quorum * total - 1e-9))
    if len(answers) < needed:
        reasons = "; ".join(f"{site}: {f.outcome} ({f.detail})" for site, f in failures.items())
        raise QuorumError(
            f"round {plan.round}: {len(answers)} of {total} sites gave a usable reply, the quorum "
            f"is {needed}. {reasons}.",
            rows,
        )
