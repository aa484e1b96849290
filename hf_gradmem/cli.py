"""`python -m hf_gradmem.cli`: the command line, which lives in a package that imports nothing heavy."""

from hf_gradmem_cli import app, main

__all__ = ["app", "main"]

if __name__ == "__main__":
    main()
