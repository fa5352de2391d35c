"""`python -m secure_export` is `secure-export`."""

from secure_export.cli import main

main()
