"""Plans a run by dry runs: changes that make it fit, and a search for the mesh, batch and remat that run fastest."""

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from memformer.training.config import RunError
from memformer.training.dryrun import DryRun, dry_run
from memformer.training.metrics import format_table, log

__all__ = ["Choice", "make_fit", "search_runs", "show_dry_run", "show_search"]

# keys of a config and their new values
Changes = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Choice:
    """A config that fits.

    Attributes:
      changes: dotted keys of the config and their values.
      found: its dry run.
      tokens: the most tokens per second.
    """

    changes: Changes
    found: DryRun
    tokens: float


def show_dry_run(config: Mapping[str, Any], where: str, *, full: bool = False) -> None:
    """Prints the result of `dry_run`; where the run does not fit, tries changes in order and prints each."""
    found = dry_run(config, where, full=full)
    log(str(found))
    if found.fits is False:
        for line in make_fit(config, where, found):
            log(line)


def make_fit(config: Mapping[str, Any], where: str, found: DryRun) -> Iterator[str]:
    """Applies changes that save memory, one after another, until the run fits; yields a sentence for each.

    In order: shard the state over all devices, recompute activations, bfloat16, micro-batches, a tensor axis. Each is
    compiled; those that need more devices or rows than there are, are left out.

    Args:
      config: a config that does not fit.
      where: as in `dry_run`.
      found: its dry run.
    """
    plain = _plain(config)
    devices, changes = int(found.devices.split()[0]), Changes()
    # as the compiler said: somewhat less than the chip has
    limit = (found.limit_bytes or 0) / 2**30
    for more in _savings(plain, devices):
        trial = {**changes, **more}
        try:
            found = dry_run(_apply(plain, trial), where, full=False)
        except RunError as error:
            yield f"tried {_flags(more)}: {str(error).splitlines()[0]}"
            continue
        changes = trial
        yield f"tried {_flags(more)}: {found.peak_bytes / 2**30:.2f} GiB of {limit:.2f} GiB"
        if found.fits:
            yield f"fits with {_flags(changes)}"
            return
    yield "no change here makes it fit: use more devices, or a smaller model or train.batch_size"


