r"""Denoising as posterior sampling, and how good it is.

For each test image x_0, y = x_0 + σ_y n; M samples of p(x_0 | y), their mean and spread, and the
estimate E[x_0 | y] by one call. For an exact posterior one sample has 3.01 dB less PSNR than
E[x_0 | y], and the mean of M samples 10 log10(1 + 1/M) dB less.
"""

__all__ = ["Denoise"]

import logging
from typing import Any

import torch
from torch import Tensor

from diffusion_lab.data.module import ImageDataModule, to_model
from diffusion_lab.errors import ConfigError
from diffusion_lab.guidance import MMSE, Guidance, Observation
from diffusion_lab.metric import WINDOW, psnr, ssim
from diffusion_lab.noise import KeyedGenerator, make_key
from diffusion_lab.noise_level import NoiseLevel
from diffusion_lab.sampler import Sampler, State
from diffusion_lab.sampler.base import transition
from diffusion_lab.task.base import Row, Task, average, write_results
from diffusion_lab.task.facts import run_sections
from diffusion_lab.tracking.grid import labelled_grid, save_png, std_map
from diffusion_lab.tracking.report import Picture, Table, write_report

log = logging.getLogger(__name__)

SHOWN = 8  # images of the grid
SHOWN_SAMPLES = 4  # samples of each of them
MOMENTS = 9  # times of the diffusion and denoising rows
METRICS = {"psnr": psnr, "ssim": ssim}
ESTIMATES = {
    "noisy": "the noisy image y, unclipped",
    "sample": "one posterior sample (averaged over the samples of an image)",
    "mean": "the mean of the posterior samples",
    "mmse": "E[x_0 | y] by one call of the network",
}


