"""``python -m geolora_pl``."""

from geolora_pl.cli import main

if __name__ == "__main__":
    main()
