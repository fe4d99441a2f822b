"""Ranks that run cases: as processes over gloo, or as virtual ranks in threads."""

from __future__ import annotations

import importlib
import multiprocessing
import queue
import tempfile
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from tests.deep_ep import cases_combine, cases_dispatch, cases_hooks
from tests.deep_ep.seat import OURS, Seat, SkipCase

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

CASES: dict[str, Callable[[Seat], None]] = {
    name.removeprefix("case_"): case
    for module in (cases_dispatch, cases_combine, cases_hooks)
    for name, case in vars(module).items()
    if name.startswith("case_")
}

START_LIMIT_S = 60.0
CASE_LIMIT_S = 30.0
PEER_LIMIT_S = 10.0  # what ours waits for a rank, so that one failure does not hold up the rest

SKIPPED = "skipped: "


def _run(seat: Seat, names: list[str], report: Callable[[str, int, str], None]) -> None:
    """Run cases until one fails. A report is (case, rank, "" or what went wrong)."""
    torch.set_num_threads(1)
    for name in names:
        try:
            CASES[name](seat)
        except SkipCase as reason:
            report(name, seat.rank, f"{SKIPPED}{reason}")
        except BaseException:  # noqa: BLE001  # told to the parent, which raises it
            report(name, seat.rank, traceback.format_exc())
            return
        else:
            report(name, seat.rank, "")


def _load(module_name: str) -> Any:
    module = importlib.import_module(module_name)
    if module_name == OURS:
        module.Buffer.timeout_s = PEER_LIMIT_S
    return module


def _process_main(
    module_name: str, device: str, store: str, rank: int, num_ranks: int, names: list[str], reports: Any
) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks)
    # With fewer GPUs than ranks, several ranks share one.
    where = torch.device(device) if device == "cpu" else torch.device(device, rank % torch.cuda.device_count())
    if where.type == "cuda":
        torch.cuda.set_device(where)
    seat = Seat(_load(module_name), distributed.group.WORLD, rank, num_ranks, where, module_name == OURS)
    _run(seat, names, lambda *report: reports.put(report))
    reports.close()
    reports.join_thread()


def _collect(
    names: list[str], num_ranks: int, receive: Callable[[float], tuple[str, int, str]]
) -> tuple[dict[str, str], list[str]]:
    """Results by case, and the cases still to be run, after the first that failed or hung."""
    results: dict[str, str] = {}
    heard: dict[str, dict[int, str]] = {name: {} for name in names}
    for at, name in enumerate(names):
        deadline = time.monotonic() + CASE_LIMIT_S + (START_LIMIT_S if at == 0 else 0)
        while len(heard[name]) < num_ranks:
            try:
                case, rank, what = receive(max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                missing = sorted(set(range(num_ranks)) - set(heard[name]))
                results[name] = f"ranks {missing} did not finish"
                return results, names[at + 1 :]
            heard[case][rank] = what  # a rank that need not wait for the others may be a case ahead
            if case == name and _is_failure(what):
                break
        failures = [f"rank {rank}:\n{what}" for rank, what in heard[name].items() if _is_failure(what)]
        results[name] = failures[0] if failures else next(filter(None, heard[name].values()), "")
        if failures:
            return results, names[at + 1 :]
    return results, []


def _is_failure(what: str) -> bool:
    return bool(what) and not what.startswith(SKIPPED)


def run_processes(module_name: str, device: str, num_ranks: int) -> dict[str, str]:
    """Run all cases in `num_ranks` processes; a case that fails costs a fresh set of them."""
    names, results = list(CASES), {}
    context = multiprocessing.get_context("spawn")
    while names:
        reports = context.Queue()
        with tempfile.TemporaryDirectory() as folder:
            ranks = [
                context.Process(
                    target=_process_main,
                    args=(module_name, device, f"{folder}/store", rank, num_ranks, names, reports),
                    daemon=True,
                )
                for rank in range(num_ranks)
            ]
            try:
                for rank in ranks:
                    rank.start()

                def receive(timeout: float, reports: Any = reports) -> tuple[str, int, str]:
                    return reports.get(timeout=timeout)  # type: ignore[no-any-return]

                done, names = _collect(names, num_ranks, receive)
            finally:
                for rank in ranks:
                    rank.join(5.0)
                    rank.kill()
                    rank.join()
        results.update(done)
    return results


def run_threads(num_ranks: int, module: Any = None, cases: Iterable[str] = CASES) -> dict[str, str]:
    """Run cases on virtual ranks in threads of this process, on ours or on a `module` made of it."""
    from moebius import virtual_ranks

    names, results = list(cases), {}
    while names:
        reports: queue.Queue[tuple[str, int, str]] = queue.Queue()

        def report(case: str, rank: int, what: str, to: queue.Queue[tuple[str, int, str]] = reports) -> None:
            to.put((case, rank, what))

        def receive(timeout: float, reports: queue.Queue[tuple[str, int, str]] = reports) -> tuple[str, int, str]:
            return reports.get(timeout=timeout)

        seats = [
            Seat(module or _load(OURS), group, rank, num_ranks, torch.device("cpu"), is_ours=True)
            for rank, group in enumerate(virtual_ranks(num_ranks))
        ]
        threads = [threading.Thread(target=_run, args=(seat, names, report), daemon=True) for seat in seats]
        for thread in threads:
            thread.start()
        done, names = _collect(names, num_ranks, receive)
        for thread in threads:
            thread.join(PEER_LIMIT_S + 5.0)
        results.update(done)
    return results
