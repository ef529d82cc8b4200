"""What channels do in each kind of operation, while gates open and shut: one file a family."""
