"""``python -m geolora_pl``."""

from geolora_pl.cli.dispatch import command_line

if __name__ == "__main__":
    command_line()
