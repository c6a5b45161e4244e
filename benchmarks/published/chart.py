"""The chart of docs/scaling.md: published speeds as multiples of the expected ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

from benchmarks.published.runs import Run
from pipeline.model.flops import num_parameters

COLORS = {"A100 40GB": "#8fb3d9", "A100": "#2563a8", "H100": "#d97706", "H200": "#7a3e9d"}
MARKERS = {
    "llm-foundry": "o", "fms-fsdp": "D", "llm.c": "s", "torchtitan-a100": "^", "torchtitan-h100": "^", "olmo-core": "v",
    "tinyllama": "P", "kempnerforge": "X", "own": "*",
}  # fmt: skip
LABELS = {
    (1.02e10, 0.7): "H100 of 500 W", (1.55e10, 0.81): "recomputes half\nof the products",
    (1.7e8, 0.725): "not compiled", (1.7e8, 0.78): "compiled", (1.02e10, 1.14): "software of 2026",
}  # fmt: skip


def draw(runs: Sequence[Run], names: dict[str, str], file: Path) -> None:
    """Writes the chart as SVG: the size of the model against the speed, calibration and held-back runs side by side."""
    mpl.use("svg")
    from matplotlib import pyplot as plt

    plt.rcParams.update(
        {"svg.hashsalt": "published", "svg.fonttype": "none", "font.size": 10, "font.family": "sans-serif"}
    )
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.6), sharey=True, width_ratios=(3, 5))
    for axes, title, calibrates in ((left, "calibrated on", True), (right, "held back", False)):
        shown = [run for run in runs if run.calibrates == calibrates and run.speed is not None]
        axes.set_title(
            f"{title}: {sum(run.near for run in shown)} of {len(shown)} runs within 10%", loc="left", fontsize=10
        )
        axes.axhspan(0.9, 1.1, color="#dfe7dd", linewidth=0)
        axes.axhline(1, color="#7a8a76", linewidth=1)
        for run in shown:
            axes.scatter(
                num_parameters(run.config.model), run.speed, s=70 if MARKERS[run.source] == "*" else 34, alpha=0.8,
                marker=MARKERS[run.source], color=COLORS[run.device.name], edgecolors="white", linewidths=0.5,
            )  # fmt: skip
        for at, text in {} if calibrates else LABELS.items():
            axes.annotate(text, at, fontsize=8, color="#555555")
        axes.set(xscale="log", yscale="log", xlabel="parameters", xlim=(9e7, 1.2e11), ylim=(0.62, 1.35))
        axes.set_yticks([0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.3], ["0.7", "0.8", "0.9", "1", "1.1", "1.2", "1.3"])
        axes.minorticks_off()
        axes.set_xticks([1e8, 1e9, 1e10, 1e11], ["100M", "1B", "10B", "100B"])
        axes.grid(color="#eeeeee", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_ylabel("published speed / expected speed")
    points = [
        plt.Line2D([], [], marker="o", color=color, linestyle="", label=device) for device, color in COLORS.items()
    ]
    points += [
        plt.Line2D([], [], marker=marker, color="#666666", linestyle="", label=names[source])
        for source, marker in MARKERS.items()
        if source != "torchtitan-h100"
    ]
    figure.legend(handles=points, loc="lower center", ncols=6, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
