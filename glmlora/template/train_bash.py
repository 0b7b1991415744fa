from glmlora.cli import main

raise SystemExit(main(["train"]))