class Denoise(Task):
    """Denoises test images and compares the result with the truth.

    Arguments:
        data: The data module whose test split is denoised.
        guidance: The posterior method.
        sampler: Solves the reverse process.
        level: The noise level.
        num_images: How many test images.
        num_samples: M, posterior samples of each; one suffices a method that has no chance in it.
        settings: The evaluation's configuration, for the report.
        task: See `Task`.

    Raises:
        ConfigError: If there are not so many test images, or they are too small.
    """

    def __init__(
        self,
        *,
        data: ImageDataModule,
        guidance: Guidance,
        sampler: Sampler,
        level: NoiseLevel,
        num_images: int,
        num_samples: int,
        settings: str,
        **task: Any,
    ) -> None:
        super().__init__(**task)
        self.images = data.test_images(num_images)
        if data.size < WINDOW:
            raise ConfigError(
                f"data.size={data.size} of the run is smaller than the window of SSIM; denoising "
                f"is graded on images of at least {WINDOW} pixels"
            )
        self.guidance, self.sampler, self.level = guidance, sampler, level
        self.num_images, self.num_samples, self.settings = num_images, num_samples, settings
        if not guidance.stochastic and num_samples > 1:
            log.info("guidance %s gives one image: num_samples=1", type(guidance).__name__)
            self.num_samples = 1

    @property
    def count(self) -> int:
        return self.num_images

    @property
    def group(self) -> int:
        return max(1, self.batch_size // self.num_samples)

    def _sample(self, y: Tensor, index: Tensor, states: list[State] | None) -> Tensor:
        """M samples for each y, of shape (G, M, C, H, W), no more than `batch_size` at once."""
        repeated = y.repeat_interleave(self.num_samples, 0)
        image = index.repeat_interleave(self.num_samples)
        number = torch.arange(self.num_samples, device=index.device).repeat(len(index))
        keys = make_key(self.seed, "posterior", image, number)
        samples = [
            self.guidance(
                self.denoiser,
                self.sampler,
                Observation(y_part, self.level.sigma_y),
                generator=KeyedGenerator(key),
                callback=None if states is None or k else states.append,
            )
            for k, (y_part, key) in enumerate(
                zip(repeated.split(self.batch_size), keys.split(self.batch_size), strict=True)
            )
        ]
        return torch.cat(samples).unflatten(0, (len(y), self.num_samples))

    def compute(self, index: Tensor) -> list[dict[str, Any]]:
        x_0 = to_model(torch.from_numpy(self.images[index.cpu().numpy()]).to(self.device))
        noise = KeyedGenerator(make_key(self.seed, "observation", index)).normal(*x_0.shape[1:])
        y = x_0 + self.level.sigma_y * noise
        states: list[State] | None = [] if int(index[0]) == 0 else None
        samples = self._sample(y, index, states)
        observation = Observation(y, self.level.sigma_y)
        mmse = MMSE()(self.denoiser, self.sampler, observation)
        mean = samples.mean(1)
        scores = {}
        for metric, function in METRICS.items():
            scores["noisy", metric] = function(y, x_0)
            each = [function(sample, x_0) for sample in samples.unbind(1)]
            scores["sample", metric] = torch.stack(each).mean(0)
            scores["mean", metric] = function(mean, x_0)
            scores["mmse", metric] = function(mmse, x_0)
        results = []
        for k, number in enumerate(index.tolist()):
            result: dict[str, Any] = {"scores": {key: float(v[k]) for key, v in scores.items()}}
            if number < SHOWN:
                result["shown"] = {
                    "images": torch.stack(
                        [x_0[k], y[k], mmse[k], mean[k], *samples[k, :SHOWN_SAMPLES]]
                    ).cpu(),
                    "std": samples[k].std(0, correction=int(self.num_samples > 1)).cpu(),
                }
            if number == 0 and states:
                result["path"] = self._path(states)
            results.append(result)
        return results

    @staticmethod
    def _path(states: list[State]) -> list[State]:
        """A few moments of the first sample's way, evenly spread over the steps."""
        places = torch.linspace(0, len(states) - 1, min(MOMENTS, len(states))).round().long()
        return [
            State(s.t, s.x_t[:1].cpu(), s.denoised[:1].cpu())
            for s in (states[int(place)] for place in places)
        ]

    def finish(self, results: list[dict[str, Any]]) -> None:
        rows = self._table(results)
        write_results(self.directory, rows)
        pictures = self._pictures(results)
        name = type(self.guidance).__name__
        table = [[e, ESTIMATES[e], m, f"{mean:.3f} ± {err:.3f}", n] for e, m, mean, err, n in rows]
        report = write_report(
            self.directory / "report.html",
            f"Denoising by posterior sampling, {name}",
            f"{len(results)} test images with noise {self.level} (sigma_y is the noise added to "
            f"images in [-1, 1]); {self.num_samples} posterior sample(s) of each by {name} with "
            f"{type(self.sampler).__name__} in {self.sampler.steps} steps.\n\n"
            "For an exact posterior sampler one sample is 3.01 dB below E[x_0 | y] and the mean "
            "of M samples 10 log10(1 + 1/M) dB; a network's own error lowers the first figure.",
            [
                Table(
                    "Results",
                    "Mean over the images and its standard error. PSNR in dB; nothing is clipped.",
                    ["estimate", "what it is", "metric", "mean ± standard error", "n"],
                    table,
                ),
                *pictures,
                *run_sections(
                    self.run,
                    {
                        "Noise level": str(self.level),
                        "Method": name,
                        "Sampler": f"{type(self.sampler).__name__}, {self.sampler.steps} steps",
                        "Seed": str(self.seed),
                    },
                    self.settings,
                ),
            ],
        )
        print(f"\nnoise: {self.level}\n")
        print(f"{'estimate':10}{'metric':8}{'mean':>9}{'stderr':>9}{'n':>6}")
        for estimate, metric, mean, error, n in rows:
            print(f"{estimate:10}{metric:8}{mean:9.3f}{error:9.3f}{n:6d}")
        print(f"\nreport: {report}")

    @staticmethod
    def _table(results: list[dict[str, Any]]) -> list[Row]:
        return [
            average(estimate, metric, [result["scores"][estimate, metric] for result in results])
            for metric in METRICS
            for estimate in ESTIMATES
        ]

    def _pictures(self, results: list[dict[str, Any]]) -> list[Picture]:
        folder = self.directory / "samples"
        folder.mkdir(exist_ok=True)
        shown = [result["shown"] for result in results if "shown" in result]
        maps, largest = std_map(torch.stack([each["std"] for each in shown]))
        rows = [torch.cat([each["images"], m[None]]) for each, m in zip(shown, maps, strict=True)]
        count = min(SHOWN_SAMPLES, self.num_samples)
        columns = ["clean", "noisy", "E[x_0 | y]", f"mean of {self.num_samples}"]
        columns += [f"sample {m + 1}" for m in range(count)] + ["std"]
        grid = save_png(labelled_grid(rows, columns), folder / "grid.png")
        pictures = [
            Picture(
                "Images",
                f"The noisy image is y, clipped for display; {self.level}. The last column is the "
                f"standard deviation of the samples, mean over the channels: dark blue is 0, pale "
                f"yellow {largest:.3f}.",
                grid,
            ),
            self._diffusion(shown[0]["images"][0], folder),
        ]
        path = next((result["path"] for result in results if "path" in result), None)
        if path:
            states = torch.cat([state.x_t for state in path])
            estimates = torch.cat([state.denoised for state in path])
            picture = labelled_grid(
                [states, estimates], [self._moment(s.t) for s in path], ["x_t", "E[x_0 | x_t]"]
            )
            caption = "The way of one posterior sample, from the left to the right."
            pictures.append(
                Picture("Denoising", caption, save_png(picture, folder / "denoising.png"))
            )
        return pictures

    def _moment(self, t: float) -> str:
        _, sigma_t = self.denoiser.schedule(torch.tensor(t, device=self.device))
        return f"t = {t:.2f} σ = {float(sigma_t):.2f}"

    def _diffusion(self, x_0: Tensor, folder: Any) -> Picture:
        """The forward process on the first image: with one noise for all times, and as a path."""
        schedule = self.denoiser.schedule
        shape, zero = x_0.shape, torch.zeros(1, dtype=torch.int64)
        noise = KeyedGenerator(make_key(self.seed, "diffusion", zero)).normal(*shape)[0]
        generator = KeyedGenerator(make_key(self.seed, "diffusion path", zero))
        times = torch.linspace(0, 1, MOMENTS).tolist()
        direct, path = [], [x_0]
        for s, t in zip([0.0, *times[:-1]], times, strict=True):
            alpha_s, _, alpha_t, sigma_t, v = (float(c) for c in transition(schedule, t, s))
            direct.append(alpha_t * x_0 + sigma_t * noise)
            step = v**0.5 * generator.normal(*shape)[0]
            path.append(alpha_t / alpha_s * path[-1] + step)
        rows = [torch.stack(states) for states in (direct, path[1:])]
        picture = labelled_grid(rows, [self._moment(t) for t in times], ["one noise", "a path"])
        return Picture(
            "Diffusion",
            "x_t over t, on the schedule of the evaluation "
            f"({type(schedule).__name__}). Above, x_t = α_t x_0 + σ_t ε with one ε for all times; "
            "below, a path of the process, each x_t drawn from q(x_t | x_s) of the one before.",
            save_png(picture, folder / "diffusion.png"),
        )
