"""Execute the unfinished runs of a plan, with progress bars on a terminal and a line for each run that ends."""

import json
from contextlib import closing
from statistics import fmean

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from sb3_adaptive_kl.compare.backends import Backend, Outcome
from sb3_adaptive_kl.compare.store import Store


def carry_out(store: Store, backend: Backend) -> None:
    """Execute the unfinished runs. A failure is recorded and does not stop the other runs."""
    runs = list(store.plan.runs())
    todo = {run.folder: run for run in runs if not store.finished(run)}
    n_finished = len(runs) - len(todo)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    with Progress(*columns, console=console, transient=True) as bars, closing(backend(list(todo.values()))) as events:
        overall = bars.add_task("all runs", total=sum(run.budget for run in todo.values()))
        tasks = {folder: bars.add_task(str(run), False, run.budget, visible=False) for folder, run in todo.items()}
        if n_finished:
            console.print(f"{n_finished} of {len(runs)} runs have already finished")
        for run, event in events:
            if isinstance(event, int):
                bars.start_task(tasks[run.folder])
                bars.update(tasks[run.folder], completed=event, visible=event > 0)
            else:
                store.keep(run, event)
                n_finished += 1
                console.print(f"[{n_finished}/{len(runs)}] {run}: {_in_short(event)}")
                bars.update(tasks[run.folder], completed=run.budget, visible=False)
            completed = sum(task.completed for task in bars.tasks if task.id != overall)
            bars.update(overall, completed=completed, description=f"{n_finished}/{len(runs)} runs")


def _in_short(outcome: Outcome) -> str:
    if isinstance(outcome, str):
        return f"failed: {outcome.splitlines()[0]}"
    result = json.loads(outcome["run.json"])
    speed = result["timesteps"] / result["seconds"]
    return f"return {fmean(result['final_returns']):.1f}, {result['seconds']:.0f} s, {speed:,.0f} steps/s"