def _savings(config: Mapping[str, Any], devices: int) -> Iterator[Changes]:
    """Changes that save memory without changing the result of a step beyond rounding, in order of their price."""
    model, train, mesh = config["model"], config["train"], dict(config["mesh"])
    slices, expert = max(mesh.get("slices", 0), 1), mesh.get("expert", 1)
    shards = devices // (mesh["context"] * mesh["tensor"])
    if mesh["fsdp"] != shards // slices // expert and train["batch_size"] % shards == 0:
        yield {"mesh.data": slices, "mesh.fsdp": shards // slices // expert}
    if model.get("remat", "full") is None:
        yield {"model.remat": "projections"}
    if model.get("remat", "full") in (None, "projections"):
        yield {"model.remat": "full"}
    if model.get("dtype") == "float32":
        yield {"model.dtype": "bfloat16"}
    parts = 2 * train["accumulate"]
    while train["batch_size"] % (parts * shards) == 0:
        yield {"train.accumulate": parts}
        parts *= 2
    tensor = 2 * mesh["tensor"]
    kept = mesh["context"] * expert * slices
    while tensor <= 8 and model.get("heads", 1) % tensor == 0 and devices % (kept * tensor) == 0:
        rest = devices // (mesh["context"] * tensor)
        if train["batch_size"] % rest == 0:
            fsdp, micro = devices // (kept * tensor), max(train["batch_size"] // rest, 1)
            yield {"mesh.data": slices, "mesh.fsdp": fsdp, "mesh.tensor": tensor, "train.accumulate": micro}
        tensor *= 2


def show_search(config: Mapping[str, Any], where: str) -> None:
    """Prints the three best choices of `search_runs`.

    Raises:
      RunError: no choice fits, or the chip is unknown.
    """
    choices = search_runs(config, where)
    if not choices:
        raise RunError(f"--dryrun_search found no mesh, batch and remat that fits on {where}: use more devices.")
    rows = [
        (
            _flags(choice.changes),
            f"{choice.tokens:,.0f}",
            f"{100 * choice.found.roofline.mfu:.0f}%" if choice.found.roofline else "",
            choice.found.roofline.largest if choice.found.roofline else "",
            f"{choice.found.peak_bytes / 2**30:.1f}",
        )
        for choice in choices[:3]
    ]
    log(format_table(("the three best", "tokens/s at most", "MFU", "largest term", "GiB per device"), rows))


def search_runs(config: Mapping[str, Any], where: str, tries: int = 12) -> list[Choice]:
    """Compiles meshes, batches and remats, and returns those that fit, the fastest by their roofline first.

    For each mesh (all devices over fsdp; fsdp of 16 and data; a tensor axis of 2, 4, 8) the least remat that fits one
    row per shard, and then twice as many rows until the memory is full or more rows no longer add 3% of tokens/s.

    Args:
      config: the run; its mesh, batch size and remat are replaced.
      where: as in `dry_run`.
      tries: programs to compile at most.

    Raises:
      RunError: devices whose memory and peak rates are unknown.
    """
    plain, found = _plain(config), []
    devices = _count_devices(plain, where)
    for mesh in _meshes(plain, devices):
        rows = mesh["mesh.data"] * mesh["mesh.fsdp"] * plain["mesh"].get("expert", 1)
        remats, best = [None, "projections", "full"], 0.0
        while remats and tries > 0:
            changes = {**mesh, "train.batch_size": rows, "train.accumulate": 1}
            if "remat" in plain["model"]:
                changes["model.remat"] = remats[0]
            tries -= 1
            try:
                result = dry_run(_apply(plain, changes), where, full=False)
            except RunError as error:
                log(f"{_flags(changes)}: {str(error).splitlines()[0]}")
                break
            log(f"{_flags(changes)}: {result.peak_bytes / 2**30:.2f} GiB{'' if result.fits else ', does not fit'}")
            if result.roofline is None and result.limit_bytes is None:
                raise RunError(f"--dryrun_search needs a known accelerator, got {result.devices}.")
            if result.fits and result.roofline is not None:
                tokens = rows * result.feeding.steps / result.roofline.seconds if result.feeding else 0.0
                found.append(Choice(changes, result, tokens))
                if tokens < 1.03 * best:
                    break
                rows, best = 2 * rows, tokens
            elif best:
                break
            else:
                remats.pop(0)
    return sorted(found, key=lambda choice: -choice.tokens)


def _count_devices(config: Mapping[str, Any], where: str) -> int:
    from memformer.training.topology import find_devices

    return len(find_devices(where, max(config["mesh"].get("slices", 0), 1)))


def _meshes(config: Mapping[str, Any], devices: int) -> Iterator[Changes]:
    mesh, heads = config["mesh"], config["model"].get("heads", 1)
    slices = max(mesh.get("slices", 0), 1)
    inner = devices // slices // mesh["context"] // mesh.get("expert", 1)
    yield {"mesh.data": slices, "mesh.fsdp": inner, "mesh.tensor": 1}
    if inner > 16 and inner % 16 == 0:
        yield {"mesh.data": slices * inner // 16, "mesh.fsdp": 16, "mesh.tensor": 1}
    for tensor in (2, 4, 8):
        if inner % tensor == 0 and heads % tensor == 0:
            yield {"mesh.data": slices, "mesh.fsdp": inner // tensor, "mesh.tensor": tensor}


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return config.to_dict() if hasattr(config, "to_dict") else dict(config)


def _apply(config: Mapping[str, Any], changes: Changes) -> dict[str, Any]:
    """A copy of the config with these values."""
    result = copy.deepcopy(dict(config))
    for path, value in changes.items():
        section, key = path.split(".")
        result[section][key] = value
    return result


def _flags(changes: Changes) -> str:
    return " ".join(f"--config.{path}={value}" for path, value in changes.items())
