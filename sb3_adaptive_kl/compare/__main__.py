import sys

from sb3_adaptive_kl.compare.cli import main

if __name__ == "__main__":
    sys.exit(main())
