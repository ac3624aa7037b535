"""
The second stage: carry out the runs of a plan that are not done.

    python -m sb3_adaptive_kl.compare.run FOLDER     # those of a folder, one after the other
"""

from sb3_adaptive_kl.compare import backends
from sb3_adaptive_kl.compare.plan import Plan
from sb3_adaptive_kl.compare.progress import display
from sb3_adaptive_kl.compare.store import Store, on_folder


def carry_out(plan: Plan, store: Store, backend: backends.Backend) -> None:
    """A run that is done is never repeated; one that fails is written down and stops no other."""
    runs = list(plan.runs())
    todo = [run for run in runs if not store.finished(run)]
    if not todo:
        return
    shown = display(todo, n_finished=len(runs) - len(todo))
    with shown.shown():
        for event in backend(todo):
            if isinstance(event, backends.Finished):
                store.keep(event.run, event.outcome)
            shown.update(event)


if __name__ == "__main__":
    on_folder(lambda plan, store: carry_out(plan, store, backends.loky(jobs=1)))
