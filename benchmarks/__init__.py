"""What this package was measured with: a folder per question, and what they share. README.md says how to run it."""
