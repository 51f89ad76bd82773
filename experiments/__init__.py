"""Entry points: absl mains driven by flagfiles, and what they share."""

from experiments import interrupts

interrupts.begin()  # Before what takes long to import.
