"""
The second stage: execute the unfinished runs of a plan.

    python -m sb3_adaptive_kl.compare.run FOLDER     # one at a time
"""

from sb3_adaptive_kl.compare import backends
from sb3_adaptive_kl.compare.plan import Plan
from sb3_adaptive_kl.compare.progress import display
from sb3_adaptive_kl.compare.store import Store, on_folder


def carry_out(plan: Plan, store: Store, backend: backends.Backend) -> None:
    """Execute the unfinished runs. A failure is recorded and does not stop the other runs."""
    runs = list(plan.runs())
    todo = [run for run in runs if not store.finished(run)]
    if not todo:
        return
    progress = display(todo, n_finished=len(runs) - len(todo))
    with progress.live():
        for event in backend(todo):
            if isinstance(event, backends.Finished):
                store.keep(event.run, event.outcome)
            progress.update(event)


if __name__ == "__main__":
    on_folder(lambda plan, store: carry_out(plan, store, backends.loky(jobs=1)))
