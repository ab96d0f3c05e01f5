"""``python -m memopt`` is the ``memopt`` command."""

from memopt.cli import main

if __name__ == "__main__":
    main()
