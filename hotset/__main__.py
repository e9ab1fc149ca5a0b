"""`python -m hotset` runs the command line."""

from hotset.cluster.cli import main

if __name__ == "__main__":
    main()
