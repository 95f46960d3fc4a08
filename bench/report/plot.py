"""The plot of the contests with other libraries, from docs/bench/peers.json."""

from pathlib import Path

PLOT_NAME = "bench-peers.png"  # beside the page that shows it


def draw(result: dict, path: Path, dim: int, dtype: str) -> None:
    """A PNG of time and memory against rows, pred to target, at one D and dtype, on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib import ticker

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    cells = [c for c in result["times"] if c["contest"] == "pred_to_target" and c["dim"] == dim and c["dtype"] == dtype]
    cells.sort(key=lambda c: c["rows"])
    names = dict.fromkeys(["fused", *(name for cell in cells for name in cell["contenders"])])
    for name in names:
        style = {"linewidth": 2.5, "zorder": 3} if name == "fused" else {"linewidth": 1.2}
        there = [(c["rows"], c["contenders"][name]["seconds"] * 1e3) for c in cells if name in c["contenders"]]
        axes[0].plot(*zip(*there, strict=True), marker="o", markersize=3, label=name, **style)
        held = sorted(
            (e["rows"], e["bytes"] / 2**20)
            for e in result["memory"]
            if e["contest"] == "pred_to_target" and e["contender"] == name
        )
        axes[1].plot([n for n, _ in held], [m for _, m in held], marker="o", markersize=3, **style)
    axes[0].set_ylabel("forward + backward, ms")
    axes[1].set_ylabel("extra peak memory, MiB")
    for axis in axes:
        axis.set(xscale="log", yscale="log", xlabel="rows")
        axis.xaxis.set_minor_locator(ticker.NullLocator())
        axis.xaxis.set_major_locator(ticker.FixedLocator([2**k for k in range(5, 16)]))
        axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda rows, _: f"{rows:,.0f}"))
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7, loc="lower right")
    figure.suptitle(f"InfoNCE, pred to target, D = {dim}, {dtype}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
