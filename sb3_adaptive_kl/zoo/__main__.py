import sys

from sb3_adaptive_kl.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "zoo")
    main()
