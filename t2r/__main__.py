"""`python -m t2r` is the command `t2r`."""

from t2r.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
