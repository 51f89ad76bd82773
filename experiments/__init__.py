"""Entry points: absl mains driven by flagfiles, and what they share."""
