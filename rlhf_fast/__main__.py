"""`python -m rlhf_fast` is the `rlhf-fast` command."""

from rlhf_fast.cli import main

raise SystemExit(main())
