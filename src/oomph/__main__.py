"""``python -m oomph``: the command line, where its script is not on the path."""

from oomph.cli import main

if __name__ == "__main__":
    main()
