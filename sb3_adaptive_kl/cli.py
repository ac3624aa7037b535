"""The command `sb3-adaptive-kl`, a shortcut for the modules of this package that can be run."""

import sys
from importlib.metadata import version

from sb3_adaptive_kl.messages import suggestion

USAGE = """usage: sb3-adaptive-kl compare ...   head-to-head of algorithms (same as python -m sb3_adaptive_kl.compare)
       sb3-adaptive-kl zoo ...       a script of RL Baselines3 Zoo (same as python -m sb3_adaptive_kl.zoo)
       sb3-adaptive-kl --version"""
# Modules that the extras `zoo` and `compare` bring. Any other that is missing is the user's, such as a package of environments
EXTRAS = {
    "imageio_ffmpeg", "jinja2", "loky", "matplotlib", "moviepy", "pandas", "pydantic", "requests", "rich", "rl_zoo3",
    "sb3_contrib", "scipy", "seaborn", "tensorboard",
}  # fmt: skip


def main() -> None:
    """
    Run the subcommand named on the command line.

    :raises SystemExit: if the subcommand is unknown, or needs an extra that is not installed
    """
    command = sys.argv.pop(1) if len(sys.argv) > 1 else None
    try:
        if command == "compare":
            from sb3_adaptive_kl.compare.cli import main as compare

            sys.exit(compare())
        elif command == "zoo":
            from sb3_adaptive_kl.zoo import main as zoo

            zoo()
        elif command == "--version":
            print(version("sb3-adaptive-kl"))
        elif command in ("-h", "--help"):
            print(USAGE)
        else:
            print(USAGE, file=sys.stderr)
            if command is not None:
                hint = suggestion(command, ("compare", "zoo", "--version", "--help"))
                print(f"sb3-adaptive-kl: unknown command {command!r}{hint}", file=sys.stderr)
            sys.exit(2)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRAS:
            raise
        sys.exit(f"{error}: pip install '.[{command}]' in the clone, or 'sb3-adaptive-kl[{command}]' once it is published")


if __name__ == "__main__":
    main()
