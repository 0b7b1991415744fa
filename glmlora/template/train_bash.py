import sys

from glmlora.cli import main

raise SystemExit(main(["train", *sys.argv[1:]]))
