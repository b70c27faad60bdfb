"""What goes wrong, made on purpose in two dimensions: curves of both gaps and what the student draws in the end.

python benchmarks/pathologies.py --output docs/images/pathologies.png
"""

from dataclasses import replace

import torch
import two_dimensions
from scripts import picture_options, set_threads
from toy_task import ARMS, Regime, Run, teacher
from two_dimensions import Draws, Weights

from diffusers_disback.evaluation.plots import pyplot


HEALTHY = Regime(
    generator_learning_rate=3e-4,
    fake_score_learning_rate=6e-4,
    degradation_steps=60,
    steps_per_target=60,
    updates=900,
)
CASES = {
    "healthy": HEALTHY,
    "fake score too slow\n(its rate / 60)": replace(HEALTHY, fake_score_learning_rate=1e-5),
    "fake score too fast\n(its rate x 30)": replace(HEALTHY, fake_score_learning_rate=2e-2),
    "generator too fast\n(its rate x 15)": replace(HEALTHY, generator_learning_rate=4.5e-3),
    "over-degraded\n(stage 1 x 25)": replace(HEALTHY, degradation_steps=1500),
}


class Watched(Run):
    """Keeps both gaps and three denoising losses of its only seed, and the student's last points."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.rows: list[dict[str, float]] = []

    def look(self, done: int, generator: Weights, fake_score: Weights, target: Weights) -> None:
        x0 = self.probe.points(generator)
        networks = {"fake_score": fake_score, "target": target, "teacher": self.start}
        x0_hat = {name: self.probe.denoised(weights, x0) for name, weights in networks.items()}
        row = {f"{name}_denoising_loss": self.probe.loss(weights, x0).item() for name, weights in networks.items()}
        row["student_to_target"] = two_dimensions.gap(x0_hat["fake_score"], x0_hat["target"], self.probe.sigma).item()
        row["target_to_teacher"] = two_dimensions.gap(x0_hat["target"], x0_hat["teacher"], self.probe.sigma).item()
        self.rows.append({"step": done, **row})
        with torch.no_grad():
            self.points = two_dimensions.generate(generator, Draws([78], 4).normal(2000, 2), self.regime.asked)[0]


def main() -> None:
    options, plt = picture_options(__doc__), pyplot()
    set_threads()
    figure, axes = plt.subplots(3, len(CASES), figsize=(3.2 * len(CASES), 8))
    for column, (title, regime) in zip(axes.T, CASES.items(), strict=True):
        run = Watched(regime, ARMS["path"], [options.seed], teacher(regime.teacher_steps))
        (result,) = run.run()
        steps = [row["step"] for row in run.rows]
        for panel, names in ((0, ("student_to_target", "target_to_teacher")), (1, tuple(run.rows[0])[1:4])):
            for name in names:
                column[panel].plot(steps, [row[name] for row in run.rows], lw=1.2, label=name)
            for switch in result["switches"]:
                column[panel].axvline(switch, color="0.7", lw=0.8)
        column[0].set(title=title, yscale="log", ylim=(1e-4, 3))
        column[1].set(ylim=(0, 1.2), xlabel="generator updates")
        column[2].scatter(*run.points.T, s=1, alpha=0.3)
        column[2].set(xlim=(-6, 6), ylim=(-6, 6), aspect="equal")
        last = {name: f"{value:.3g}" for name, value in run.rows[-1].items()}
        distance, modes = (result["curve"][name][-1] for name in ("distance", "modes"))
        print(title.replace("\n", " "), f"distance {distance:.3g}, modes {modes:.2f}", last, flush=True)
        column[2].set_title(f"distance {distance:.2f}, modes {modes:.0%}", fontsize=9)
    axes[0, 0].legend(fontsize=7)
    axes[1, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(options.output, dpi=80)


if __name__ == "__main__":
    main()
