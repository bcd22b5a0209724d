"""The talk's rule over λ: is any λ calibrated?

    python benchmarks/residual.py

On the Gaussian problem, σ_t = 0.5, x_{t-1} = ... + λ (y - x_t) in 1000 steps. Beside it the
variance that λ stands for: λ (y - x_t) is the step of a likelihood N(y; x_t, s² I) with
s² = β_t / (√a_t λ), while y given x_t has the variance σ_y² + r_t² / (1 + r_t²) around
E[x_0 | x_t], for data of unit variance. Writes benchmarks/results/residual.md, and the charts to
outputs/residual.html.
"""

from pathlib import Path

import torch

from diffusion_lab.guidance import Residual
from diffusion_lab.leaderboard import PROBLEMS, Method, grade
from diffusion_lab.report.page import LineChart, write_report
from diffusion_lab.sampler import Ancestral
from diffusion_lab.schedule import Linear

RESULTS = Path(__file__).parent / "results"
STRENGTHS = [10 ** (k / 2 - 4) for k in range(9)]  # 1e-4 to 1


def main() -> None:
    problem, schedule = PROBLEMS["gaussian_denoise"](), Linear()
    rows = []
    for strength in STRENGTHS:
        method = Method(
            "residual", lambda _, x=strength: Residual(x), Ancestral(1000, "large"), schedule
        )
        rows.append(grade(problem, method, n_y=4, n=256, n_coverage=256, n_ranks=19, seed=0))
    lines = [
        "| λ | variance / exact | bias (posterior std) | 90% coverage | sw2 / floor |",
        "|---|---|---|---|---|",
        *(
            f"| {x:.2g} | {r['variance_ratio']:.3g} | {r['bias']:.2f} | {r['coverage']:.2f} | "
            f"{r['sw2'] / r['sw2_floor']:.1f} |"
            for x, r in zip(STRENGTHS, rows, strict=True)
        ),
        "",
        "Exact is 1, 0, 0.90 and 1. The best λ here is still biased, and it is the best for this "
        "prior and this noise only; a factor of 3 to either side halves or doubles the spread.",
    ]
    (RESULTS / "residual.md").write_text("\n".join(lines) + "\n")
    t = torch.linspace(0.01, 1, 100, dtype=torch.float64)
    alpha_t, alpha_s = schedule(t)[0], schedule(t - 1 / 1000)[0]
    a = (alpha_t / alpha_s) ** 2
    r = schedule.ratio(t)
    implied = {
        f"s² of λ = {x}": (t.tolist(), ((1 - a) / (a.sqrt() * x)).tolist())
        for x in (0.001, 0.01, 0.1)
    }
    exact = problem.sigma_y**2 + r**2 / (1 + r**2)
    values = {
        "variance / exact": [row["variance_ratio"] for row in rows],
        "bias": [row["bias"] for row in rows],
        "coverage / 0.9": [row["coverage"] / 0.9 for row in rows],
    }
    write_report(
        RESULTS.parents[1] / "outputs" / "residual.html",
        "The rule λ (y - x_t)",
        "On a Gaussian prior of 16 numbers, σ_t = 0.5; see benchmarks/residual.py.",
        [
            LineChart(
                "Calibration over λ",
                "1 is right for variance and coverage, 0 for the bias.",
                "λ", "", {k: (STRENGTHS, v) for k, v in values.items()}, log_x=True, log_y=True,
            ),
            LineChart(
                "The variance that λ stands for",
                "And that of y given x_t in the reverse SDE, for data of unit variance.",
                "t", "variance",
                {**implied, "σ_y² + r²/(1 + r²)": (t.tolist(), exact.tolist())}, log_y=True,
            ),
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
