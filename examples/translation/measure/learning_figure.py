"""Loss and BLEU over steps, a line an engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measure.panels import FONT, STYLES, plt, save


def draw_learning(runs: Sequence[dict[str, Any]], out: Path) -> list[Path]:
    """Write learning.png and learning.svg. The second engine's line is dashed: equal curves lie on each other."""
    names = list(runs[0]["bleu"])
    out.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(FONT):
        size = 4.6 * (1 + len(names)), 4.2
        figure, panels = plt.subplots(1, 1 + len(names), figsize=size, sharex=True, layout="constrained")
        for place, run in enumerate(runs):
            style = STYLES[run["engine"]]
            look: dict[str, Any] = {
                "color": style.colour,
                "linestyle": ("-", (0, (4, 2)), ":")[place % 3],
                "linewidth": 3 - 0.8 * (place % 3),
                "label": style.label,
            }
            panels[0].plot(*zip(*run["loss"]), **look)
            for axes, name in zip(panels[1:], names):
                axes.plot(*zip(*run["bleu"][name]), marker=style.marker, markersize=6, **look)
        panels[0].set_title("training loss")
        panels[0].set_ylabel("loss, nats a token")
        for axes, name in zip(panels[1:], names):
            axes.set_title(f"{name}, {runs[0]['test_pairs'][name]} sentences")
            axes.set_ylabel("BLEU, greedy")
            axes.set_ylim(bottom=0)
        for axes in panels:
            axes.set_xlabel("step")
            axes.grid(True, color="#dddddd", linewidth=0.8)
            axes.set_axisbelow(True)
        first = runs[0]
        device = first.get("machine", {}).get("device", "")
        figure.suptitle(
            f"Learning to translate English to Romanian from random weights\n{first['num_parameters'] / 1e6:.0f} M "
            f"parameters, {first['num_train_pairs']:,} pairs, batch {first['batch_size']}, {first['precision']}"
            f"{f', {device}' if device else ''}",
            fontsize=12,
        )
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
        paths = save(figure, out / "learning")
    plt.close(figure)
    return paths
