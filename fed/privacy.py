"""A membership audit of a run: do its models tell who was trained on? See docs/privacy-audit.md."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import xxhash

from sparsekit.errors import RunError, UsageError
from sparsekit.fed import checkpoint
from sparsekit.fed.attack_features import (
    PREDICTION,
    Features,
    feature_file,
    features_of,
    load_features,
    save_features,
    stack_rounds,
)
from sparsekit.fed.attack_models import ATTACKS, mean_error
from sparsekit.fed.attack_pairs import play_attacks, summarize_attack
from sparsekit.fed.attack_scores import DRAWS, Array, Draws, draw_people, drawn_mean, interval
from sparsekit.fed.config import RunConfig, load_config_file, make_config
from sparsekit.fed.membership import LEAST_PEOPLE, Asked, people_to_ask
from sparsekit.fed.plan import TASK_EVALUATE, plan_for
from sparsekit.fed.prepare import Prepared, prepare_sites
from sparsekit.fed.privacy_files import AUDIT_FILE, FEATURES_FOLDER, LAYOUT, write_draws
from sparsekit.fed.runner import CONFIG_FILE, is_running
from sparsekit.fed.storage import write_json

ENSEMBLE = 5
MOMENTS = 6
SHUFFLES = 19


class AuditWatcher(Protocol):
    """Told how far an audit is."""

    def preparing(self, done: int, total: int) -> None:
        """Count scans that have been read."""
        ...

    def asking(self, done: int, total: int) -> None:
        """Count the questions to models: people times rounds."""
        ...

    def attacking(self, done: int, total: int) -> None:
        """Count attackers' trainings."""
        ...

    def notice(self, text: str) -> None:
        """Take something that a user should read."""
        ...


@dataclass(frozen=True)
class _Subject:
    """What is audited: a run's settings, the people, and the rounds whose models are used."""

    run: Path
    config: RunConfig
    prepared: Prepared
    people: dict[str, Asked]
    left_out: dict[str, str]
    contents: dict[str, str]
    windows: list[list[int]]


def audit_run(
    run: Path,
    *,
    watcher: AuditWatcher,
    attacks: Sequence[str] = tuple(ATTACKS),
    moments: int = MOMENTS,
    ensemble: int = ENSEMBLE,
    shuffles: int = SHUFFLES,
    threads: int | None = None,
    cache: Path | None = None,
) -> dict[str, Any]:
    """Attack a run's models and write what was found to ``RUN/privacy.json``.

    Parameters
    ----------
    run : Path
        Folder of a run with checkpoints.
    watcher : AuditWatcher
    attacks : sequence of str
        Names in `ATTACKS`.
    moments : int
        How many models along the training to attack, the last one among them.
    ensemble : int
        Rounds whose models an attack sees together, the last ones up to the moment.
    shuffles : int
        Plays with shuffled membership at the last moment.
    threads : int, optional
        Of torch; the run's own by default.
    cache : Path, optional
        The run's cache of prepared scans.

    Returns
    -------
    dict
        What the file holds.

    Raises
    ------
    UsageError
        If ``run`` is not the folder of a run, or an option is out of range.
    RunError
        If its checkpoints, people or scans do not allow an audit; the text says what would.
    """
    _check_options(attacks, moments, ensemble, shuffles, threads)
    subject = _open(run, moments, ensemble, cache, watcher)
    for site, why in subject.left_out.items():
        watcher.notice(f"{site} takes no part: {why}")
    with _torch_threads(threads or subject.config.threads):
        files = _ask_models(subject, watcher)
        found, draws = _attack(subject, files, attacks, shuffles, watcher)
    result = {
        "layout": LAYOUT,
        "draws": write_draws(run, draws),
        "config": {
            name: value
            for name, value in vars(subject.config).items()
            if isinstance(value, (str, int, float))
        },
        "sparsity": subject.config.sparsity if subject.config.sparse else 0.0,
        "synthetic": subject.prepared.synthetic,
        "ensemble": ensemble,
        "attacks": list(attacks),
        "sites": {
            site: {
                "members": int(one.member.sum()),
                "non_members": int((~one.member).sum()),
                "people": one.digest,
            }
            for site, one in subject.people.items()
        },
        "left_out": subject.left_out,
        "moments": found,
    }
    write_json(run / AUDIT_FILE, result)
    return result


