"""`python -m alignment_modules` is `align`."""

from alignment_modules.cli import main

if __name__ == "__main__":
    main()
