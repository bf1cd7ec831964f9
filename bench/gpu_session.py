"""What the tests of a GPU run share: results, executors, gates that were passed, peers at work."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import perf_counter

import gpu_gates
import pytest
import torch
from gpu_decodes import Case, Model
from gpu_models import device_of, nbytes_per_token, shape
from gpu_op_works import op_works, poisoned
from gpu_ours import TIERS, Ours, executor, plain_weights
from gpu_peers import PEERS
from gpu_plain import PlainModel, Weights, random_ids, random_weights
from gpu_results import LOST, Results
from gpu_timing import copy_bandwidth, describe
from gpu_worker import GpuWorker, WorkerFault
from timing import Work

READY_SECONDS = 150  # from the start of a run until a peer must have compiled
QUIET_SECONDS = 90  # from the start until the first timing, if peers still compile
TRIED_SECONDS = 90  # from the start until what compiles ours must have run it once
DRY_CONTEXT = 16
CHECKED_STEPS = 16  # greedy ones that an executor's choices are checked for
# What leaves a process unable to use the GPU any more.
STICKY = ("illegal memory access", "device-side assert", "unspecified launch failure", "misaligned")


class Session:
    """One run.

    Args:
        folder: of the results.
        dry: tiny models on a CPU.
        ungated: also time what a gate found wrong; its results say so.
        missing: skip what the results have already.
        say: tells a person what goes on.
    """

    def __init__(
        self, folder: Path, dry: bool, ungated: bool, missing: bool, say: Callable[[str], None]
    ) -> None:
        self.dry, self.ungated, self.missing, self.say = dry, ungated, missing, say
        self.device = device_of(dry)
        self.started = perf_counter()
        self.results = Results(folder, self.device, dry)
        self._executors: dict[Model, object] = {}
        self._weights: dict[str, Weights] = {}
        self._gated: set[str] = set()  # tiers whose gate ran
        self._red: dict[Model, str] = {}
        self._text: gpu_gates.Text | None = None
        self._workers: dict[tuple[str, str], GpuWorker] = {}
        self._tried: set[tuple[str, str]] = set()
        self._broken: dict[tuple[str, str], str] = {}  # what hung or crashed in its own process
        self._lost = ""

    # --- processes that compile ------------------------------------------------------------------

    def start(self, jobs: Iterable[tuple[str, str]], context: int = 128) -> None:
        """Start a process for each (peer, or what compiles ours; model): see `gpu_worker`."""
        for job in jobs:
            if job not in self._workers:
                tokens = min(context, DRY_CONTEXT) if self.dry else context
                self._workers[job] = GpuWorker(*job, tokens, self.dry)

    def start_all(self, chosen: list) -> None:
        """Start the processes that chosen tests need, by their cases and names of ops."""
        cases = [case for case in chosen if isinstance(case, Case)]
        known = [case.name for case in cases if self.missing and self.results.has(case.name)]
        cases = [case for case in cases if case.name not in known]
        for case in cases:
            preset = next(iter(case.models.values())).preset
            self.start(((name, preset) for name in case.workers), case.context)
        ours = [model.job for case in cases for model in case.models.values()]
        ours += [Model("125M", tier=tier).job for tier in TIERS if tier in chosen]
        ops: dict[str, list[str]] = {}
        for name in op_works(self.dry):
            if name in chosen:
                ops.setdefault(name.partition("-")[0], []).append(name)
        own = [*ours, *(("op", ",".join(names)) for names in ops.values())]
        self.start(dict.fromkeys(own[:: len(own) - 1 or 1] if self.dry else own))

    def quiet(self, seconds: float = QUIET_SECONDS) -> None:
        """Wait for processes that compile; those that take longer pause while others are timed.

        Args:
            seconds: until when, from the start of the run.
        """
        seconds = 10 * seconds if self.dry else seconds  # on a small machine, with nothing to time
        for job in list(self._workers):
            if job[0] not in PEERS:
                self.tried(job)
        for (name, preset), worker in self._workers.items():
            if name in PEERS:
                with suppress(WorkerFault):  # its own measurement reports it
                    if worker.wait(seconds - (perf_counter() - self.started)) is None:
                        self.say(f"{name} {preset} is not ready, and pauses")
                        worker.pause()

    def tried(self, job: tuple[str, str]) -> None:
        """Wait until a process that compiles ours has run it once; remember if it hung or crashed.

        Ours is then not run in this process, which goes on to measure the rest.
        """
        if job in self._tried or job not in self._workers:
            return
        self._tried.add(job)
        worker, fault = self._workers[job], ""
        seconds = 10 * TRIED_SECONDS if self.dry else TRIED_SECONDS
        try:
            if worker.wait(seconds - (perf_counter() - self.started)) is None:
                fault = f"it did not end in {seconds} s"
        except WorkerFault as error:
            fault = str(error)
        worker.close()
        if fault:
            self.results.note(f"trying {' '.join(job)}", fault)
            if "did not end" in fault or "status" in fault or any(sign in fault for sign in STICKY):
                self._broken[job] = fault

    def peers_ready(self) -> None:
        """Let the processes that pause go on, and wait until all are ready or have failed."""
        for worker in self._workers.values():
            worker.resume()
        self.quiet(READY_SECONDS)

    def worker(self, name: str, preset: str) -> GpuWorker:
        """Return a peer that is ready.

        Raises:
            WorkerFault: it failed, or was not ready in time.
        """
        worker = self._workers[name, preset]
        if worker.wait(0) is None:
            worker.close()
            raise WorkerFault(f"it was not ready {READY_SECONDS} s after the start")
        return worker

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()

    # --- ours ------------------------------------------------------------------------------------

    @contextmanager
    def recording(self, name: str, goals: Iterable[str]) -> Iterator[None]:
        """Leave no trace missing: the file says what started, and how it failed.

        Skips what is not to be measured again.
        """
        if self.missing and self.results.has(name):
            pytest.skip("measured before")
        if self._lost:
            self.results.fail(name, self._lost, goals)
            pytest.fail(self._lost, pytrace=False)
        self.results.fail(name, "it did not end", goals)
        try:
            yield
        except Exception as error:
            self.results.fail(name, self.failed(name, error), goals)
            raise

    def failed(self, where: str, error: BaseException) -> str:
        """Describe an error, and remember if the device is lost with it."""
        text = describe(error)
        if any(sign in text for sign in STICKY):
            self._lost = f"{LOST} in {where}: {text}"
        return text

    def weights(self, preset: str) -> Weights:
        """Return the bf16 weights that ours and the peers have in common; of one shape."""
        if preset not in self._weights:
            self._weights = {
                preset: random_weights(shape(preset, self.dry), self.device, torch.bfloat16)
            }
        return self._weights[preset]

    def executor(self, model: Model):
        """Return an executor, made once.

        Raises:
            RuntimeError: it hung or crashed when it was tried, or its tier in its gate.
        """
        if model not in self._executors:
            tier = self._usable(model)
            config, weights = shape(model.preset, self.dry), self.weights(model.preset)
            self._executors[model] = executor(config, weights, model.kind, tier, self.dry)
        return self._executors[model]

    def _usable(self, model: Model) -> str:
        """Return the tier for a model: of "auto" the best that neither hung nor lost the GPU."""
        begun = self.results.data["measurements"]
        faults = {
            tier: begun.get(f"gate-{tier}", {}).get("fault")
            or self._broken.get(Model("125M", tier=tier).job)
            for tier in TIERS
        }
        if model.tier != "auto":
            if fault := faults[model.tier]:
                raise RuntimeError(f"the tier {model.tier} failed: {fault}")
            return model.tier
        if self.dry:
            return "auto"
        from mobilellm_fast.cuda.executor import best_tiers

        best = best_tiers(self.device, shape(model.preset, self.dry))[0]
        faults[best] = faults[best] or self._broken.get(model.job)
        usable = [tier for tier in TIERS[: TIERS.index(best) + 1] if not faults[tier]]
        if not usable:
            raise RuntimeError(f"all tiers failed: {faults}")
        return "auto" if usable[-1] == best else usable[-1]

    def _gate_of(self, tier: str) -> str:
        """Say what the gate of a tier found wrong, in this run or, for what it skips, the last."""
        found = self.results.data["gates"].get(f"gate-{tier}", {}).get("red", [])
        return "; ".join(found) if self.missing or tier in self._gated else ""

    def gate_tier(self, tier: str) -> dict:
        """Hold a tier to float32 and transformers' bf16 on the model of the gates."""
        from gpu_text import gate_text

        if fault := self._broken.get(Model("125M", tier=tier).job):
            raise RuntimeError(f"in a process of its own: {fault}")
        if self._text is None:
            self._text = gate_text(self.device, self.dry)
        text = self._text
        with poisoned():
            own = executor(text.config, text.weights, "bf16", tier, self.dry)
            found = gpu_gates.check(text, own)
        self._gated.add(tier)
        return found

    def red(self, model: Model, own: Ours, ids: list[list[int]]) -> str:
        """Check once what a model decodes; returns what is wrong with it or its tier."""
        if model not in self._red:
            reasons = (self._gate_of(own.executor.tier), self._check_greedy(model, own, ids[0]))
            self._red[model] = "; ".join(filter(None, reasons))
        return self._red[model]

    def _check_greedy(self, model: Model, own: Ours, prompt: list[int]) -> str:
        """Hold greedy choices to the plain model's logits in float32, on the same weights."""
        found = own.decode(CHECKED_STEPS)[1]
        if found != own.decode(CHECKED_STEPS)[1]:
            return "other ids when repeated"
        ids = [*prompt, own.following[0], *found]
        config = shape(model.preset, self.dry)
        wide = plain_weights(own.executor, self.weights(model.preset))
        exact = PlainModel(config, wide, len(ids)).logits(ids)
        rounded = {name: weight.to(torch.bfloat16) for name, weight in wide.items()}
        error = float((PlainModel(config, rounded, len(ids)).logits(ids) - exact).abs().max())
        chosen = torch.tensor(ids[len(prompt) :], device=exact.device)
        logits = exact[len(prompt) - 1 : -1]
        gap = float((logits.max(-1).values - logits.gather(-1, chosen[:, None])[:, 0]).max())
        if not gap <= gpu_gates.GREEDY_SLACK * error:
            return f"chose a token {gap:.3g} below the best, bf16 in plain PyTorch errs {error:.3g}"
        return ""

    # --- what is timed ---------------------------------------------------------------------------

    def decode_works(self, case: Case) -> tuple[dict[str, Work], dict[str, str], str]:
        """Make everything that decodes in a case.

        Returns:
            works, what could not be made, and what the gates found wrong.
        """
        works: dict[str, Work] = {}
        faults: dict[str, str] = {}
        red: list[str] = []
        following: dict[str, list[int]] = {}
        context, count = self.sizes(case)
        preset = next(iter(case.models.values())).preset
        config = shape(preset, self.dry)
        batch = min(case.batch, 2) if self.dry else case.batch
        prompts = [random_ids(config, context, seed) for seed in range(batch)]

        def add(name: str, decode, **facts) -> None:
            def run() -> float:
                taken, ids = decode(count)
                following.setdefault(name, ids)
                return taken / count

            run()
            works[name] = Work(run, facts | {"tokens": batch, "first_ids": following[name][:8]})

        for name, model in case.models.items():
            try:
                made = Ours(self.executor(model), prompts)
                if wrong := self.red(model, made, prompts):
                    red.append(f"{name}: {wrong}")
                nbytes = nbytes_per_token(shape(model.preset, self.dry), model.kind, context)
                tier = made.executor.tier
                add(name, made.decode, tier=tier, kind=model.kind, nbytes=nbytes)
            except Exception as error:
                faults[name] = self.failed(f"{case} {name}", error)
        for name in case.peers:
            try:
                peer = PEERS[name](config, self.weights(preset), context)
                peer.start(prompts)
                add(name, peer.decode, versions=peer.versions)
            except Exception as error:
                faults[name] = self.failed(f"{case} {name}", error)
        for name in case.workers:
            try:
                worker = self.worker(name, preset)
                add(name, lambda n, w=worker: tuple(w.decode(n).values()), **worker.about)
            except Exception as error:
                faults[name] = describe(error)
        return works, faults, "; ".join(red)

    def sizes(self, case: Case) -> tuple[int, int]:
        """Return the tokens of the context and of a turn."""
        if self.dry:
            return min(case.context, DRY_CONTEXT), 4
        return case.context, case.count

    def measure_bandwidth(self) -> float:
        """Measure the copy bandwidth of this moment."""
        return copy_bandwidth(self.device)
