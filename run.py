"""`python run.py [group=choice] [key=value]`: train or evaluate; `--help` says more."""

from laser_pl.cli import main

if __name__ == "__main__":
    main()
