"""`python -m t2i_align` is `t2i-align`."""

from t2i_align.cli.main import main

main()
