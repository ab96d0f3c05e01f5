"""``python -m memopt`` is the ``memopt`` command."""

import sys

try:
    from memopt.cli import main
except KeyboardInterrupt:  # Ctrl-C before the command could begin
    exec("")  # or the exit code may be lost: see _leave of memopt.cli
    sys.exit(130)

if __name__ == "__main__":
    main()