def _check_options(
    attacks: Sequence[str], moments: int, ensemble: int, shuffles: int, threads: int | None
) -> None:
    if not attacks or not set(attacks) <= set(ATTACKS):
        raise UsageError(f"attack: expected some of {', '.join(ATTACKS)}; got {', '.join(attacks)}")
    for name, value, least in (
        *(("moments", moments, 1), ("ensemble", ensemble, 1), ("shuffles", shuffles, 0)),
        ("threads", 1 if threads is None else threads, 1),
    ):
        if not least <= value <= 1000:
            raise UsageError(f"{name}: expected {least} to 1000, got {value}")


def _open(
    run: Path, moments: int, ensemble: int, cache: Path | None, watcher: AuditWatcher
) -> _Subject:
    if not (run / CONFIG_FILE).is_file():
        raise UsageError(f"run: {run} is not the folder of a run (it has no {CONFIG_FILE})")
    config = make_config(load_config_file(run / CONFIG_FILE))
    if config.deployed:
        raise RunError(
            f"run: the scans of {run} are on the machines of its sites; an audit needs all of them "
            "in one place, such as a run on one machine with the same settings"
        )
    if config.strategy == "centralized":
        raise RunError(
            f"run: {run} is centralized, and in the audit sites attack each other; audit a run "
            "with --strategy fedavg, fedsparsify-global or fedsparsify-local"
        )
    if is_running(run):
        raise RunError(f"run: another process is working on {run}; wait for it")
    windows = choose_windows(checkpoint.saved_rounds(run), moments, ensemble)
    if not windows:
        saved = [number for number in checkpoint.saved_rounds(run) if number]
        raise RunError(
            f"run: an attack looks at the models of {ensemble} rounds in a row, and {run} has "
            f"kept those of {len(saved)} ({', '.join(map(str, saved)) or 'none'}). Run it anew "
            f"with --keep-checkpoints {ensemble} for the last rounds, or 0 for the whole training"
        )
    saved_contents = checkpoint.load(run, windows[-1][-1]).contents
    prepared = _people_of(run, config, saved_contents, cache, watcher)
    people, left_out = {}, {}
    for site in prepared.sites:
        asked = people_to_ask(site)
        members = int(asked.member.sum())
        if members < LEAST_PEOPLE:
            left_out[site.name] = (
                f"{members} members and as many non-members of like ages, at least {LEAST_PEOPLE} "
                "of each are needed"
            )
        else:
            people[site.name] = asked
    if len(people) < 2:
        raise RunError(
            f"run: {run} has {len(people)} site(s) with enough people for an audit, at least 2 are "
            f"needed: {'; '.join(f'{site} has {why}' for site, why in left_out.items())}"
        )
    return _Subject(run, config, prepared, people, left_out, saved_contents, windows)


def choose_windows(saved: Sequence[int], moments: int, ensemble: int) -> list[list[int]]:
    """Return up to ``moments`` runs of ``ensemble`` saved rounds, evenly over the training.

    Round 0, the model that nobody has trained, is in none; the last one is the newest there is.
    """
    known = {number for number in saved if number > 0}
    ends = sorted(end for end in known if all(end - back in known for back in range(ensemble)))
    if not ends:
        return []
    places = np.linspace(len(ends) - 1, 0, min(moments, len(ends)))
    chosen = sorted({ends[round(float(place))] for place in places})
    return [list(range(end - ensemble + 1, end + 1)) for end in chosen]


