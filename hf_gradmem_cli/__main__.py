"""`python -m hf_gradmem_cli`, and `accelerate launch -m hf_gradmem_cli`."""

from . import main

if __name__ == "__main__":
    main()
