"""``python -m geolora_pl``."""

from geolora_pl.cli.dispatch import main

if __name__ == "__main__":
    main()
