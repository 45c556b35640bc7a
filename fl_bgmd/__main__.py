"""``python -m fl_bgmd``: what ``fl-bgmd`` does."""

from fl_bgmd.simulations import main

if __name__ == "__main__":
    main()
