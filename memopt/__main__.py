"""``python -m memopt`` is the ``memopt`` command."""

import sys

try:
    from memopt.cli import main
except KeyboardInterrupt:  # Ctrl-C before the command could begin
    sys.exit(130)

if __name__ == "__main__":
    main()
