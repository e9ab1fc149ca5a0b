"""`hotset plan` and `hotset bench planner`: placements from a recorded load, and how good they are.

Reads and prints; `policies.place` decides. Must not know Ray. A plan file is one JSON object with
`physical_to_logical_map`, `shares` and the figures that are printed.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import click

from hotset.cluster.options import json_option
from hotset.errors import ConfigError

if TYPE_CHECKING:
    from hotset.policies.place_types import Placement

LOAD_NAMES = ("load", "activations", "counts", "expert_count")


def _arrays(path: Path) -> dict[str, Any]:
    """Every array of an .npz file by name, or that of an .npy file under "". Raises ConfigError."""
    import numpy as np

    try:
        found = np.load(path)
        return {"": found} if isinstance(found, np.ndarray) else dict(found)
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise ConfigError(
            f"{path.name} is no file of arrays of numbers",
            remedy="give an .npz or .npy file of counts",
        ) from error


def read_load(path: Path, *, name: str | None) -> Any:
    """Array [L, E] or [W, L, E] of an .npz or .npy file. Raises ConfigError."""
    arrays = _arrays(path)
    if len(arrays) == 1 and (name is None or "" in arrays):
        return next(iter(arrays.values()))
    for wanted in (name,) if name else LOAD_NAMES:
        if wanted in arrays:
            return arrays[wanted]
    raise ConfigError(
        f"{path.name} holds {', '.join(arrays) or 'nothing'}",
        remedy="name the array of counts with --array",
    )


def read_co_routing(path: Path, *, experts: int) -> Any:
    """Co-routing counts [L - 1, E, E], given as such or as a recorded routing trace.

    Of a trace, `experts` [tokens, L, K], each use of an expert counts with each use in the layer
    after it. Raises ConfigError.
    """
    import numpy as np

    arrays = _arrays(path)
    trace = arrays.get("experts")
    if trace is None:
        if len(arrays) > 1 and "co_routing" not in arrays:
            raise ConfigError(
                f"{path.name} holds {', '.join(arrays)}",
                remedy="name the counts co_routing, or give a routing trace with experts",
            )
        return arrays.get("co_routing", next(iter(arrays.values()), None))
    if trace.ndim != 3 or trace.dtype.kind not in "iu" or not 0 <= trace.max(initial=0) < experts:
        raise ConfigError(
            f"{path.name}: experts of shape {trace.shape} do not fit the load's {experts}",
            remedy="give a trace of the same model: [tokens, layers, experts of a token]",
        )
    before, after = trace[:, :-1, :, None].astype(np.int64), trace[:, 1:, None, :].astype(np.int64)
    pairs = (before * experts + after).swapaxes(0, 1).reshape(trace.shape[1] - 1, -1)
    counts = [np.bincount(layer, minlength=experts * experts) for layer in pairs]
    return np.reshape(counts, (-1, experts, experts))


def read_current(path: Path) -> Any:
    """Slots [L, P] of a plan that was written with --out or --json. Raises ConfigError."""
    import numpy as np

    try:
        return np.array(json.loads(path.read_text(encoding="utf-8"))["physical_to_logical_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"cannot read a plan from {path.name}: {error!r}",
            remedy="give a file that `hotset plan --out` wrote",
        ) from error


def as_json(placement: Placement) -> str:
    """Return the plan and its figures as one JSON object."""
    crossing = placement.crossing
    return json.dumps({
        "num_devices": placement.num_devices,
        "num_nodes": placement.num_nodes,
        "balancedness": placement.balancedness,
        "worst_balancedness": placement.worst_balancedness,
        "current_balancedness": placement.current_balancedness,
        "moves": placement.moves,
        "moved_ratio": placement.moved_ratio,
        "cross_node_moves": placement.cross_node_moves,
        "reasons": [str(reason) for reason in placement.reasons],
        "physical_to_logical_map": placement.physical_to_logical_map.tolist(),
        "logical_replica_count": placement.logical_replica_count.tolist(),
        "shares": placement.shares.round(9).tolist(),
        "move_table": placement.move_table.tolist(),
        "crossing": None if crossing is None else asdict(crossing),
    })  # fmt: skip


def render(placement: Placement) -> str:
    """Return what the plan does, in a few lines."""
    layers, slots = placement.physical_to_logical_map.shape
    experts = placement.logical_replica_count.shape[1]
    shape = (
        f"{layers} layers x {experts} experts in {slots} slots of {placement.num_devices} devices,"
        f" {placement.num_nodes} nodes"
    )
    lines = [shape]
    if placement.current_balancedness is None:
        lines.append(f"balancedness  {placement.balancedness:.4f}")
    else:
        lines.append(
            f"balancedness  {placement.current_balancedness:.4f} -> {placement.balancedness:.4f}"
        )
        lines.append(
            f"moves         {placement.moves} copies, {placement.moved_ratio:.2%} of the slots;"
            f" {placement.cross_node_moves} between nodes"
        )
    reasons = sorted({str(one): 0 for one in placement.reasons})
    counted = (f"{sum(one == reason for one in placement.reasons)} {reason}" for reason in reasons)
    lines.append(f"layers        {', '.join(counted)}")
    if (crossing := placement.crossing) is not None:
        lines.append(
            f"crossing      {crossing.ratio:.2%} of the tokens change node between layers,"
            f" {crossing.tokens:,.0f}; {crossing.saved_tokens:,.0f} saved"
        )
    return "\n".join(lines)


def draw(placement: Placement, current: Any, path: Path) -> None:
    """Draw the time of each device before and after, all layers; .svg or .png. Needs matplotlib."""
    import matplotlib as mpl
    import numpy as np

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "hotset"  # the same plan gives the same file
    import matplotlib.pyplot as plt

    from hotset.policies import place_score as score

    def times(slots: Any, shares: Any) -> Any:
        return score.device_times(slots, shares, placement.load, speed=placement.speed)

    panels = [("planned", times(placement.physical_to_logical_map, placement.shares))]
    before = current
    if before is None:  # what no planner at all would do
        layers, slots = placement.physical_to_logical_map.shape
        before = np.tile(np.arange(slots) % placement.logical_replica_count.shape[1], (layers, 1))
    count = score.replica_counts(before, experts=placement.logical_replica_count.shape[1])
    if (count > 0).all():
        title = "current" if current is not None else "experts in order"
        panels.insert(0, (title, times(before, score.even_shares(before, count))))
    top = max(float(found.max()) for _, found in panels)
    figure, rows = plt.subplots(
        2, len(panels), figsize=(5.5 * len(panels), 6), squeeze=False, layout="constrained",
        height_ratios=(2, 1), sharey="row",
    )  # fmt: skip
    image: Any = None
    for column, (title, found) in enumerate(panels):
        image = rows[0][column].imshow(
            found, aspect="auto", cmap="cividis", vmin=0, vmax=top, interpolation="nearest"
        )
        rows[0][column].set_title(f"{title}: balancedness {(1 / found.max(axis=1)).mean():.3f}")
        rows[1][column].axhline(1.0, color="#888888", linewidth=1)
        rows[1][column].bar(np.arange(found.shape[1]), found.mean(axis=0), color="#0072b2")
        rows[1][column].plot(found.max(axis=0), ".", color="#d55e00", markersize=4)
        rows[1][column].set_xlabel("device (bar: mean over layers; dot: its slowest layer)")
    rows[0][0].set_ylabel("layer")
    rows[1][0].set_ylabel("time (1 is perfect)")
    figure.colorbar(image, ax=list(rows[0]), label="time of a device (1 is perfect)")
    figure.savefig(path, dpi=130)
    plt.close(figure)


@click.command("plan")
@click.option(
    "--load",
    "load_path",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    required=True,
    help="tokens of each expert: [layers, experts] or with windows first",
)
@click.option("--array", help="name of the array in the .npz file")
@click.option("--devices", type=int, required=True, help="devices of the cluster")
@click.option("--slots", type=int, required=True, help="expert slots of all devices together")
@click.option("--nodes", type=int, default=1, show_default=True, help="nodes of the cluster")
@click.option(
    "--groups",
    type=int,
    default=1,
    show_default=True,
    help="groups of experts that prefer one node",
)
@click.option(
    "--current",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="plan in force; without it the plan is made from nothing",
)
@click.option("--target", type=float, help="balancedness at which moves end")
@click.option("--move-ratio", type=float, help="most of the slots that may move")
@click.option(
    "--split",
    type=click.Choice(["even", "free"]),
    default="even",
    show_default=True,
    help="shares of replicas: all alike, or the best for this load",
)
@click.option(
    "--risk",
    type=float,
    default=0.0,
    show_default=True,
    help="0 plans for the mean of the windows, 1 for the worst",
)
@click.option(
    "--co-routing",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="tokens from expert to expert of the next layer, or a routing trace: those that follow"
    " each other come to one node",
)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="write the plan here")
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="draw load per device before and after (.svg or .png)",
)
@click.option("--json", "json_out", is_flag=True, help="print the plan as one JSON object")
def plan_command(  # noqa: PLR0913 - the options, by name
    *, load_path: Path, array: str | None, devices: int, slots: int, nodes: int, groups: int,
    current: Path | None, target: float | None, move_ratio: float | None, split: Any, risk: float,
    co_routing: Path | None, out: Path | None, plot: Path | None, json_out: bool,
) -> None:  # fmt: skip
    """Plan which device holds which expert, from a recorded load."""
    from hotset.cluster.bench_transport_plot import require_matplotlib
    from hotset.policies.place import plan

    if plot is not None:
        require_matplotlib(plot)
    load = read_load(load_path, name=array)
    before = None if current is None else read_current(current)
    counts = None
    if co_routing is not None:
        counts = read_co_routing(co_routing, experts=load.shape[-1] if load.ndim else 0)
    try:
        found = plan(
            load,
            num_devices=devices,
            num_slots=slots,
            num_nodes=nodes,
            groups=groups,
            current=before,
            target=target,
            byte_budget=None if move_ratio is None else move_ratio * slots * load.shape[-2],
            split=split,
            risk=risk,
            co_routing=counts,
        )
    except (ValueError, IndexError) as error:
        raise ConfigError(str(error), remedy="see hotset plan --help") from error
    try:
        if out is not None:
            out.write_text(as_json(found), encoding="utf-8")
        if plot is not None:
            draw(found, before, plot)
    except OSError as error:
        raise ConfigError(str(error), remedy="give a file in a folder that is there") from error
    click.echo(as_json(found) if json_out else render(found))


@click.command("planner")
@click.option("--quick", is_flag=True, help="two cases")
@click.option(
    "--repeat",
    type=click.IntRange(min=1),
    default=7,
    show_default=True,
    help="rounds of each plan; the median is printed",
)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    envvar="HOTSET_DATA",
    help="folder with recorded loads and routing; without it those cases are left out",
)
@json_option("a JSON list of rows")
def bench_planner_command(**options: Any) -> None:  # fmt: skip
    """Balance, moves and time of plans, next to a greedy planner and to bounds."""
    from hotset.cluster.bench_planner import run_bench

    run_bench(**options)
