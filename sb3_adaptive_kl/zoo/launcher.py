"""
The zoo's scripts without the start-up hook, for users who switched it off or cannot install it:

    python -m sb3_adaptive_kl.zoo train --algo ppo_kl --env CartPole-v1

Scripts that start child processes are left out, since the children would not know the algorithms, and so is `push_to_hub`,
which cannot be imported with the huggingface_sb3 that the zoo brings.
"""

import runpy
import sys
from importlib import import_module

from sb3_adaptive_kl.messages import suggestion
from sb3_adaptive_kl.zoo.registry import REGISTRIES, complete_registry

SCRIPTS = (
    "train", "enjoy", "record_video", "plots.plot_train", "plots.all_plots", "plots.plot_from_file",
    "load_from_hub",
)  # fmt: skip
USAGE = f"""usage: python -m sb3_adaptive_kl.zoo SCRIPT [the script's own arguments]
SCRIPT is one of {", ".join(SCRIPTS)}"""


def main() -> None:
    """
    Run a script of the zoo with its arguments in this process.

    :raises SystemExit: if the script is unknown
    """
    script = sys.argv[1] if len(sys.argv) > 1 else None
    if script in ("-h", "--help"):
        print(USAGE)
        return
    if script not in SCRIPTS:
        sys.exit(USAGE if script is None else f"{USAGE}\nunknown script {script!r}{suggestion(script, SCRIPTS)}")
    for name in REGISTRIES:
        complete_registry(import_module(name))  # changes nothing if the hook has done it
    # As if it had been started with -m: the scripts read sys.argv, and torchrun is recognized by the name of __main__
    runpy.run_module(f"rl_zoo3.{sys.argv.pop(1)}", run_name="__main__", alter_sys=True)