def _people_of(
    run: Path,
    config: RunConfig,
    contents: Mapping[str, str],
    cache: Path | None,
    watcher: AuditWatcher,
) -> Prepared:
    if not Path(config.cohort).exists():
        raise RunError(
            f"cohort: {config.cohort}, on which {run} was trained, is not there any more; put it "
            f"back, or mend the path in {run / CONFIG_FILE}"
        )
    folder = cache or run.resolve().parent / "cache"
    prepared = prepare_sites(config, folder, watcher.preparing)
    now = {site.name: site.content for site in prepared.sites}
    if now != dict(contents):
        changed = sorted(s for s in {*now, *contents} if now.get(s) != contents.get(s))
        raise RunError(
            f"cohort: the people, ages or scans of {', '.join(changed)} are not those that {run} "
            "was trained on, so that nobody can say who is a member. Restore them"
        )
    return prepared


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _ask_models(subject: _Subject, watcher: AuditWatcher) -> dict[tuple[int, str], Path]:
    """Read off every model what attacks need, unless an earlier audit has; return the files."""
    folder = subject.run / FEATURES_FOLDER
    rounds = sorted({number for window in subject.windows for number in window})
    each = sum(len(asked.rows) for asked in subject.people.values())
    total, done = each * len(rounds), 0
    files: dict[tuple[int, str], Path] = {}
    for number in rounds:
        digest = xxhash.xxh3_64_hexdigest(checkpoint.model_payload(subject.run, number))
        missing = []
        for site, asked in subject.people.items():
            path = feature_file(folder, digest, asked, subject.contents[site])
            files[number, site] = path
            if load_features(path, len(asked.rows)) is None:
                missing.append(site)
            else:
                done += len(asked.rows)
        watcher.asking(done, total)
        if not missing:
            continue
        server = checkpoint.load(subject.run, number).server
        plan = plan_for(
            subject.config,
            round_number=number,
            task=TASK_EVALUATE,
            first_voxel=server.first_voxel,
            in_shape=server.in_shape,
            mean_age=server.mean_age,
            masked=False,
            local_sparsity=None,
        )
        for site in missing:
            asked = subject.people[site]

            def step() -> None:
                nonlocal done
                done += 1
                watcher.asking(done, total)

            device = torch.device(subject.config.device)
            features = features_of(server.weights, plan, asked, device=device, step=step)
            save_features(files[number, site], features)
    return files


def _attack(
    subject: _Subject,
    files: Mapping[tuple[int, str], Path],
    attacks: Sequence[str],
    shuffles: int,
    watcher: AuditWatcher,
) -> tuple[list[dict[str, Any]], dict[str, Array]]:
    """Play all attacks at all moments; return the moments' results and draws by name."""
    people = subject.people
    total, done = len(subject.windows) * len(attacks) * len(people), 0
    draws = {
        site: draw_people(int(one.member.sum()), int((~one.member).sum()), one.digest)
        for site, one in people.items()
    }

    def step() -> None:
        nonlocal done
        done += 1
        watcher.attacking(done, total)

    found: list[dict[str, Any]] = []
    drawn: dict[str, list[Array]] = {}
    for window in subject.windows:
        load = _loader(window, files, people)
        last = window is subject.windows[-1]
        scores = play_attacks(people, load, attacks, shuffles=shuffles if last else 0, step=step)
        moment, gap = _moment(subject, window, load, draws)
        drawn.setdefault("gap", []).append(gap)
        for attack in attacks:
            summary, wide = summarize_attack(
                scores.logits[attack], scores.shuffled[attack], people, draws
            )
            moment["attacks"][attack] = summary
            for measure, values in wide.items():
                drawn.setdefault(f"{attack}/{measure}", []).append(values)
        found.append(moment)
    return found, {name: np.stack(parts) for name, parts in drawn.items()}


def _loader(
    window: Sequence[int], files: Mapping[tuple[int, str], Path], people: Mapping[str, Asked]
) -> Callable[[str, Sequence[str]], Features]:
    def load(site: str, groups: Sequence[str]) -> Features:
        parts = []
        for number in window:
            part = load_features(files[number, site], len(people[site].rows), groups)
            if part is None:
                raise RunError(
                    f"run: {files[number, site]} was changed or removed; run the audit again"
                )
            parts.append(part)
        return stack_rounds(parts, groups)

    return load


def _moment(
    subject: _Subject,
    window: Sequence[int],
    load: Callable[[str, Sequence[str]], Features],
    draws: Mapping[str, Draws],
) -> tuple[dict[str, Any], Array]:
    """Return how good the models are on members and non-members, and draws of the gap."""
    history = checkpoint.load(subject.run, window[-1]).history
    every = sum(int(one.member.sum()) for one in subject.people.values())
    inside = outside = 0.0
    gap = np.zeros(DRAWS)
    for site, asked in subject.people.items():
        error = mean_error(load(site, [PREDICTION]))
        share = int(asked.member.sum()) / every
        ours, theirs = error[asked.member], error[~asked.member]
        inside += share * float(ours.mean())
        outside += share * float(theirs.mean())
        gap += share * drawn_mean(theirs, draws[site].others)
        gap -= share * drawn_mean(ours, draws[site].members)
    moment: dict[str, Any] = {
        "round": window[-1],
        "rounds": list(window),
        "sparsity": history[-1]["sparsity_prunable"],
        "member_mae": inside,
        "non_member_mae": outside,
        "gap": [outside - inside, *interval(gap)],
        "attacks": {},
    }
    return moment, gap
