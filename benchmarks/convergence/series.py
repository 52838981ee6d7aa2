"""Which runs there are, and which of them comes next: from the rows of the runs that are done.

    grid      every method's learning rate, and LoRA's alpha, until the best lies inside; then a second seed around it
    seeds     every method at its best, further seeds: what is reported
    ranks     the learning rate at other ranks, Bone and LoRA
    variants  what may reduce forgetting, Bone and LoRA at their best

Rate and alpha are chosen by the development loss over the two seeds of SELECTION.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from benchmarks.convergence.grid import mean, missing_alphas, missing_rates
from benchmarks.convergence.training import Job

SERIES = ("grid", "seeds", "ranks", "variants")
METHODS = ("bone", "lora", "rslora", "full", "pissa", "bat")
# alpha = 2 r: LoRA scales by 2, rsLoRA by 2 sqrt(r); PiSSA's paper scales by 1. LoRA's other alphas are searched.
ALPHA = {"lora": 2.0, "rslora": 2.0, "pissa": 1.0}
SELECTION = (0, 1)
SELECTIONS = (SELECTION, SELECTION[:1])
SCALES = (0.25, 0.5, 0.75)
SCALED_SEEDS = (2, 3, 4)
VARIANT_SEEDS = (2, 3, 4)
RANKS = ("r 8", "r 64")
VARIANTS = {
    "bone": (
        *("mix 0.25", "decay 1", "ema 0.95", "r 8", "mix 0.5", "r 64", "mix 0.125"),
        *("decay 10", "r 16", "ema 0.8", "decay 0.1"),
    ),
    "lora": ("mix 0.25", "decay 1", "ema 0.95", "r 8", "r 64"),
}
Key = tuple[float, "float | None"]  # (rate, alpha)


@dataclass
class Bench:
    """What one task is tried with, and its runs so far."""

    task_job: Job  # of the base: the task, r, precision and device of all
    width: int = 128
    methods: Sequence[str] = METHODS
    alphas: bool = True  # whether LoRA's alpha is searched
    fine: bool = True  # whether rates nearer than a factor of 3 are tried
    seeds: int = 8
    rows: list[dict] = field(default_factory=list)
    failed: list[Job] = field(default_factory=list)

    def missing(self, series: str) -> Job | None:
        """The next run of a series; None if it is complete."""
        if not (base := self.find(self.task_job)):
            return None if self.task_job in self.failed else self.task_job
        measured = base["points"][-1]
        for job in getattr(self, f"_{series}")():
            if not self.find(job) and not any(job.row() == other.row() for other in self.failed):
                return replace(job, base=measured)
        return None

    def find(self, job: Job) -> dict | None:
        """The row of a run that is done."""
        wanted = job.row()
        return next((row for row in self.rows if wanted.items() <= row.items()), None)

    def arms(self) -> list[tuple[str, bool]]:
        """(method, whether its alpha is searched) of everything that is compared."""
        searched = [("lora", True)] if self.alphas and "lora" in self.methods else []
        return [(method, False) for method in self.methods] + searched

    def best(self, method: str, searched: bool = False, selection: Sequence[Sequence[int]] = SELECTIONS) -> Key | None:
        """The rate and alpha of least development loss: over both seeds of SELECTION, or else the first alone."""
        for seeds in selection:
            losses = {key: loss for key, loss in self._means(method, searched, seeds).items() if loss is not None}
            if losses:
                return min(losses, key=lambda key: (losses[key], key))
        return None

    def _job(self, method: str, key: Key, seed: int, **more: object) -> Job:
        return replace(self.task_job, method=method, rate=key[0], alpha=key[1], seed=seed, **more)  # type: ignore[arg-type]

    def _means(self, method: str, searched: bool, seeds: Sequence[int], variant: str = "") -> dict[Key, float | None]:
        """The mean development loss at the end, of each rate and alpha that has all these seeds."""
        found: dict[Key, dict[int, float | None]] = {}
        for row in self._mine(method, variant):
            if searched or row["alpha"] == ALPHA.get(method):
                found.setdefault((row["rate"], row["alpha"]), {})[row["seed"]] = row["points"][-1]["development"]
        return {key: mean([of[seed] for seed in seeds]) for key, of in found.items() if set(seeds) <= set(of)}

    def _mine(self, method: str, variant: str) -> Iterator[dict]:
        like = replace(self.task_job, method=method, variant=variant).row()
        same = {name: value for name, value in like.items() if name not in ("rate", "alpha", "seed")}
        for row in self.rows:
            if same.items() <= row.items():
                yield row
        for job in self.failed:
            if same.items() <= (row := job.row()).items():
                yield row | {"points": [{"development": None}]}

    def _start(self, method: str) -> float:
        return (0.1 if method == "full" else 0.15) / self.width

    def _rates(self, method: str, alpha: float | None, start: float, fine: bool, variant: str = "") -> Iterator[Job]:
        means = self._means(method, True, SELECTION[:1], variant)
        losses = {rate: loss for (rate, of), loss in means.items() if of == alpha}
        for rate in missing_rates(losses, start, fine=fine):
            yield self._job(method, (rate, alpha), SELECTION[0], variant=variant)

    def _alpha_losses(self) -> dict[float, tuple[float, float]]:
        """{alpha: (least development loss, its rate)} of LoRA, first seed."""
        found: dict[float, tuple[float, float]] = {}
        for (rate, alpha), loss in self._means("lora", True, SELECTION[:1]).items():
            if alpha is not None and loss is not None:
                found[alpha] = min(found.get(alpha, (loss, rate)), (loss, rate))
        return found

    def _grid(self) -> Iterator[Job]:
        for method in self.methods:
            yield from self._rates(method, ALPHA.get(method), self._start(method), self.fine)
        if ("lora", True) in self.arms():
            yield from self._alphas()
        for method, searched in self.arms() if self.seeds > 1 else ():
            yield from self._second(method, searched)

    def _alphas(self) -> Iterator[Job]:
        known = self._alpha_losses()
        for alpha in missing_alphas({}):
            # A larger alpha wants a smaller rate, so a search begins where that of the nearest alpha ended.
            near = min(known, key=lambda other: abs(other - alpha), default=alpha)
            yield from self._rates("lora", alpha, known[near][1] if known else self._start("lora"), False)
            known = self._alpha_losses()
        if not known:
            return
        for alpha in missing_alphas({alpha: loss for alpha, (loss, _) in known.items()}):
            yield from self._rates("lora", alpha, known[min(known, key=lambda a: abs(a - alpha))][1], False)
        best = min(known, key=lambda alpha: known[alpha])
        if self.fine:
            yield from self._rates("lora", best, known[best][1], True)

    def _second(self, method: str, searched: bool) -> Iterator[Job]:
        """The second seed: around what is best with the first, then around what is best with both."""
        for selection in (SELECTIONS[1:], SELECTIONS):
            best = self.best(method, searched, selection)
            for key in self._around(method, best, searched) if best else ():
                yield self._job(method, key, SELECTION[1])

    def _around(self, method: str, best: Key, searched: bool) -> list[Key]:
        """The best, its nearest rates, and of a searched alpha its neighbours at their best."""
        rate, alpha = best
        rates = sorted(r for r, of in self._means(method, True, SELECTION[:1]) if of == alpha)
        place = rates.index(rate)
        keys: list[Key] = [(r, alpha) for r in (rate, *rates[max(place - 1, 0) : place], *rates[place + 1 : place + 2])]
        if searched and alpha is not None:
            found = self._alpha_losses()
            keys += [(found[near][1], near) for near in (alpha / 2, alpha * 2) if near in found]
        return keys

    def _seeds(self) -> Iterator[Job]:
        for seed in range(self.seeds):
            for method, searched in self.arms():
                if key := self.best(method, searched):
                    scales = SCALES if method in ("bone", "lora") and seed in SCALED_SEEDS else ()
                    yield self._job(method, key, seed, scales=scales)

    def _ranks(self) -> Iterator[Job]:
        for variant in RANKS:
            for method in ("bone", "lora"):
                if method in self.methods and (key := self.best(method)):
                    yield from self._rates(method, ALPHA.get(method), key[0], False, variant)

    def _variants(self) -> Iterator[Job]:
        for method, variants in VARIANTS.items():
            if method in self.methods and (key := self.best(method, method == "lora")):
                for seed in VARIANT_SEEDS:
                    for variant in variants:
                        yield self._job(method, key, seed, variant=variant)
