"""``python -m robustlab``."""

from robustlab.cli import main

main()
