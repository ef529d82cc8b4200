"""How long networks take: measured, expected while gates are learned, and met as a budget."""
